"""Finetuning of HiViT-T after MAE: B's recipe, less drop path; none is published.

Variant :debug.
"""

from hivit_jax.configs import recipes


def get_config(variant: str | None = None):
  return recipes.finetune('hivit_tiny', variant)
