"""Mask R-CNN on HiViT-B, on COCO after MAE (arXiv 2205.14949); variants :cascade, :lsj, :debug."""

from hivit_jax.configs import recipes


def get_config(variant: str | None = None):
  return recipes.detect('hivit_base', variant)
