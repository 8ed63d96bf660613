"""Supervised training of ViT-B with the recipe of HiViT-B, to compare with; variant :debug."""

from hivit_jax.configs import recipes


def get_config(variant: str | None = None):
  return recipes.supervised('vit_base', variant)
