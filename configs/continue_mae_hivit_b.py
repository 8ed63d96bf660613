"""MAE pretraining of HiViT-B that continues on 1 000 to 50 000 images of one's own.

  python main.py --config=configs/continue_mae_hivit_b.py --config.init=WEIGHTS \\
      --config.data.name=folder:/data/own

Variants: the length in epochs, :400 (5 000 images), :100 (50 000), :1600 (1 000); :debug.
"""

from hivit_jax.configs import recipes


def get_config(variant: str | None = None):
  return recipes.continue_mae('hivit_base', variant)
