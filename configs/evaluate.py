"""Evaluation of any checkpoint or weight file; what model it is, is told from the weights.

  python main.py --config=configs/evaluate.py --mode=evaluate --config.init=hivit_base.pth

Variants: :knn for the k-NN accuracy alone, which autoencoders have too; :debug.
"""

from configs import base


def get_config(variant: str | None = None):
  config = base.classify('base')
  if variant == 'debug':
    return base.debug(config)
  config.model.name = None
  if variant == 'knn':
    config.evaluation.every_epochs = 0.0
    config.knn.every_epochs = 1.0
  elif variant:
    raise base.UserError(f'unknown variant ":{variant}"; known: knn, debug')
  return config
