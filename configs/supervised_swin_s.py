"""Supervised training of Swin-S on ImageNet (arXiv 2103.14030); variant :debug."""

from configs import base


def get_config(variant: str | None = None):
  return base.supervised('small', variant, model='swin', drop_path_rate=0.3, clip_norm=5.0)
