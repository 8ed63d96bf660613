"""Supervised training of HiViT-B on ImageNet (arXiv 2205.14949); variant :debug."""

from hivit_jax.configs import recipes


def get_config(variant: str | None = None):
  return recipes.supervised('hivit_base', variant)
