"""Writes docs/reference/settings.md and configs.md from the code, the address into the notebooks.

  python -m docs.generate

Run it after a change in configs/ or docs/address.py; tests/test_docs.py and test_notebooks.py fail
while something is stale.
"""

import ast
import functools
import importlib
import io
import json
import pathlib
import re
import tokenize
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import ml_collections

from configs import base
from docs import address
from hivit_jax.settings import dotted

ROOT = pathlib.Path(__file__).parents[1]
PAGES = ROOT / 'docs' / 'reference'
NOTEBOOKS = sorted((ROOT / 'docs' / 'notebooks').glob('*.ipynb'))
_WRITTEN = '<!-- Written by docs/generate.py; do not edit. -->'
_EVALUATION = 'Evaluation'

_SETTINGS = """\
Every setting, its default and its meaning, from [configs/base.py](../../configs/base.py). On the
command line: `--config.optim.lr=1e-3`, `--config.image_size=160,320`, `--config.optim.lr=None`. How
configs are written and combined is in [configs](../guide/configs.md)."""

_CONFIGS = """\
Every file of `configs/`. Variants follow a colon:
`--config=configs/mae_hivit_b.py:1600`; `:debug` makes any of them train two steps of a tiny model.
*Pixels* is the image size, *peak rate* the highest learning rate at the given batch. Below each
table are the settings that differ from the [defaults](settings.md). [Reproducing the
paper](../results/reproduce.md#all-recipes) says where the numbers come from."""


class Setting(NamedTuple):
  """A line of a table: the dotted key, None for a paragraph; its comment."""

  key: str | None
  comment: str


def settings_page() -> str:
  """The page with every setting, its default and its comment in configs/base.py."""
  defaults = dotted(base.get_config())
  parts = ['# Settings', _WRITTEN, _SETTINGS]
  groups: dict[str, list[Setting]] = {'': []}
  group = ''
  for setting in _settings():
    if setting.key is not None:  # a paragraph is part of the group that it is in
      alone = setting.key in defaults and '.' not in setting.key
      group = '' if alone else setting.key.partition('.')[0]
    groups.setdefault(group, []).append(setting)
  for name, settings in groups.items():
    parts.append(f'## {name or "The run"}')
    rows: list[str] = []
    for setting in [*settings, Setting(None, '')]:
      if setting.key in defaults:
        default = _shown(defaults[setting.key])
        rows.append(f'| `{setting.key}` | {default} | {_cell(setting.comment)} |')
        continue
      if rows:
        parts.append('\n'.join(['| setting | default | |', '|---|---|---|', *rows]))
        rows = []
      if setting.comment:
        parts.append(f'{setting.comment[0].upper()}{setting.comment[1:].removesuffix(".")}.')
  return '\n\n'.join(parts) + '\n'


def configs_page(parameters: Callable[[str], int]) -> str:
  """The page with every file of configs/.

  Args:
    parameters: name of a config -> number of parameters of its model.
  """
  parts = ['# Configs', _WRITTEN, _CONFIGS]
  for title, names in _groups().items():
    loaded = {name: load(name) for name in names}
    head = '| config | | variants | model | parameters | pixels | epochs | batch | peak rate |'
    rows = [head, '|---|---|---|---|---:|---|---:|---:|---:|']
    for name, config in loaded.items():
      rows.append(_row(name, config, None if title == _EVALUATION else parameters(name)))
    parts += [f'## {title}', '\n'.join(rows)]
    if title != _EVALUATION:  # trains nothing
      parts += _differences(loaded)
  return '\n\n'.join(parts) + '\n'


def count_parameters(name: str) -> int:
  """The parameters of a config's model, counted without allocating them."""
  import jax
  from flax import nnx

  from hivit_jax.train import assemble

  state = nnx.state(nnx.eval_shape(assemble.model_creator(load(name))))
  return sum(leaf.size for leaf in jax.tree.leaves(state))


def variants(name: str) -> list[str]:
  """The variants that a config's docstring names, except `debug`, which all have."""
  doc = importlib.import_module(f'configs.{name}').__doc__ or ''
  found = re.findall(r'(?:(?<!\S)|\.py):(\w+)', doc)
  return sorted(set(found) - {'debug'}, key=lambda text: (len(text), text))


def _settings() -> Iterator[Setting]:
  """What configs/base.py assigns, in its order.

  A comment belongs to the assignment on its line or, without an empty line between, below it. A
  comment with an empty line below is a paragraph.
  """
  source = (ROOT / 'configs' / 'base.py').read_text()
  lines = source.splitlines()
  comments = {
    token.start[0]: token.string.removeprefix('#').strip()
    for token in tokenize.generate_tokens(io.StringIO(source).readline)
    if token.type == tokenize.COMMENT
  }
  assigned = {}  # by first line: (key, last line)
  for node in ast.walk(ast.parse(source)):
    if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Attribute):
      key = ast.unparse(node.targets[0]).removeprefix('config.')
      assigned[node.lineno] = (key, node.end_lineno or node.lineno)
  above: list[str] = []
  for number, line in enumerate(lines, 1):
    if number in assigned:
      key, last = assigned[number]
      beside = [comments[n] for n in range(number, last + 1) if n in comments]
      yield Setting(key, ' '.join([*above, *beside]))
      above = []
    elif line.strip().startswith('#'):
      above.append(comments[number])
      if not lines[number].strip():
        yield Setting(None, ' '.join(above))
        above = []


def _cell(text: str) -> str:
  return text.replace('|', r'\|')


def _shown(value: Any) -> str:
  if value is None:
    return '`None`'
  if isinstance(value, tuple | list):
    value = ', '.join(f'{part:.4g}' if isinstance(part, float) else str(part) for part in value)
    return f'`{value}`' if value else '`()`'
  return f'`{value}`' if value != '' else "`''`"


@functools.cache
def load(name: str) -> ml_collections.ConfigDict:
  """The config of a file in configs/, without a variant."""
  return importlib.import_module(f'configs.{name}').get_config()


def _groups() -> dict[str, list[str]]:
  """Headings and the configs below them: by the first word of their names."""
  titles = {
    'demo': 'Demo',
    'mae': 'Pretraining',
    'simmim': 'Pretraining',
    'finetune': 'Finetuning',
    'linear': 'Linear probe',
    'supervised': 'Training from scratch',
    'ladder': 'From Swin-B to HiViT-B, step by step',
    'evaluate': _EVALUATION,
  }
  names = sorted(file.stem for file in (ROOT / 'configs').glob('*.py'))
  groups: dict[str, list[str]] = {title: [] for title in titles.values()}
  for name in names:
    if name not in ('base', 'recipes', 'variants', '__init__'):
      groups.setdefault(titles.get(name.partition('_')[0], 'Others'), []).append(name)
  sizes = 'tsbl'  # as the last letter of a name
  for found in groups.values():
    found.sort(key=lambda name: (name[:-1], sizes.find(name[-1]), name))
  return {title: found for title, found in groups.items() if found}


def _row(name: str, config: ml_collections.ConfigDict, parameters: int | None) -> str:
  doc = (importlib.import_module(f'configs.{name}').__doc__ or '').partition('\n')[0]
  what = re.split(r'[;:.] (?:[Vv]ariants?|[Nn]one|B\'s)\b', doc)[0].rstrip('.')
  rate = config.optim.lr or config.optim.base_lr * config.batch_size / 256
  cells = [
    f'[`{name}`](../../configs/{name}.py)',
    what.split(';')[0],
    ' '.join(f'`:{variant}`' for variant in variants(name)),
    f'`{config.model.name}`' if config.model.name else 'of the weights',
    '' if parameters is None else _grouped(parameters),
    'x'.join(map(str, config.image_size)),
  ]
  if parameters is None:
    cells += ['', '', '']
  else:
    length = f'{config.epochs:g}' if config.steps is None else f'{_grouped(config.steps)} steps'
    cells += [length, str(config.batch_size), f'{rate:.3g}']
  return f'| {" | ".join(cells)} |'


def _grouped(number: int) -> str:
  return f'{number:,}'.replace(',', ' ')


def _differences(loaded: dict[str, ml_collections.ConfigDict]) -> list[str]:
  """What a group's configs change: one line for what they have in common, a table for the rest."""
  defaults = dotted(base.get_config())
  order = [setting.key for setting in _settings() if setting.key in defaults]
  flat = {name: dotted(config) for name, config in loaded.items()}
  in_table = {'model.name', 'image_size', 'epochs', 'steps', 'batch_size'}
  changed = [
    key
    for key in order
    if key not in in_table and any(settings[key] != defaults[key] for settings in flat.values())
  ]
  values = {key: [json.dumps(settings[key]) for settings in flat.values()] for key in changed}
  same = [key for key in changed if len(set(values[key])) == 1]
  parts = []
  if same:
    first = next(iter(flat.values()))
    listed = ', '.join(f'`{key}={_given(first[key])}`' for key in same)
    parts.append(f'All of them: {listed}.' if len(flat) > 1 else f'Changed: {listed}.')
  if len(same) < len(changed):
    rows = [
      f'| changed | {" | ".join(f"`{name}`" for name in flat)} |',
      '|---' * (len(flat) + 1) + '|',
    ]
    for key in changed:
      if key not in same:
        cells = (_shown(settings[key]) for settings in flat.values())
        rows.append(f'| `{key}` | {" | ".join(cells)} |')
    parts.append('\n'.join(rows))
  return parts


def _given(value: Any) -> str:
  """A value as the command line takes it."""
  if isinstance(value, tuple | list):
    return ','.join(map(str, value))
  return str(value)


def with_address(notebook: str, repository: str = address.REPOSITORY) -> str:
  """The text of a notebook's file, with the address that its first cell installs from."""
  return re.sub(r"(?<=\"REPOSITORY = ')[^']*(?=')", lambda _: repository, notebook, count=1)


def main() -> None:
  """Writes both pages and, into the notebooks, the address."""
  for file in NOTEBOOKS:
    file.write_text(with_address(file.read_text('utf-8')), 'utf-8')
  PAGES.mkdir(exist_ok=True)
  (PAGES / 'settings.md').write_text(settings_page())
  (PAGES / 'configs.md').write_text(configs_page(count_parameters))


if __name__ == '__main__':
  main()
