"""Mask R-CNN on ViT-B as in ViTDet (arXiv 2203.16527), on COCO; variants :cascade, :lsj, :debug."""

from hivit_jax.configs import recipes


def get_config(variant: str | None = None):
  return recipes.detect('vit_base', variant)
