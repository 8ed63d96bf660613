"""Finetuning of Swin-B at 224 pixels after SimMIM at 192 (arXiv 2111.09886).

By default after 800 epochs of SimMIM. Variants: :100 after 100 epochs, :800, :debug. The published
run at 192 pixels is :100 with --config.image_size=192 --config.model.window_size=6.
"""

from hivit_jax.configs import recipes


def get_config(variant: str | None = None):
  return recipes.finetune_simmim('swin_base', variant)
