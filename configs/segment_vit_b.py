"""ViT-B with UPerNet on ADE20K after MAE (arXiv 2111.06377); variants :linear, :debug.

A baseline for HiViT with the numbers of mmsegmentation's config, which recipes.py names; no test
compares the model. It lacks the relative position bias and LayerScale of theirs: do not expect its
results.
"""

from hivit_jax.configs import recipes


def get_config(variant: str | None = None):
  return recipes.segment('vit_base', variant)
