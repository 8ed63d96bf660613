"""Linear probes as tasks: they train nothing but the last layer."""

import dataclasses
import types

from hivit_jax.tasks.classify import ClassifyTask
from hivit_jax.tasks.segment import SegmentTask

_WITHOUT_WEIGHTS = (
  'a linear probe of a random model, because config.init is not set; to probe a pretrained one: '
  '--config.init=WORKDIR'
)


@dataclasses.dataclass(frozen=True)
class LinearTask(ClassifyTask):
  """Tell the class of an image from the features of a model that stays as it is."""

  rules = ((r'head/kernel', 'decay'), (r'head/bias', 'no_decay'), (r'.*', 'frozen'))
  without_weights = _WITHOUT_WEIGHTS


@dataclasses.dataclass(frozen=True)
class SegmentLinearTask(SegmentTask):
  """Tell the class of each pixel from the features of an encoder that stays as it is.

  What is trained is the head, which `linear_levels` of the model makes a linear one.
  """

  rules = ((r'backbone/.*', 'frozen'), *SegmentTask.rules)
  required = types.MappingProxyType({'model.linear_levels': '(1,2,3)'})
  without_weights = _WITHOUT_WEIGHTS
