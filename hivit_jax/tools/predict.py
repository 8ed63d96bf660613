"""Predicts the classes of images, the classes of their pixels, or the objects in them.

  python -m hivit_jax.tools.predict (--workdir=WORKDIR | --weights=FILE) IMAGES... [--json]
      [--top=5] [--save=PICTURE.png | FOLDER] [--labels=names.txt] [--ema]

A segmenter prints the largest classes, and --save is a folder: of NAME.jpg it gets NAME.png with
the classes themselves, NAME_colour.png, NAME_overlay.png, and legend.png for all. A detector prints
the best objects, with --json all of them with boxes (left, top, width, height) and masks as run
lengths; of NAME.jpg its folder gets NAME_objects.png, with the objects whose score is at least 0.3.

IMAGES are files, or folders of them. Those that cannot be read are reported and skipped, and the
exit status is 2.
"""

import itertools
import json
import pathlib
import shlex
import sys
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from absl import flags
from flax import nnx

from hivit_jax import cli
from hivit_jax.data import transforms
from hivit_jax.errors import UserError
from hivit_jax.interop import carried, files, infer
from hivit_jax.reporting.console import setup_logging
from hivit_jax.runtime import compilation_cache
from hivit_jax.tasks.images import as_bytes, normalize
from hivit_jax.tools import contact_sheet, image_flags, loaded, predict_objects, predict_pixels
from hivit_jax.train import weights

flags.adopt_module_key_flags(image_flags)
_TOP = flags.DEFINE_integer('top', 5, 'Classes or objects shown per image.', lower_bound=1)
_LABELS = flags.DEFINE_string('labels', None, 'File with the class names, one per line.')
_JSON = flags.DEFINE_bool('json', False, 'Print one JSON object per image.')
_SAVE = flags.DEFINE_string('save', None, 'Picture to write; a folder for a segmenter or detector.')

_DENSE: dict[str, Any] = {'segmenter': predict_pixels, 'detector': predict_objects}
_BATCH_SIZE = 32
_RECIPES = ('hivit', 'vit', 'swin')  # that configs/ has to finetune


def main(argv: list[str]) -> None:
  source = image_flags.checked(argv)
  setup_logging()
  compilation_cache.turn_on()
  paths = loaded.image_paths(argv[1:])
  state = weights.read(source, ema=image_flags.EMA.value)
  described = carried.model_of(state)
  if infer.family(state.arrays) in _DENSE:
    failed = _dense(paths, state, described)
    if failed:
      raise UserError(f'{len(failed)} of {len(paths)} images could not be read')
    return
  if infer.family(state.arrays) != 'classifier':
    base = infer.architecture(state.arrays)
    config = f'--config=configs/finetune_{base}_b.py' if base in _RECIPES else '--config=...'
    raise UserError(
      f'{state.source} is {described.name}, which has no classifier. Finetune it first: '
      f'python main.py {config} --config.init={shlex.quote(str(source))}'
    )
  labels = _labels(state, len(state.arrays['head.weight']))
  predict = _predictor(state, described, batch_size=min(_BATCH_SIZE, len(paths)))
  failed: list[str] = []
  known = infer.pixels(state.metadata)
  crop, dtype = known.get('eval_crop'), known.get('dtype', 'uint8')
  arguments = described.arguments
  transform = transforms.eval_transform(
    arguments['image_size'], crop, channels=arguments['channels'], dtype=dtype
  )
  images = loaded.read(paths, lambda data: transform({'image': data})['image'], failed)
  shown: list[contact_sheet.Predicted] = []
  while batch := list(itertools.islice(images, _BATCH_SIZE)):
    for (path, image), row in zip(batch, predict([image for _, image in batch]), strict=True):
      best = np.argsort(-row, kind='stable')[: _TOP.value]
      predictions = [
        {'label': labels[i], 'index': int(i), 'probability': float(row[i])} for i in best
      ]
      print(_to_json(path, predictions) if _JSON.value else _to_text(path, predictions))
      if _SAVE.value:
        classes = [(p['label'], p['probability']) for p in predictions]
        pixels = as_bytes(image, _shown(state))
        shown.append(contact_sheet.Predicted(path, pixels, classes))
  if _SAVE.value and shown:
    sheet = contact_sheet.draw(shown)
    with cli.writing('save', _SAVE.value):
      sheet.save(_SAVE.value)
    print(f'wrote {_SAVE.value}', file=sys.stderr)  # stdout has the predictions
  if failed:
    raise UserError(f'{len(failed)} of {len(paths)} images could not be read')


def _labels(
  state: files.StateDict, count: int, unknown: Callable[[int], Sequence[str]] | None = None
) -> Sequence[str]:
  """The name of every class; where no names are known, its index or what `unknown` says."""
  if _LABELS.value is None:
    names = state.metadata.get('class_names') or ()
    if len(names) == count:
      return names
    return unknown(count) if unknown else [str(i) for i in range(count)]
  try:
    names = pathlib.Path(_LABELS.value).read_text('utf-8').rstrip().splitlines()
  except (OSError, UnicodeDecodeError) as error:
    reason = getattr(error, 'strerror', None) or 'not UTF-8 text'
    raise UserError(f'cannot read --labels={_LABELS.value}: {reason}') from error
  if len(names) != count:
    raise UserError(f'--labels={_LABELS.value} has {len(names)} lines for {count} classes')
  return names


def _predictor(
  state: files.StateDict, described: infer.Described, *, batch_size: int
) -> Callable[[Sequence[np.ndarray]], np.ndarray]:
  """Returns a function from up to `batch_size` images to (B, classes) probabilities."""
  statistics = carried.statistics(state, described)
  graphdef, params = nnx.split(loaded.model(state, described))

  @jax.jit
  def probabilities(params, images):
    return jax.nn.softmax(nnx.merge(graphdef, params)(normalize(images, **statistics)))

  def predict(images):
    batch = np.zeros((batch_size, *images[0].shape), images[0].dtype)  # of one size: compiled once
    batch[: len(images)] = images
    return np.asarray(probabilities(params, batch))[: len(images)]

  return predict


def _dense(paths: list[str], state: files.StateDict, described: infer.Described) -> list[str]:
  """What a segmenter or detector says; the images that could not be read."""
  tool = _DENSE[infer.family(state.arrays)]
  if _SAVE.value is not None:
    loaded.check_pictures(paths, pathlib.Path(_SAVE.value), tool.pictures)
  model: Any = loaded.model(state, described)
  task = tool.task_of(state.metadata, model, **carried.statistics(state, described))
  labels = _labels(state, model.num_classes, getattr(tool, 'known_names', None))
  options = {'shown': _shown(state)} if tool is predict_pixels else {}
  return tool.predict(
    paths, model, task, labels, top=_TOP.value, as_json=_JSON.value, folder=_SAVE.value, **options
  )


def _shown(state: files.StateDict) -> Sequence[int] | None:
  """The channels that a run chose for its pictures."""
  return state.metadata.get('config', {}).get('pictures', {}).get('channels')


def _to_text(path: str, predictions: Sequence[dict[str, Any]]) -> str:
  return '\n'.join(
    [path, *(f'  {100 * p["probability"]:5.1f} %  {p["label"]}' for p in predictions)]
  )


def _to_json(path: str, predictions: Sequence[dict[str, Any]]) -> str:
  return json.dumps({'file': path, 'predictions': predictions})


if __name__ == '__main__':
  cli.run(main)
