"""Finetuning of ViT-B after MAE (arXiv 2111.06377, table 9); variant :debug."""

from configs import base


def get_config(variant: str | None = None):
  return base.finetune('base', variant, model='vit', layer_decay=0.65, drop_path_rate=0.1)
