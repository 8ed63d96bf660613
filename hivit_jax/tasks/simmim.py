"""SimMIM pretraining as a task: masked autoencoding by other models under other rules."""

import dataclasses

from hivit_jax.models.simmim import SimMIM
from hivit_jax.tasks.mae import MAETask


@dataclasses.dataclass(frozen=True)
class SimMIMTask(MAETask):
  """Reconstruct the removed units of an image that the encoder sees as mask tokens."""

  model_class = SimMIM
  model_kind = 'SimMIM'
  # As the official runs: they mean to spare the bias tables, but by a name that matches none.
  rules = (
    (r'(.*/)?(bias|scale)|.*/mask_token', 'no_decay'),
    (r'(.*/)?kernel|.*/relative_position_bias_table', 'decay'),
  )
