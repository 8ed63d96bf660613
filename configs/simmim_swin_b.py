"""SimMIM pretraining of Swin-B on ImageNet (arXiv 2111.09886); variants :100 :800 :debug.

The learning rate falls by a cosine; the official run of 800 epochs has one step, at epoch 700.
"""

from configs import base


def get_config(variant: str | None = None):
  return base.simmim('base', variant)
