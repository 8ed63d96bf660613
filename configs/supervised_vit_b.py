"""Supervised training of ViT-B with the recipe of HiViT-B, to compare with; variant :debug."""

from configs import base


def get_config(variant: str | None = None):
  return base.supervised('base', variant, model='vit', drop_path_rate=0.1)
