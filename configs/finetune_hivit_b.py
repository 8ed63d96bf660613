"""Finetuning of HiViT-B on ImageNet after MAE (arXiv 2205.14949); variant :debug."""

from configs import base


def get_config(variant: str | None = None):
  return base.finetune('base', variant)
