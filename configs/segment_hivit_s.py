"""HiViT-S with UPerNet on ADE20K (arXiv 2205.14949); variants :512, :linear, :debug.

The recipe is that of B, which alone is published.
"""

from hivit_jax.configs import recipes


def get_config(variant: str | None = None):
  return recipes.segment('hivit_small', variant)
