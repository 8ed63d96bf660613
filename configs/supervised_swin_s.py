"""Supervised training of Swin-S on ImageNet (arXiv 2103.14030); variant :debug."""

from hivit_jax.configs import recipes


def get_config(variant: str | None = None):
  return recipes.supervised('swin_small', variant)
