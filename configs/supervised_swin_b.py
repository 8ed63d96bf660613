"""Supervised training of Swin-B on ImageNet (arXiv 2103.14030); variant :debug."""

from configs import base


def get_config(variant: str | None = None):
  recipe = {'drop_path_rate': 0.5, 'clip_norm': 5.0, 'mix_group': 64}
  return base.supervised('base', variant, model='swin', **recipe)
