"""Supervised training of Swin-T on ImageNet (arXiv 2103.14030); variant :debug."""

from configs import base


def get_config(variant: str | None = None):
  return base.supervised('tiny', variant, model='swin', drop_path_rate=0.2, clip_norm=5.0)
