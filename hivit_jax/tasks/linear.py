"""A linear probe as a task: classification that trains nothing but the last layer."""

import dataclasses

from hivit_jax.tasks.classify import ClassifyTask


@dataclasses.dataclass(frozen=True)
class LinearTask(ClassifyTask):
  """Tell the class of an image from the features of a model that stays as it is."""

  rules = ((r'head/kernel', 'decay'), (r'head/bias', 'no_decay'), (r'.*', 'frozen'))
  without_weights = (
    'a linear probe of a random model, because config.init is not set; to probe a pretrained one: '
    '--config.init=WORKDIR'
  )
