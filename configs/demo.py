"""MAE pretraining that a laptop's CPU finishes in minutes, on photographs that need no download."""

from configs import base


def get_config(variant: str | None = None):
  config = base.get_config()
  if variant == 'debug':
    return base.debug(config)
  if variant:
    raise base.UserError(f'unknown variant ":{variant}"; known: debug')
  config.data.update(name='photo_tiles', eval_split='test')
  config.image_size = (64, 64)
  config.epochs = 20.0
  config.batch_size = 128
  config.model.name = 'mae_hivit_tiny'
  config.model.update(embed_dim=128, depths=(1, 1, 4), num_heads=4)
  config.model.update(decoder_embed_dim=96, decoder_depth=2, decoder_num_heads=4)
  config.optim.update(lr=2e-3, warmup_epochs=2.0)
  config.checkpoint.update(every_epochs=5.0, keep_every_epochs=0.0)
  config.log_every_steps = 20
  config.knn.update(every_epochs=5.0, bank_size=0)
  config.pictures.every_epochs = 5.0
  return config
