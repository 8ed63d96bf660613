"""MAE pretraining of ViT-B on ImageNet (arXiv 2111.06377); variants :300 :800 :1600 :debug."""

from configs import base


def get_config(variant: str | None = None):
  return base.pretrain('base', variant, model='vit', base_lr=1.5e-4)
