"""From Swin-B to HiViT-B, step 1 of 4: three stages instead of four; variant :debug."""

from hivit_jax.configs import recipes


def get_config(variant: str | None = None):
  return recipes.supervised('swin_base_three_stages', variant)
