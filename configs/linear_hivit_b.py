"""Linear probe of a pretrained HiViT-B: MAE's recipe (arXiv 2111.06377); variant :debug."""

from hivit_jax.configs import recipes


def get_config(variant: str | None = None):
  return recipes.linear('hivit_base', variant)
