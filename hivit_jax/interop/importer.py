"""State dicts into models: what fits, what is resized, and what is wrong when it does not fit."""

import dataclasses
import logging
import math
import re
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx

from hivit_jax.errors import UserError
from hivit_jax.interop import files, infer, mismatch, torch_names
from hivit_jax.interop.files import StateDict
from hivit_jax.models import positions, resize
from hivit_jax.models.classifier import Classifier

_log = logging.getLogger(__name__)

Path = torch_names.Path
Grid = tuple[int, int]
_UNIT = 16  # pixels

# Of classes, which another data set has others of.
_CLASSIFIERS = re.compile(r'((.*_)?head\.(conv_seg\.)?|.*\.(fc_cls|fc_reg|conv_logits)\.)\w+')

# What other code's files have and no model here needs: (names, condition, reason).
_IGNORED = (
  (r'(.*\.bn|head_norm)\.num_batches_tracked', None, 'a counter'),
  (r'(.*\.)?(relative_position_index|attn_mask)', None, 'a constant, computed when needed'),
  (
    r'(align_dim_\w+|fpn_modules|split_\d+to\d+|block_\d+to\d+)\..*',
    None,
    "the feature pyramid of iTPN's pretraining",
  ),
  (
    r'norm\.(weight|bias)',
    lambda shapes: shapes['decoder_embed.weight'][1] == shapes['absolute_pos_embed'][2],
    'the official MAE without hifeat never applies it',
  ),
)
_TABLE = 'relative_position_bias_table'


@dataclasses.dataclass
class LoadReport:
  """What `load_weights` did, by the PyTorch names.

  Attributes:
    source: where the weights came from.
    loaded: names taken.
    resized: names among them that were resized to the model's image size, with how.
    ignored: names that no model needs, with why.
    dropped: names that this model has no place for (partial loads only).
    new: names that keep the model's initialisation (partial loads only).
    zeroed: names among them that were set to zero, so that the encoder computes what it did.
    redrawn: names that keep the model's initialisation although the file has them, with why.
  """

  source: str
  loaded: list[str] = dataclasses.field(default_factory=list)
  resized: dict[str, str] = dataclasses.field(default_factory=dict)
  ignored: dict[str, str] = dataclasses.field(default_factory=dict)
  dropped: list[str] = dataclasses.field(default_factory=list)
  new: list[str] = dataclasses.field(default_factory=list)
  zeroed: list[str] = dataclasses.field(default_factory=list)
  redrawn: dict[str, str] = dataclasses.field(default_factory=dict)

  def __str__(self) -> str:
    lines = [f'loaded {len(self.loaded)} parameters from {self.source}']
    sizes: dict[str, list[str]] = {}
    for name, how in self.resized.items():
      sizes.setdefault(f'{name.split(".")[-1]} {how}', []).append(name)
    lines += [f'  resized {what} ({len(names)})' for what, names in sizes.items()]
    if self.dropped:
      lines.append(f'  dropped, no place in this model: {", ".join(self.dropped)}')
    for reason in dict.fromkeys(self.redrawn.values()):
      names = [name for name, why in self.redrawn.items() if why == reason]
      lines.append(f'  drawn anew, not taken from the file: {", ".join(names)} ({reason})')
    if self.new:
      lines.append(f'  new, not in the file: {", ".join(self.new)}')
    if self.zeroed:
      lines.append(
        f'  of these at zero, so that the encoder is unchanged: {len(self.zeroed)} tables'
      )
    return '\n'.join(lines)


def load_into(
  model: nnx.Module,
  state: StateDict,
  *,
  partial: bool = False,
  image_size: tuple[int, int] | None = None,
  redraw: Mapping[str, str] = MappingProxyType({}),
) -> LoadReport:
  """Puts a state dict into a model, in place; warns of NaN and infinite numbers.

  Args:
    model: from `create_model`, or its `nnx.eval_shape` when nothing stays new.
    state: the weights.
    partial: allow names that only one side has, outside the encoder.
    image_size: (height, width) of the weights, where it was not square and nothing else tells it.
    redraw: names that keep the model's initialisation, with why.

  Raises:
    UserError: missing, unused or mis-shaped names, all with the likely cause.
  """
  values, report = fit(model, state, partial=partial, image_size=image_size, redraw=redraw)
  if bad := files.not_finite({'.'.join(path): value for path, value in values.items()}):
    _log.warning(
      '%s: %d parameters hold NaN or infinite numbers, the first is %s, and so will the model',
      state.source, len(bad), bad[0],
    )  # fmt: skip
  params = nnx.state(model)
  flat = torch_names.flatten(nnx.to_pure_dict(params))
  # A copy: JAX would share the memory, which may be that of the file.
  new: dict[Path, Any] = {
    path: jnp.array(values.pop(path)) if path in values else flat[path] for path in flat
  }
  nnx.replace_by_pure_dict(params, torch_names.unflatten(new))
  nnx.update(model, params)
  _log.info('%s', report)
  return report


def fit(
  model: nnx.Module,
  state: StateDict,
  *,
  partial: bool = False,
  image_size: tuple[int, int] | None = None,
  redraw: Mapping[str, str] = MappingProxyType({}),
) -> tuple[dict[Path, np.ndarray], LoadReport]:
  """The values for a model's parameters, in its layout; arguments as for `load_into`."""
  leaves = torch_names.flatten(nnx.to_pure_dict(nnx.state(model)))
  # As `files.normal_names` has them; encoders of SimMIM, segmenters, detectors are parts of these.
  wanted = {
    re.sub('^(encoder|backbone)[.]', '', _torch_name(path, leaf)): (path, leaf)
    for path, leaf in leaves.items()
  }
  mismatch.check_decoder(wanted, state, partial)
  mismatch.check_heads(model, state)
  arrays = dict(state.arrays)
  report = LoadReport(state.source)
  report.ignored = _ignored(arrays, wanted)
  for name in report.ignored:
    del arrays[name]
  sizes = _Sizes(model, state, image_size)
  values: dict[Path, np.ndarray] = {}
  misshaped: list[str] = []
  for name, (path, leaf) in wanted.items():
    if name not in arrays:
      report.new.append(name)
      continue
    if name in redraw:
      del arrays[name]
      report.redrawn[name] = redraw[name]
      continue
    value, how = sizes.resized(name, arrays.pop(name), leaf)
    if how:
      report.resized[name] = how
    value = torch_names.from_torch(path, value) if value.ndim in (2, 4) else value
    if value.shape != leaf.shape:
      if partial and _CLASSIFIERS.fullmatch(name):
        report.new.append(name)
        report.dropped.append(name)
        continue
      misshaped.append(f'{name} is {_shape(path, value)} there, {_shape(path, leaf)} here')
      continue
    if value.dtype.kind not in 'fV':  # V: bfloat16
      raise UserError(f'{state.source}: {name} holds {value.dtype}, not floating point numbers')
    values[path] = value.astype(leaf.dtype, copy=False)
    report.loaded.append(name)
  report.dropped += arrays
  unused = [name for name in report.dropped if name not in report.new]
  mismatch.check(model, wanted, state, report.new, unused, misshaped, partial)
  for name in report.new:
    if name.endswith(_TABLE):
      path, leaf = wanted[name]
      values[path] = np.zeros(leaf.shape, leaf.dtype)
      report.zeroed.append(name)
  return values, report


def bias_grid(entries: int, hint: Grid | None = None) -> Grid | None:
  """The grid that a bias table with `entries` rows is for: `hint` or a square, None if neither."""
  if hint is not None and _entries(hint) == entries:
    return hint
  side = math.isqrt(entries)
  if side * side == entries and side % 2:
    return (side + 1) // 2, (side + 1) // 2
  return None


def _entries(grid: Grid) -> int:
  return (2 * grid[0] - 1) * (2 * grid[1] - 1)


def _torch_name(path: Path, leaf: Any) -> str:
  return torch_names.to_torch(path, np.empty((0,) * len(leaf.shape)))[0]


def _shape(path: Path, value: Any) -> tuple[int, ...]:
  """The shape in PyTorch's layout, as both sides' users know it."""
  placeholder = np.lib.stride_tricks.as_strided(np.empty(1), value.shape, (0,) * len(value.shape))
  return torch_names.to_torch(path, placeholder)[1].shape


def _ignored(arrays: Mapping[str, np.ndarray], wanted: Mapping[str, Any]) -> dict[str, str]:
  shapes = {name: value.shape for name, value in arrays.items()}
  result = {}
  for pattern, condition, reason in _IGNORED:
    names = [name for name in arrays if name not in wanted and re.fullmatch(pattern, name)]
    try:
      applies = not names or condition is None or condition(shapes)
    except KeyError:  # the condition is about names that this file does not have
      applies = False
    result |= dict.fromkeys(names if applies else (), reason)
  return result


class _Sizes:
  """Brings position parameters to the model's image size."""

  def __init__(self, model: Any, state: StateDict, image_size: tuple[int, int] | None):
    size = image_size or infer.image_size(state.metadata)
    self._hint = None if size is None else (size[0] // _UNIT, size[1] // _UNIT)
    self._source = state.source
    model = getattr(model, 'backbone', model)
    self._grid: Grid | None = getattr(model, 'grid', None)  # None: Swin, without such embeddings
    self._class_tokens: int = getattr(model, 'class_tokens', 0)
    self._bias_grid: Grid | None = None
    blocks = getattr(model, 'blocks', None)  # other than Swin's, whose windows tables tell
    if blocks and hasattr(blocks[-1], 'attn'):
      self._bias_grid = blocks[-1].attn.grid
    # As the official classifiers at another size. Dense models do as BEiT, and so does SimMIM.
    classifier = isinstance(model, Classifier)
    self._bicubic_tables = classifier and infer.family(state.arrays) != 'simmim'
    embedding = state.arrays.get('absolute_pos_embed')
    self._units = 0 if embedding is None else embedding.shape[1]

  def resized(self, name: str, value: np.ndarray, leaf: Any) -> tuple[np.ndarray, str | None]:
    """Returns the value for the model's image size, and what was done to it."""
    if name in ('absolute_pos_embed', 'pos_embed') and self._grid and value.ndim == 3:
      first, units = np.split(value.astype(np.float32, copy=False), [self._class_tokens], axis=1)
      source = self._source_grid(units.shape[1], self._grid)
      if source == self._grid:
        return value, None
      units = resize.position_embedding(units, source, self._grid)
      how = f'from {_text(source)} to {_text(self._grid)} units, bicubic'
      return np.concatenate([first, units], axis=1), how
    if name == 'decoder_pos_embed' and self._grid and value.shape[1:] != leaf.shape[1:]:
      if value.shape[2] != leaf.shape[2]:
        return value, None
      fixed = np.asarray(positions.sincos_2d(leaf.shape[2], self._grid, self._class_tokens))
      return fixed, f'to {_text(self._grid)} units: computed again, it is fixed'
    if name.endswith(_TABLE) and value.ndim == 2:
      return self._table(value, leaf)
    return value, None

  def _table(self, table: np.ndarray, leaf: Any) -> tuple[np.ndarray, str | None]:
    if self._bias_grid:
      cells, own, source = 'units', self._bias_grid, self._bias_source(len(table), self._bias_grid)
    else:  # windows, which are square
      cells, own, source = 'patches', bias_grid(leaf.shape[0]), bias_grid(len(table))
    if source is None or own is None or source == own:
      return table, None
    table, how = table.astype(np.float32), f'from {_text(source)} to {_text(own)} {cells}'
    if self._bicubic_tables:
      offsets = [(2 * rows - 1, 2 * columns - 1) for rows, columns in (source, own)]
      return resize.position_embedding(table[None], *offsets)[0], f'{how}, bicubic'
    return resize.bias_table(table, source, own), f'{how}, cubic over a geometric sequence'

  def _source_grid(self, units: int, own: Grid) -> Grid:
    if self._hint is not None and self._hint[0] * self._hint[1] == units:
      return self._hint
    side = math.isqrt(units)
    if units == own[0] * own[1] and side * side != units:
      return own
    if side * side != units:
      raise self._unknown(units)
    return side, side

  def _bias_source(self, entries: int, own: Grid) -> Grid:
    grid = bias_grid(entries, self._hint)
    if grid is None and entries == _entries(own):
      return own
    if grid is None:
      raise self._unknown(self._units)
    return grid

  def _unknown(self, units: int) -> UserError:
    return UserError(
      f'{self._source} is for images of {units} units, which is no square: give its size, '
      'image_size=(height, width) or --image_size=HEIGHTxWIDTH'
    )


def _text(grid: Grid) -> str:
  return f'{grid[0]}x{grid[1]}'
