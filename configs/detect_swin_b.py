"""Mask R-CNN on Swin-B, on COCO after SimMIM: a baseline; variants :cascade, :debug."""

from configs import recipes


def get_config(variant: str | None = None):
  config = recipes.detect('swin_base', variant)
  if config.init:
    config.init = 'workdirs/simmim_swin_b'
  return config
