"""Evaluation of any checkpoint or weight file; what model it is, is told from the weights.

  python main.py --config=configs/evaluate.py --mode=evaluate --config.init=hivit_base.pth

Variants: :knn for the k-NN accuracy alone, which autoencoders have too; :debug.
"""

from configs import base


def get_config(variant: str | None = None):
  config = base.classify('base')
  if variant != 'debug':
    config.model.name = None
  if variant == 'knn':
    config.evaluation.every_epochs = 0.0
    config.knn.every_epochs = 1.0
    return config
  return base.debug_or(config, variant)
