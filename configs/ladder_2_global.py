"""From Swin-B to HiViT-B, step 2 of 4: global attention in the main stage, too; variant :debug."""

from hivit_jax.configs import recipes


def get_config(variant: str | None = None):
  return recipes.supervised('swin_base_global', variant)
