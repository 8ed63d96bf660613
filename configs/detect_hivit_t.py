"""Mask R-CNN on HiViT-T, on COCO after MAE, with less drop path; :cascade, :lsj, :debug."""

from hivit_jax.configs import recipes


def get_config(variant: str | None = None):
  return recipes.detect('hivit_tiny', variant)
