"""The model card: what a model is, how it was trained, what it reached."""

import json
import os
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

from hivit_jax.interop import infer
from hivit_jax.interop.files import StateDict
from hivit_jax.interop.infer import Described
from hivit_jax.reporting.metrics import rows_in
from hivit_jax.train import places

ADDRESS = 'OWNER/NAME'  # of the repository, in a card that is not there yet

# Kind of a model -> what it is, and the Hub's word for its use.
_KINDS = {
  'classifier': ('Classifier of {} classes', 'image-classification'),
  'segmenter': ('Segmenter of {} classes', 'image-segmentation'),
  'detector': ('Detector of {} classes', 'object-detection'),
  'mae': ('Masked autoencoder', 'image-feature-extraction'),
  'simmim': ('Masked autoencoder', 'image-feature-extraction'),
  'backbone': ('Encoder', 'image-feature-extraction'),
}
_PACKAGES = ('hivit-jax', 'jax', 'jaxlib', 'flax', 'optax', 'numpy')


def text(
  state: StateDict, described: Described, config: Mapping[str, Any], path: str | os.PathLike | None
) -> str:
  """Markdown, with the header that the Hub reads.

  Args:
    state: the weights; its metadata is that of a checkpoint if they come from a run.
    described: the model.
    config: what `config.json` has, see `pretrained`.
    path: of the weights; None: they are from memory. If it is a workdir, its `best`, or one of its
      checkpoints, the card tells the run's metrics, command and versions.
  """
  run = None if path is None or 'step' not in state.metadata else _workdir(path)
  what, use = _KINDS[infer.family(state.arrays)]
  size = 'x'.join(map(str, described.arguments['image_size']))
  count = sum(value.size for value in state.arrays.values())
  lines = [
    '---',
    f'library_name: {"hivit_jax" if config["architecture"] == described.name else "timm"}',
    f'pipeline_tag: {use}',
    'tags:',
    '- hivit_jax',
    '---',
    f'# {described.name}',
    '',
    f'{what.format(config["num_classes"])} for images of {size} pixels, {count:,} parameters.',
    '',
    '```python',
    'import hivit_jax',
    '',
    f"model = hivit_jax.create_model('hf-hub:{ADDRESS}')",
    '```',
    '',
    *_images(config['pretrained_cfg'], infer.pixels(state.metadata).get('dtype', 'uint8')),
    *_training(state.metadata),
    *(_records(run, state.metadata['step']) if run else ()),
  ]
  return '\n'.join(lines) + '\n'


def _images(config: Mapping[str, Any], dtype: str) -> Iterator[str]:
  mean, std = (', '.join(f'{number:g}' for number in config[key]) for key in ('mean', 'std'))
  crop = ''
  if 'crop_pct' in config:  # not of dense models
    crop = (
      f'; {config["interpolation"]}, the central crop keeps {config["crop_pct"]:g} of the sides'
    )
  pixels = 'floats as they are stored' if dtype == 'float32' else 'pixels in [0, 1]'
  yield f'Images: {pixels}, minus {mean}, divided by {std}{crop}.'


def _training(metadata: Mapping[str, Any]) -> Iterator[str]:
  config = metadata.get('config')
  if not config:
    return
  data = config['data']
  rows = {
    'task': config.get('task'),
    'data': f'{data["name"]}, {data["train_split"]}' if 'train_split' in data else data['name'],
    'initial weights': config.get('init') or 'random',
    'steps': metadata.get('step'),
    'epochs': config.get('epochs'),
    'batch size': config.get('batch_size'),
    'seed': config.get('seed'),
  }
  yield from ('', '## Training', *_table(rows))


def _workdir(path: str | os.PathLike[str]) -> pathlib.Path | None:
  """The workdir of WORKDIR, WORKDIR/best or WORKDIR/checkpoints/STEP."""
  path = pathlib.Path(places.local(path)).expanduser().absolute()
  return next((p for p in (path, *path.parents[:2]) if (p / 'checkpoints').is_dir()), None)


def _records(run: pathlib.Path, step: int) -> Iterator[str]:
  """The metrics of a workdir up to a step, and what it says of its newest start."""
  if metrics := dict(_metrics(run, step)):
    yield from ('', '## Evaluation', *_table(metrics))
  try:
    started = json.loads((run / 'config.json').read_bytes())['runs'][-1]
  except (OSError, ValueError, KeyError, IndexError):  # a conversion, or a checkpoint alone
    return
  versions = started['versions']
  git = started.get('git') or {}
  rows = {
    'command': f'`{started["command"]}`',
    'devices': f'{started["devices"]["count"]} x {started["devices"]["kind"]}',
    'versions': ', '.join(f'{p} {versions[p]}' for p in _PACKAGES if versions.get(p)),
    'Python': started['python'],
    'commit': git.get('commit'),
  }
  yield from ('', '## Run', *_table(rows))


def _metrics(run: pathlib.Path, step: int) -> Iterator[tuple[str, str]]:
  """The last value of each metric of an evaluation, with its step."""
  path = run / 'metrics.jsonl'
  for row in rows_in(path.read_bytes()) if path.is_file() else ():
    if row['step'] <= step:
      for key, value in row.items():
        if key.startswith('eval') and isinstance(value, int | float):
          yield key, f'{value:.4g} (step {row["step"]})'


def _table(rows: Mapping[str, Any]) -> Iterator[str]:
  yield from ('', '| | |', '|---|---|')
  for key, value in rows.items():
    if value is not None:
      yield f'| {key} | {str(value).replace("|", chr(92) + "|")} |'
