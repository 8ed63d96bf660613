"""Which checkpoints a directory has, and what their records say.

Of Orbax's files only its custom metadata are read, which are JSON; see `checkpoint` for the layout.
"""

import collections
import json
import logging
import os
import pathlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax

from hivit_jax.errors import UserError, flag
from hivit_jax.train import integrity

_log = logging.getLogger(__name__)

FORMAT = 2
_READABLE = (1, FORMAT)  # 1: the optimizer's moments of biases and scales were one array
FILE = '_CHECKPOINT_METADATA'  # documented in Orbax's checkpoint format guide
_SHOWN_DIFFERENCES = 3

KeyPath = tuple[str | int, ...]


class Misfit(UserError):
  """A checkpoint is of another model or optimizer."""


class Leaf(NamedTuple):
  dtype: str
  shape: tuple[int, ...]

  def __str__(self) -> str:
    return f'{self.dtype} {self.shape}'


class Best(NamedTuple):
  """The best checkpoint of a run so far.

  Attributes:
    of: metric and direction that decide, such as 'eval/top1:max'.
    value: of the metric; finite.
    step: where it was measured.
  """

  of: str
  value: float
  step: int


class Record(NamedTuple):
  """What a checkpoint says of itself.

  Attributes:
    leaves: of the state, by path.
    metadata: what was given to `Checkpoints.save`.
    format: of the state.
    best: of the run when this checkpoint was saved, which may be this one; None: nothing is kept
      for being the best.
  """

  leaves: dict[KeyPath, Leaf]
  metadata: dict[str, Any]
  format: int = FORMAT
  best: Best | None = None


def steps(directory: pathlib.Path) -> list[int]:
  """The steps that have a complete checkpoint, ascending."""
  if not directory.is_dir():
    return []
  return sorted(int(p.name) for p in directory.iterdir() if p.name.isdecimal() and p.is_dir())


def locate(path: str | os.PathLike[str], step: int | None) -> tuple[pathlib.Path, int | None]:
  """Finds the directory of the checkpoints, and the step if the path names one."""
  path = pathlib.Path(path).absolute()
  if names_best(path):
    return path.parent / 'checkpoints', _best_step(path)
  if (path / 'checkpoints').is_dir():
    return path / 'checkpoints', step
  if path.name.isdecimal() and step is None and (path / 'state').is_dir():
    return path.parent, int(path.name)
  if not path.is_dir():
    what = 'is not a directory' if path.exists() else 'does not exist'
    raise UserError(f'{path} {what}; give the --workdir of a training run')
  return path, step


def names_best(path: str | os.PathLike[str]) -> bool:
  """Whether a path is `WORKDIR/best`, which is no file but what the newest checkpoint tells."""
  path = pathlib.Path(path).absolute()
  return path.name == 'best' and not path.exists() and (path.parent / 'checkpoints').is_dir()


def _best_step(path: pathlib.Path) -> int:
  directory = path.parent / 'checkpoints'
  best = newest_usable(directory, None, read_record)[1].best
  if best is None:
    raise UserError(
      f'{path}: this run keeps no best checkpoint, which '
      f'{flag("checkpoint.keep_best", "eval/top1:max")} does; its newest is {path.parent}'
    )
  if best.step not in steps(directory):
    raise UserError(
      f'{path}: the best by {best.of} was {directory / str(best.step)}, which is gone; '
      f'the newest is {path.parent}'
    )
  return best.step


def newest_usable(
  directory: pathlib.Path, step: int | None, read: Callable[[pathlib.Path], Record]
) -> tuple[int, Record, list[int]]:
  """Calls `read` on the checkpoints, newest first, until one is not damaged.

  Returns:
    The step, its record, and the damaged steps that were passed over.
  """
  there = steps(directory)
  if step is not None and step not in there:
    raise UserError(f'{directory} has no checkpoint of step {step}; it has {there or "none"}')
  if not there:
    raise UserError(f'there is no checkpoint in {directory}; give the --workdir of a training run')
  damaged: dict[int, str] = {}
  for candidate in reversed(there) if step is None else [step]:
    path = directory / str(candidate)
    try:
      record = read(path)
    except integrity.Damaged as error:
      damaged[candidate] = str(error)
      _log.warning('DAMAGED checkpoint at step %d, %s: %s', candidate, path, error)
      continue
    if damaged:
      _log.warning('falling back to the checkpoint of step %d', candidate)
    return candidate, record, list(damaged)
  reasons = '; '.join(f'step {bad}: {reason}' for bad, reason in damaged.items())
  if step is None:
    way_out = f'to start over, remove them: rm -r {directory}'
  else:
    way_out = f'other checkpoints there: {[s for s in there if s != step] or "none"}'
  raise UserError(f'no usable checkpoint in {directory} ({reasons}); {way_out}')


def flatten(tree: Any) -> tuple[dict[KeyPath, Any], Any]:
  """The leaves of a tree by path, in the tree's order, and its structure."""
  flat, treedef = jax.tree_util.tree_flatten_with_path(tree)
  leaves = {tuple(_key(entry) for entry in path): leaf for path, leaf in flat}
  names = collections.Counter('.'.join(map(str, path)) for path in leaves)  # Orbax's names
  twice = [name for name, count in names.items() if count > 1 or not name]
  if twice or not leaves:
    raise ValueError(f'the state needs leaves with distinct, non-empty names, got {twice}')
  return leaves, treedef


def _key(entry: Any) -> str | int:
  for attribute in ('key', 'idx', 'name'):  # of a dict, a sequence, a namedtuple
    if hasattr(entry, attribute):
      key = getattr(entry, attribute)
      return key if isinstance(key, int) else str(key)
  raise TypeError(f'cannot name the tree entry {entry!r}')


def nest(leaves: Mapping[Any, Any]) -> dict[Any, Any]:
  """The tree of leaves by path, inverse of `flatten` for dicts."""
  root: dict[Any, Any] = {}
  for path, leaf in leaves.items():
    node = root
    for key in path[:-1]:
      node = node.setdefault(key, {})
    node[path[-1]] = leaf
  return root


def _name(path: KeyPath) -> str:
  return '/'.join(map(str, path))


def make_record(
  leaves: Mapping[KeyPath, Any], metadata: Mapping[str, Any], best: Best | None = None
) -> dict[str, Any]:
  """What `read_record` reads, as JSON has it; raises what is wrong with a leaf or with metadata."""
  for path, leaf in leaves.items():
    if not isinstance(leaf, jax.Array):
      raise TypeError(f'{_name(path)}: expected a jax.Array, got {type(leaf).__name__}')
    if leaf.size == 0:
      raise ValueError(f'{_name(path)}: Orbax cannot store an array without elements, {leaf.shape}')
  record = {
    'format': FORMAT,
    'metadata': dict(metadata),
    'best': best and best._asdict(),
    'leaves': [[list(path), leaf.dtype.name, list(leaf.shape)] for path, leaf in leaves.items()],
  }
  return json.loads(json.dumps(record, allow_nan=False))  # complains here, not in the background


def read_record(path: pathlib.Path) -> Record:
  """Reads and verifies what `make_record` made; the file is JSON, so this needs no Orbax."""
  return parsed(path, content(path))


def content(path: pathlib.Path) -> dict[str, Any]:
  """The verified record of a checkpoint, as JSON has it."""
  integrity.verify(path, [FILE])
  return json.loads((path / FILE).read_bytes())['custom_metadata']


def parsed(path: pathlib.Path, record: Mapping[str, Any]) -> Record:
  """What `content` returns, as a Record; UserError if a later version wrote it."""
  if record['format'] not in _READABLE:
    raise UserError(
      f'{path} has checkpoint format {record["format"]}, and this version of hivit_jax reads up to '
      f'{FORMAT}; use the version that wrote it'
    )
  leaves = {tuple(name): Leaf(dtype, tuple(shape)) for name, dtype, shape in record['leaves']}
  best = record.get('best')  # older ones have none
  return Record(leaves, record['metadata'], record['format'], best and Best(**best))


def read_verified(path: pathlib.Path) -> Record:
  """Like `read_record`, after verifying every file of the checkpoint."""
  integrity.verify(path, None)
  return read_record(path)


def check_continuable(path: pathlib.Path, record: Record) -> None:
  """Raises UserError if the optimizer's numbers are laid out as in an earlier version."""
  if record.format != FORMAT:
    raise UserError(
      f'{path} is from an earlier version of hivit_jax (format {record.format}, now {FORMAT}), and '
      'training cannot continue from it. Its weights can still be used: start a new run with '
      f'{flag("init", path)} and another --workdir; or finish this run with the version that '
      'began it'
    )


def check_fit(
  path: pathlib.Path, recorded: Mapping[KeyPath, Leaf], wanted: Mapping[KeyPath, Any]
) -> None:
  """Raises Misfit unless both have the same leaves: nothing is cast, padded or left out."""
  differences = []
  for name in [*wanted, *(name for name in recorded if name not in wanted)]:
    there = str(recorded.get(name, 'missing'))
    leaf = wanted.get(name)
    here = 'missing' if leaf is None else str(Leaf(leaf.dtype.name, tuple(leaf.shape)))
    if here != there:
      differences.append(f'{_name(name)} is {there} in the checkpoint, {here} in the model')
  if differences:
    shown = '; '.join(differences[:_SHOWN_DIFFERENCES])
    more = len(differences) - _SHOWN_DIFFERENCES
    raise Misfit(
      f'the checkpoint {path} does not fit this model and optimizer: {shown}'
      f'{f"; and {more} more" if more > 0 else ""}. '
      'Use the config that wrote it (config.json in its workdir), or another --workdir'
    )
