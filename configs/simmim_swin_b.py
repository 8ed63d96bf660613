"""SimMIM pretraining of Swin-B on ImageNet (arXiv 2111.09886); variants :100 :800 :debug.

Two recipes: 800 epochs, the default, with one step of the learning rate at epoch 700; 100 epochs
with twice the rate and a cosine.
"""

from hivit_jax.configs import recipes


def get_config(variant: str | None = None):
  return recipes.simmim('swin_base', variant)
