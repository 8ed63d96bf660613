"""State dicts into models: what fits, what is resized, and why something does not fit."""

import logging
import math
import re
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx

from hivit_jax.errors import UserError
from hivit_jax.interop import channels, files, infer, mismatch, shapes, torch_names
from hivit_jax.interop.files import StateDict
from hivit_jax.interop.report import LoadReport
from hivit_jax.models import positions, resize
from hivit_jax.models.classifier import Classifier
from hivit_jax.settings import RGB

_log = logging.getLogger(__name__)

Path = torch_names.Path
Grid = tuple[int, int]
_UNIT = 16  # pixels

# What other code's files have and no model here needs: (names, condition, reason).
_IGNORED = (
  (r'(.*\.)?num_batches_tracked', None, 'a counter'),
  (r'(.*\.)?(relative_position_index|attn_mask)', None, 'a constant, computed when needed'),
  (
    r'(sarfeature\d|hogs\.SAR_Lay\w*)\.weight_\w+',
    None,
    'constants of the target, computed when needed',
  ),
  (
    r'cls_token|search_token|template_\w+_token',
    lambda shapes: 'search_token' in shapes,
    "a tracker's tokens",
  ),
  ('pos_embed_[zx]', None, "a tracker's position embeddings"),
  (mismatch.PYRAMID, None, "the feature pyramid of iTPN's pretraining"),
  (
    r'norm\.(weight|bias)',
    lambda shapes: shapes['decoder_embed.weight'][1] == shapes['absolute_pos_embed'][2],
    'the official MAE without hifeat never applies it',
  ),
)
_TABLE = 'relative_position_bias_table'


def load_new(
  create: Callable[[], nnx.Module], state: StateDict, **options: Any
) -> tuple[nnx.Module, LoadReport]:
  """A model with the parameters of a state dict, drawn anew only where there are none.

  Args:
    create: makes the model, from `create_model`.
    state: the weights.
    **options: see `load_into`.
  """
  model = nnx.eval_shape(create)
  values, report = fit(model, state, **options)
  if len(values) < len(torch_names.flatten(nnx.to_pure_dict(nnx.state(model)))):
    model = create()
  return model, _put(model, state, values, report)


def load_into(
  model: nnx.Module,
  state: StateDict,
  *,
  partial: bool = False,
  image_size: tuple[int, int] | None = None,
  redraw: Mapping[str, str] = MappingProxyType({}),
  init_channels: str = 'repeat',
) -> LoadReport:
  """Puts a state dict into a model, in place; warns of NaN and infinite numbers.

  Args:
    model: from `create_model`.
    state: the weights.
    partial: allow names that only one side has, outside the encoder. An encoder alone needs no
      permission: whatever is missing beside it is new.
    image_size: (height, width) of the weights, where it was not square and nothing else tells it.
    redraw: names that keep the model's initialisation, with why.
    init_channels: how weights for RGB images are converted for other channels, see `channels`.

  Raises:
    UserError: missing, unused or mis-shaped names, all with the likely cause.
  """
  values, report = fit(
    model,
    state,
    partial=partial,
    image_size=image_size,
    redraw=redraw,
    init_channels=init_channels,
  )
  return _put(model, state, values, report)


def _put(
  model: nnx.Module, state: StateDict, values: dict[Path, np.ndarray], report: LoadReport
) -> LoadReport:
  if bad := files.not_finite({'.'.join(path): value for path, value in values.items()}):
    _log.warning(
      '%s: %d parameters hold NaN or infinite numbers, and so will the model; the first is %s',
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
  init_channels: str = 'repeat',
) -> tuple[dict[Path, np.ndarray], LoadReport]:
  """The values for a model's parameters, in its layout; arguments as for `load_into`."""
  leaves = torch_names.flatten(nnx.to_pure_dict(nnx.state(model)))
  # As `files.normal_names` has them; encoders of SimMIM, segmenters, detectors are parts of these.
  wanted = {
    re.sub('^(encoder|backbone)[.]', '', _torch_name(path, leaf)): (path, leaf)
    for path, leaf in leaves.items()
  }
  mismatch.check_decoder(model, wanted, state, partial)
  mismatch.check_heads(model, state)
  arrays = dict(state.arrays)
  report = LoadReport(state.source)
  report.ignored = _ignored(arrays, wanted)
  for name in report.ignored:
    del arrays[name]
  sizes = _Sizes(model, state, image_size)
  own_channels = getattr(getattr(model, 'backbone', model), 'channels', RGB)
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
    if how is None:
      value, how = channels.adapted(name, value, leaf, own_channels, init_channels)
    if how:
      report.resized[name] = how
    value = torch_names.from_torch(path, value) if value.ndim in (2, 4) else value
    if value.shape != leaf.shape:
      if mismatch.may_be_new(name, state, partial):
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
  sizes = {name: value.shape for name, value in arrays.items()}
  result = {}
  has_pyramid = mismatch.has_pyramid(wanted)
  for pattern, condition, reason in _IGNORED:
    if pattern == mismatch.PYRAMID and has_pyramid:
      continue  # of this model: another depth does not fit
    names = [name for name in arrays if name not in wanted and re.fullmatch(pattern, name)]
    try:
      applies = not names or condition is None or condition(sizes)
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
    embedding = state.arrays.get('absolute_pos_embed', state.arrays.get('pos_embed'))
    self._units = 0 if embedding is None else embedding.shape[1]
    self._search = shapes.search_units({k: v.shape for k, v in state.arrays.items()})

  def resized(self, name: str, value: np.ndarray, leaf: Any) -> tuple[np.ndarray, str | None]:
    """Returns the value for the model's image size, and what was done to it."""
    if name in ('absolute_pos_embed', 'pos_embed') and self._grid and value.ndim == 3:
      part = ''
      if self._search is not None:
        value, part = value[:, : self._search], "the search region's, "
      first, units = np.split(value.astype(np.float32, copy=False), [self._class_tokens], axis=1)
      source = self._source_grid(units.shape[1], self._grid)
      if source == self._grid:
        return value, part.rstrip(', ') or None
      units = resize.position_embedding(units, source, self._grid)
      how = f'{part}from {_text(source)} to {_text(self._grid)} units, bicubic'
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
      f'{self._source} is for images of {units} units, which is not a square: give its size, '
      'image_size=(height, width) or --image_size=HEIGHTxWIDTH'
    )


def _text(grid: Grid) -> str:
  return f'{grid[0]}x{grid[1]}'
