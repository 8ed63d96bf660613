"""ViT-B with UPerNet on ADE20K after MAE (arXiv 2111.06377); variant :debug.

A baseline for HiViT. The numbers follow mmsegmentation's config for MAE, and no test compares them.
This model lacks the relative position bias and LayerScale of theirs: do not expect its results.
"""

from hivit_jax.configs import recipes, variants


def get_config(variant: str | None = None):
  config = recipes.segment('vit_base', '512')
  config.init = 'workdirs/mae_vit_b'
  config.model.head_channels = 768
  config.optim.update(lr=1e-4, warmup_start_lr=1e-10, layer_decay=0.65)
  return variants.with_variant(config, variant)
