"""Evaluation of any run, checkpoint or weight file.

  python main.py --config=configs/evaluate.py --mode=evaluate --workdir=WORKDIR
  python main.py --config=configs/evaluate.py --mode=evaluate --config.init=hivit_base.pth

A run is evaluated with its own settings: model, image size, data, crop and k-NN settings are its
own, unless a flag such as --config.data.eval_split=... says otherwise. Files exported here bring
model, image size and pixel statistics; of files of other code the model is inferred.

Variants: :knn for the k-NN accuracy alone, which autoencoders have too; :debug.
"""

from hivit_jax.configs import recipes, variants


def get_config(variant: str | None = None):
  config = recipes.classify('hivit_base')
  if variant == 'debug':
    return variants.debug(config)
  config.model.name = None
  if variant == 'knn':
    config.evaluation.every_epochs = 0.0
    config.knn.every_epochs = 1.0
  elif variant:
    raise variants.unknown(variant, 'knn', 'debug')
  return config
