"""From Swin-B to HiViT-B, step 3 of 4: and no attention before it; variant :debug."""

from hivit_jax.configs import recipes


def get_config(variant: str | None = None):
  return recipes.supervised('swin_base_mlp_stem', variant)
