"""Finetuning of HiViT-L after MAE: as MAE does with ViT-L; none is published. Variant :debug."""

from configs import base


def get_config(variant: str | None = None):
  return base.finetune('large', variant, epochs=50.0, base_lr=1e-3, layer_decay=0.84)
