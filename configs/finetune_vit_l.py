"""Finetuning of ViT-L after MAE (arXiv 2111.06377, table 9); variant :debug."""

from configs import base


def get_config(variant: str | None = None):
  recipe = {'epochs': 50.0, 'base_lr': 1e-3, 'layer_decay': 0.75, 'mix_group': 32}
  return base.finetune('large', variant, model='vit', **recipe)
