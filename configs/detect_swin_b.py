"""Mask R-CNN on Swin-B, on COCO after SimMIM: a baseline; variants :cascade, :debug.

Rates, schedule, augmentation, drop path of 0.3, no layer decay, and heads are those of Swin-B's
official Cascade Mask R-CNN (SwinTransformer/Swin-Transformer-Object-Detection, configs/swin/
cascade_mask_rcnn_swin_base_patch4_window7_mstrain_480-800_giou_4conv1f_adamw_3x_coco.py), which
starts from labels; no plain Mask R-CNN on Swin-B was published there. SimMIM's weights in its place
and the one canvas are ours, the first for the comparison in HiViT's paper.
"""

from hivit_jax.configs import recipes


def get_config(variant: str | None = None):
  config = recipes.detect('swin_base', variant)
  config.detect.update(buckets=(), eval_buckets=())  # windows of 7 divide 1344x1344 at all strides
  if config.init:
    config.init = 'workdirs/simmim_swin_b'
  return config
