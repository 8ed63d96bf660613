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
from collections.abc import Sequence
from typing import Any

from absl import flags

from hivit_jax import cli
from hivit_jax.errors import UserError
from hivit_jax.interop import carried, files, infer
from hivit_jax.reporting.console import setup_logging
from hivit_jax.runtime import compilation_cache
from hivit_jax.tasks.images import Display, scaled
from hivit_jax.tools import (
  class_names,
  contact_sheet,
  image_flags,
  loaded,
  predict_objects,
  predict_pixels,
)
from hivit_jax.tools.predict_classes import Classification, Prediction
from hivit_jax.train import weights

flags.adopt_module_key_flags(image_flags)
flags.adopt_module_key_flags(class_names)
_TOP = flags.DEFINE_integer('top', 5, 'Classes or objects shown per image.', lower_bound=1)
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
  labels = class_names.of(state, len(state.arrays['head.weight']), class_names.LABELS.value)
  batch_size = min(_BATCH_SIZE, len(paths))
  statistics = carried.statistics(state, described)
  classify = Classification(loaded.model(state, described), labels, batch_size, **statistics)
  failed: list[str] = []
  transform = loaded.view(state, described)
  images = loaded.read(paths, lambda data: transform({'image': data})['image'], failed)
  shown: list[contact_sheet.Predicted] = []
  while batch := list(itertools.islice(images, _BATCH_SIZE)):
    rows = classify([image for _, image in batch], _TOP.value)
    for (path, image), predictions in zip(batch, rows, strict=True):
      print(_to_json(path, predictions) if _JSON.value else _to_text(path, predictions))
      if _SAVE.value:
        classes = [(p.label, p.probability) for p in predictions]
        pixels = Display.of(image)(scaled(image))
        shown.append(contact_sheet.Predicted(path, pixels, classes))
  if _SAVE.value and shown:
    sheet = contact_sheet.draw(shown)
    with cli.writing('save', _SAVE.value):
      sheet.save(_SAVE.value)
    print(f'wrote {_SAVE.value}', file=sys.stderr)  # stdout has the predictions
  if failed:
    raise UserError(f'{len(failed)} of {len(paths)} images could not be read')


def _dense(paths: list[str], state: files.StateDict, described: infer.Described) -> list[str]:
  """What a segmenter or detector says; the images that could not be read."""
  tool = _DENSE[infer.family(state.arrays)]
  if _SAVE.value is not None:
    loaded.check_pictures(paths, pathlib.Path(_SAVE.value), tool.pictures)
  model: Any = loaded.model(state, described)
  task = tool.task_of(state.metadata, model, **carried.statistics(state, described))
  unknown = getattr(tool, 'known_names', None)
  labels = class_names.of(state, model.num_classes, class_names.LABELS.value, unknown)
  return tool.predict(
    paths, model, task, labels, top=_TOP.value, as_json=_JSON.value, folder=_SAVE.value
  )


def _to_text(path: str, predictions: Sequence[Prediction]) -> str:
  return '\n'.join([path, *(f'  {100 * p.probability:5.1f} %  {p.label}' for p in predictions)])


def _to_json(path: str, predictions: Sequence[Prediction]) -> str:
  return json.dumps({'file': path, 'predictions': [p._asdict() for p in predictions]})


if __name__ == '__main__':
  cli.run(main)
