"""Swin-B with UPerNet on ADE20K (arXiv 2103.14030); variants :linear, :debug.

A baseline for HiViT with the numbers of mmsegmentation's config, which recipes.py names; no test
compares the model. Windows have 8 patches instead of 7, so that they divide all maps: do not expect
the published results.
"""

from hivit_jax.configs import recipes


def get_config(variant: str | None = None):
  return recipes.segment('swin_base', variant)
