"""MAE pretraining that a laptop's CPU finishes in minutes, on photographs that need no download."""

from configs import base


def get_config(variant: str | None = None):
  config = base.get_config()
  if variant == 'debug':
    return base.debug(config)
  if variant:
    raise base.UserError(f'unknown variant ":{variant}"; known: debug')
  config.data.update(name='photo_tiles', eval_split='test')
  config.augment.crop_scale = (0.5, 1.0)
  config.image_size = (64, 64)
  config.epochs = 20.0
  config.batch_size = 32
  config.model.name = 'mae_hivit_tiny'
  config.model.update(embed_dim=128, depths=(1, 1, 4), num_heads=4)
  config.model.update(decoder_embed_dim=128, decoder_depth=2, decoder_num_heads=4)
  # Of 16 units, 4 would be left at the usual 0.75. Colour and brightness are part of the target, as
  # they are what a short training learns first and what makes its pictures readable.
  config.model.update(mask_ratio=0.6, norm_pix_loss=False)
  config.optim.update(lr=2e-3, warmup_epochs=1.0)
  config.checkpoint.update(every_epochs=4.0, keep_every_epochs=0.0)
  config.log_every_steps = 40
  config.knn.update(every_epochs=4.0, bank_size=0)
  config.pictures.every_epochs = 4.0
  return config
