"""The toy segmentation as a config: the only other file that it needs."""

from configs import base


def get_config():
  config = base.get_config()
  config.task = 'tests.own.dense:DenseTask'
  config.model.update(name='tests.own.dense:DenseModel', num_classes=3)
  config.evaluators = 'tests.own.dense:brightness_of_set'
  config.data.update(
    name='tests.own.dense:Brightness', train_split='train[:64]', eval_split='test[:35]'
  )
  config.image_size = (32, 32)
  config.batch_size = 16
  config.max_steps = 8
  config.optim.update(lr=0.02, warmup_epochs=0.0, weight_decay=0.0)
  config.ema_decay = 0.5
  config.log_every_steps = 1
  config.evaluation.update(every_epochs=1.0, batch_size=16)
  config.checkpoint.keep_every_epochs = 0.0
  return config
