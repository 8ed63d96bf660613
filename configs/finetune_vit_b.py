"""Finetuning of ViT-B after MAE (arXiv 2111.06377, table 9); variant :debug."""

from configs import base


def get_config(variant: str | None = None):
  recipe = {'layer_decay': 0.65, 'drop_path_rate': 0.1, 'mix_group': 32}
  return base.finetune('base', variant, model='vit', **recipe)
