"""Swin-B with UPerNet on ADE20K (arXiv 2103.14030); variant :debug.

A baseline for HiViT. The numbers follow mmsegmentation's config, and no test compares them. Windows
have 8 patches instead of 7, so that they divide all maps: do not expect the published results.
"""

from hivit_jax.configs import recipes, variants


def get_config(variant: str | None = None):
  config = recipes.segment('swin_base', '512')
  config.init = 'workdirs/supervised_swin_b'
  config.model.update(drop_path_rate=0.3, head_channels=512, window_size=8)
  config.optim.update(lr=6e-5, warmup_start_lr=6e-11, layer_decay=None, weight_decay=0.01)
  return variants.with_variant(config, variant)
