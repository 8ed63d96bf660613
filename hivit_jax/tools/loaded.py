"""The model that weights are for, and the images to show it: what tools for images share."""

import functools
import itertools
import os
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import ml_collections
from flax import nnx

from hivit_jax import models
from hivit_jax.data.decode import BrokenImage, read_file
from hivit_jax.data.sources import folder
from hivit_jax.interop import carried, files, importer, infer
from hivit_jax.train import assemble

# Of pixels in [0, 1]: what weights without a config were trained with.
_IMAGENET = {'mean': (0.485, 0.456, 0.406), 'std': (0.229, 0.224, 0.225)}


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


def statistics(state: files.StateDict, described: infer.Described) -> dict[str, tuple[float, ...]]:
  """`mean` and `std` of the pixels that the weights were trained with."""
  told = carried.pixels(state, described)
  return {key: tuple(told.get(key, value)) for key, value in _IMAGENET.items()}


def image_paths(named: Sequence[str]) -> list[str]:
  """Files, and those in folders and below them."""
  found = [folder.image_files(path) if os.path.isdir(path) else [path] for path in named]
  return list(itertools.chain.from_iterable(found))


def read(paths: Sequence[str], decode: Any, failed: list[str]) -> Iterator[tuple[str, Any]]:
  """Path and `decode(bytes)` of the images that can be read; others are told and go to `failed`."""
  for path in paths:
    try:
      yield path, decode(read_file(path))
    except BrokenImage as error:
      print(f'cannot read the image {path}: {error}', file=sys.stderr)
      failed.append(path)
