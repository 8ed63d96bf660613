"""Finetuning of Swin-B at 224 pixels after SimMIM at 192 (arXiv 2111.09886); variant :debug."""

from configs import base


def get_config(variant: str | None = None):
  rates = {'base_lr': 6.25e-4, 'warmup_start_lr': 1e-6, 'warmup_epochs': 20.0}
  others = {'layer_decay': 0.8, 'clip_norm': 5.0}
  return base.finetune('base', variant, model='swin', drop_path_rate=0.1, **rates, **others)
