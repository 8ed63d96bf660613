"""Mask R-CNN on Swin-B, on COCO after SimMIM: a baseline; variants :cascade, :debug."""

from hivit_jax.configs import recipes


def get_config(variant: str | None = None):
  config = recipes.detect('swin_base', variant)
  config.detect.update(buckets=(), eval_buckets=())  # windows of 7 divide 1344x1344 at all strides
  if config.init:
    config.init = 'workdirs/simmim_swin_b'
  return config
