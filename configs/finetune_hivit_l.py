"""Finetuning of HiViT-L after MAE: as MAE does with ViT-L; none is published. Variant :debug."""

from hivit_jax.configs import recipes


def get_config(variant: str | None = None):
  return recipes.finetune('hivit_large', variant)
