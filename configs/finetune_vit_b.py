"""Finetuning of ViT-B after MAE (arXiv 2111.06377, table 9); variant :debug."""

from hivit_jax.configs import recipes


def get_config(variant: str | None = None):
  return recipes.finetune('vit_base', variant)
