"""The model that weights are for, and the images to show it: what tools for images share."""

import functools
import itertools
import os
import pathlib
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import ml_collections
from flax import nnx

from hivit_jax import models, settings
from hivit_jax.data import transforms
from hivit_jax.data.decode import BrokenImage, read_file
from hivit_jax.data.sources import folder
from hivit_jax.errors import UserError
from hivit_jax.interop import files, importer, infer
from hivit_jax.train import assemble


def model(state: files.StateDict, described: infer.Described) -> nnx.Module:
  """The model with its weights; of a run, computed as its config says."""
  options: dict[str, Any] = {}
  if trained := state.metadata.get('config'):
    config = ml_collections.ConfigDict(trained)
    options = {
      'dtype': assemble.compute_dtype(config),
      'attention': assemble.attention(config),
      'ops': config.model.get('ops', 'fast'),  # older runs have none
    }
  create = functools.partial(models.create_model, described.name, **described.arguments, **options)
  return importer.load_new(create, state)[0]


def view(state: files.StateDict, described: infer.Described) -> transforms.EvalTransform:
  """From an example to what a model of whole images sees of it, as in the evaluation of its run."""
  known, arguments = infer.pixels(state.metadata), described.arguments
  return transforms.eval_transform(
    arguments['image_size'],
    known.get('eval_crop'),
    channels=arguments['channels'],
    dtype=known.get('dtype', 'uint8'),
  )


def check_pictures_can_be_read(state: files.StateDict, described: infer.Described) -> None:
  """UserError unless the model is for RGB or grey bytes, as picture files have them."""
  channels = described.arguments['channels']
  dtype = infer.pixels(state.metadata).get('dtype', 'uint8')
  if not settings.is_picture(channels, dtype):
    raise UserError(
      f'{state.source} is for images of {channels} channels of {dtype}; this tool shows RGB and '
      'grey ones. Features of others in Python: model.features(images)'
    )


def image_paths(named: Sequence[str]) -> list[str]:
  """Files, and those in folders and below them."""
  found = [folder.image_files(path) if os.path.isdir(path) else [path] for path in named]
  return list(itertools.chain.from_iterable(found))


def read(paths: Sequence[str], decode: Any, failed: list[str]) -> Iterator[tuple[str, Any]]:
  """Path and `decode(bytes)` of the images that can be read.

  The others are reported and added to `failed`.
  """
  for path in paths:
    try:
      yield path, decode(read_file(path))
    except UserError as error:
      raise UserError(f'{path}: {error}') from error
    except BrokenImage as error:
      print(f'cannot read the image {path}: {error}', file=sys.stderr)
      failed.append(path)


def check_pictures(
  paths: Sequence[str], directory: pathlib.Path, pictures: Callable[[str], list[str]]
) -> None:
  """UserError where a picture would replace an image, or that of another image."""
  images = {pathlib.Path(path).resolve() for path in paths}
  image_of = {'legend.png': 'the legend'}
  for path in paths:
    for name in pictures(path):
      if (directory / name).resolve() in images:
        raise UserError(
          f'--save={directory}: the picture {name} would overwrite an image; name another folder'
        )
      other = image_of.setdefault(name, path)
      if other != path:
        raise UserError(
          f'--save={directory}: {other} and {path} would both be {name}; run them one at a time, '
          'with two folders'
        )
