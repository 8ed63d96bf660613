"""Draws the reconstructions of a masked autoencoder.

  python -m hivit_jax.tools.reconstruct --workdir=WORKDIR [--images=a.jpg,b.png] [--mask_ratio=0.6]

Without --images it takes evaluation images of the run's data set.
"""

import os
import pathlib
from typing import Any

import ml_collections
import numpy as np
from absl import flags
from flax import nnx

from hivit_jax import cli
from hivit_jax.data.decode import BrokenImage, read_file
from hivit_jax.data.sources.base import open_source
from hivit_jax.data.sources.subset import spread
from hivit_jax.errors import UserError
from hivit_jax.reporting.console import setup_logging
from hivit_jax.runtime import compilation_cache
from hivit_jax.tasks import reconstruction
from hivit_jax.train import assemble, inputs, manifest, places
from hivit_jax.train.checkpoint import load_metadata, load_params

_WORKDIR = flags.DEFINE_string('workdir', None, 'Workdir of a pretraining run, or a checkpoint.')
_IMAGES = flags.DEFINE_list('images', [], 'Image files; none: evaluation images of the run.')
_COUNT = flags.DEFINE_integer('count', 8, 'Number of evaluation images.', lower_bound=1)
_MASK_RATIO = flags.DEFINE_float('mask_ratio', None, 'Share of units removed; default: as trained.')
_SEED = flags.DEFINE_integer('seed', 0, 'Seed of the masks.', lower_bound=0)
_OUT = flags.DEFINE_string(
  'out',
  None,
  'PNG to write; default: reconstruction.png in the workdir; here if that is remote.',
)


def main(argv: list[str]) -> None:
  if _WORKDIR.value is None:
    raise UserError('give --workdir=DIRECTORY, the --workdir of a pretraining run')
  setup_logging()
  compilation_cache.turn_on()
  workdir = os.path.expanduser(_WORKDIR.value)
  files = _IMAGES.value + argv[1:]
  config = ml_collections.ConfigDict(load_metadata(workdir).get('config', {'task': None}))
  if not config.task or 'pictures' not in assemble.task_class(config).measures:
    found = f'trained with config.task="{config.task}"' if config.task else 'converted, not trained'
    raise UserError(f'--workdir={workdir} was {found}; give the --workdir of a pretraining run')
  config.data.dtype = config.data.get('dtype', 'uint8')  # older runs have none
  task: Any = assemble.task(config)
  graphdef, abstract = nnx.split(nnx.eval_shape(assemble.model_creator(config)))
  images = _read(files, config) if files else _evaluation_images(config)
  restored = load_params(workdir, nnx.to_pure_dict(abstract))
  pictures = reconstruction.Reconstructor(
    graphdef,
    mean=task.mean,
    std=task.std,
    mask_ratio=_MASK_RATIO.value,
    channels=config.pictures.get('channels'),
  )
  result = pictures(restored.state, images, seed=_SEED.value)
  out = pathlib.Path(_OUT.value or _run_directory(workdir) / 'reconstruction.png')
  title = f'{config.model.name}, step {restored.step}'
  picture = reconstruction.draw(result, title=title)
  with cli.writing('out', out):
    picture.save(out)
  print(f'wrote {out}')


def _run_directory(workdir: str) -> pathlib.Path:
  """The workdir, also when one of its checkpoints was given: those must stay as they are."""
  if places.is_address(workdir):
    return pathlib.Path()
  path = pathlib.Path(workdir).absolute()
  if (path / 'state').is_dir() or manifest.names_best(path):
    path = path.parent
  is_run = path.name != 'checkpoints' or (path / 'checkpoints').is_dir()
  return path if is_run else path.parent


def _read(files: list[str], config: ml_collections.ConfigDict) -> np.ndarray:
  transform = inputs.eval_transform(config)
  images = []
  for file in files:
    try:
      images.append(transform({'image': read_file(file)})['image'])
    except BrokenImage as error:
      raise UserError(f'cannot read the image {file}: {error}') from error
  return np.stack(images)


def _evaluation_images(config: ml_collections.ConfigDict) -> np.ndarray:
  source = open_source(config.data.name, config.data.eval_split, config.data.data_dir)
  source = spread(source, _COUNT.value)
  transform = inputs.eval_transform(config)
  with inputs.eval_batches(config, source, transform, len(source), alone=True) as batches:
    return next(batches)['image']


if __name__ == '__main__':
  cli.run(main)
