"""Linear probe of a pretrained HiViT-B: MAE's recipe (arXiv 2111.06377); variant :debug."""

from configs import base


def get_config(variant: str | None = None):
  config = base.get_config()
  config.task = 'linear'
  config.init = 'workdirs/mae_hivit_b'
  config.model.update(name='hivit_base', head_std=0.01, head_batch_norm=True)
  config.epochs = 90.0
  config.batch_size = 16384
  config.augment.update(crop_scale=(0.08, 1.0), crop_clamp=True)
  config.optim.update(name='lars', base_lr=0.1, weight_decay=0.0, warmup_epochs=10.0)
  config.checkpoint.keep_every_epochs = 0.0
  config.knn.every_epochs = 0.0
  return base.debug_or(config, variant)
