"""Finetuning of HiViT-S after MAE: B's recipe, less drop path; none is published.

Variant :debug.
"""

from configs import base


def get_config(variant: str | None = None):
  return base.finetune('small', variant, drop_path_rate=0.1)
