"""Supervised training of HiViT-T on ImageNet (arXiv 2205.14949); variant :debug."""

from configs import base


def get_config(variant: str | None = None):
  return base.supervised('tiny', variant, drop_path_rate=0.05)
