"""HiViT: a hierarchical vision transformer whose units meet only in the main stage.

Source: "HiViT: Hierarchical Vision Transformer Meets Masked Image Modeling", arXiv 2205.14949.

An image is a grid of 16x16-pixel *units*. Each unit starts as 4x4 sub-patches of 4x4 pixels; two
stages of MLP blocks, each followed by a 2x2 merge, turn them into one token per unit. No unit sees
another before the main stage, so units can be dropped from the raw pixels.

The sub-patches of a unit are kept in an order in which both merges are reshapes and move no data:
see `unit_patches`.
"""

import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from hivit_jax.errors import UserError
from hivit_jax.models import classifier, layers, resize, windows
from hivit_jax.ops.modules import layer_norm, linear

UNIT = 16  # pixels: side of a unit, the stride of the tokens
PATCH = 4  # pixels: side of a sub-patch
CELLS = UNIT // PATCH  # side of a unit's grid of sub-patches
OVERHANG = 0.1  # units: of the published dense models, see `resize.position_embedding`


def unit_grid(image_size: tuple[int, int]) -> tuple[int, int]:
  """(rows, columns) of units in an image of (height, width) pixels."""
  height, width = image_size
  if height % UNIT or width % UNIT or min(height, width) < UNIT:
    raise UserError(f'image_size must be multiples of {UNIT} pixels, got {height}x{width}')
  return height // UNIT, width // UNIT


def split_units(images: jax.Array) -> jax.Array:
  """Cuts images into units.

  Args:
    images: (B, H, W, C); H and W multiples of 16.

  Returns:
    (B, N, 16, 16, C), units in row-major order.
  """
  b, h, w, c = images.shape
  rows, columns = unit_grid((h, w))
  # A row of pixels and channels as one axis: TPUs would fill up an axis of 3 channels to 128.
  x = images.reshape(b, rows, UNIT, columns, UNIT * c).swapaxes(2, 3)
  return x.reshape(b, rows * columns, UNIT, UNIT, c)


def join_units(units: jax.Array, grid: tuple[int, int]) -> jax.Array:
  """Inverse of `split_units`, for any side of a unit: (B, N, side, side, C) -> (B, H, W, C)."""
  b, _, side, _, c = units.shape
  x = units.reshape(b, *grid, side, side, c).swapaxes(2, 3)
  return x.reshape(b, grid[0] * side, grid[1] * side, c)


def unit_patches(units: jax.Array) -> jax.Array:
  """Sub-patches of each unit in merge order.

  A merge concatenates the 2x2 neighbours (0,0), (1,0), (0,1), (1,1) as (row, column). With the
  sub-patches nested that way twice, four consecutive ones are always what a merge concatenates.

  Args:
    units: (B, K, 16, 16, C).

  Returns:
    (B, K, 16, 4 * 4 * C): pixels of a sub-patch in (row, column, channel) order.
  """
  b, k, _, _, c = units.shape
  # row = (r2, r1, pixel row), column = (c2, c1, pixel column); the second merge joins r2 and c2.
  x = units.reshape(b, k, 2, 2, PATCH, 2, 2, PATCH, c)
  x = x.transpose(0, 1, 5, 2, 6, 3, 4, 7, 8)  # (B, K, c2, r2, c1, r1, row, column, C)
  return x.reshape(b, k, CELLS * CELLS, PATCH * PATCH * c)


def to_rows_and_columns(x: jax.Array) -> jax.Array:
  """From merge order to a grid: (B, K, 16 | 4 | 1, C) -> (B, K, side, side, C)."""
  b, k, cells, c = x.shape
  if cells == 16:
    x = x.reshape(b, k, 2, 2, 2, 2, c)  # (c2, r2, c1, r1)
    return x.transpose(0, 1, 3, 5, 2, 4, 6).reshape(b, k, 4, 4, c)
  if cells == 4:
    return x.reshape(b, k, 2, 2, c).swapaxes(2, 3)
  return x.reshape(b, k, 1, 1, c)


class FeatureInfo(NamedTuple):
  """One level of `HiViTEncoder.features`.

  Attributes:
    level: 1 to 4.
    channels: C of the (B, h, w, C) map.
    stride: pixels of the image from one cell to the next.
  """

  level: int
  channels: int
  stride: int


class PatchEmbed(nnx.Module):
  """4x4 convolution of stride 4 within each unit, then LayerNorm."""

  def __init__(self, channels: int, features: int, *, rngs: nnx.Rngs, dtype: Any):
    self.proj = layers.patch_conv(channels, features, PATCH, rngs=rngs, dtype=dtype)
    self.norm = layer_norm(features, rngs=rngs, dtype=dtype)
    self.dtype = dtype

  def __call__(self, units: jax.Array) -> jax.Array:
    """(B, K, 16, 16, channels) -> (B, K, 16, features), sub-patches in merge order."""
    patches = unit_patches(units.astype(self.dtype))
    return self.norm(self.proj(patches))


class PatchMerge(nnx.Module):
  """Joins 2x2 neighbours: concatenation, LayerNorm, Linear(4c -> 2c) without bias."""

  def __init__(self, features: int, *, rngs: nnx.Rngs, dtype: Any):
    self.norm = layer_norm(4 * features, rngs=rngs, dtype=dtype)
    self.reduction = linear(4 * features, 2 * features, use_bias=False, rngs=rngs, dtype=dtype)

  def __call__(self, x: jax.Array) -> jax.Array:
    """(B, K, cells, c) -> (B, K, cells / 4, 2c)."""
    b, k, cells, c = x.shape
    return self.reduction(self.norm(x.reshape(b, k, cells // 4, 4 * c)))


class HiViTEncoder(layers.StochasticDepth, nnx.Module):
  """The encoder: everything up to the last main block.

  `blocks` is one flat list, as in the reference: `2 * depths[0]` MLP blocks, a merge,
  `2 * depths[1]` MLP blocks, a merge, `depths[2]` transformer blocks.

  Args:
    image_size: (height, width) in pixels, multiples of 16.
    channels: input channels.
    embed_dim: channels C of the main stage, a multiple of 4 and of `num_heads`.
    depths: see above.
    stem_blocks: MLP blocks of the first two stages when `depths` does not say it, as in iTPN with
      its odd numbers; None: `2 * depths[0]` and `2 * depths[1]`.
    num_heads: heads of the main stage.
    stem_mlp_ratio: hidden width of the MLP blocks, as a multiple of their channels.
    mlp_ratio: the same for the main stage.
    rpe: learn a relative position bias in every main block.
    bias_image_size: (height, width) that the bias is for when it is not `image_size`.
    drop_path_rate: maximum; rates rise linearly from 0 over all blocks.
    remat: recompute activations in the backward pass.
    scan: run the main blocks as a `lax.scan`, see `layers.apply_blocks`.
    dtype: of the computation; parameters are float32.
    pos_embed_init, table_init: initialisers of the two position parameters.
    rngs: `nnx.Rngs` with a `params` stream.
  """

  def __init__(
    self,
    *,
    image_size: tuple[int, int],
    channels: int,
    embed_dim: int,
    depths: Sequence[int],
    stem_blocks: Sequence[int] | None,
    num_heads: int,
    stem_mlp_ratio: float,
    mlp_ratio: float,
    rpe: bool,
    bias_image_size: tuple[int, int] | None = None,
    drop_path_rate: float,
    remat: bool,
    scan: bool,
    dtype: Any,
    pos_embed_init: Callable,
    table_init: Callable,
    rngs: nnx.Rngs,
  ):
    if embed_dim % 4:
      raise UserError(f'embed_dim must be a multiple of 4, got {embed_dim}')
    self.image_size = image_size
    self.grid = unit_grid(image_size)
    self.channels = channels
    self.embed_dim = embed_dim
    self.depths = tuple(depths)
    self.stem_blocks = tuple(stem_blocks or (2 * depths[0], 2 * depths[1]))
    self.remat = remat
    self.scan = scan
    self.patch_embed = PatchEmbed(channels, embed_dim // 4, rngs=rngs, dtype=dtype)
    units = self.grid[0] * self.grid[1]
    self.absolute_pos_embed = nnx.Param(pos_embed_init(rngs.params(), (1, units, embed_dim)))
    options = {'rngs': rngs, 'dtype': dtype}
    blocks: list[nnx.Module] = []
    for stage in range(2):
      width = embed_dim // 4 * 2**stage
      blocks += [
        layers.MlpBlock(width, mlp_ratio=stem_mlp_ratio, **options)
        for _ in range(self.stem_blocks[stage])
      ]
      blocks.append(PatchMerge(width, **options))
    blocks += [
      layers.Block(
        embed_dim,
        num_heads,
        mlp_ratio=mlp_ratio,
        grid=unit_grid(bias_image_size or image_size) if rpe else None,
        table_init=table_init,
        **options,
      )
      for _ in range(depths[2])
    ]
    self.blocks = nnx.List(blocks)
    count = sum(self.stem_blocks) + depths[2]
    self.drop_path_rates = layers.rising_rates(drop_path_rate, count)

  def encode(
    self, images: jax.Array, *, ids: jax.Array | None = None, noise: jax.Array | None = None
  ) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Encodes all units, or only those in `ids`; the others are never computed.

    Args:
      images: (B, H, W, channels) of this model's image size, normalised.
      ids: (B, K) integer positions of the units to keep, in the row-major grid.
      noise: from `drop_path_noise`; None (evaluation) switches drop path off.

    Returns:
      Outputs of the three stages, each before its merge, K = N without ids: (B, K, 16, C/4) and
      (B, K, 4, C/2), cells in merge order (`to_rows_and_columns`), and (B, K, C).

    Raises:
      UserError: images of another size or other channels.
    """
    if images.ndim != 4 or images.shape[3] != self.channels:
      raise UserError(f'images must be (B, H, W, {self.channels}), got {images.shape}')
    if unit_grid((images.shape[1], images.shape[2])) != self.grid:
      height, width = self.image_size
      raise UserError(
        f'this model takes images of {height}x{width} pixels, got {images.shape[1]}x'
        f'{images.shape[2]}; image_size= of create_model sets it'
      )
    units = split_units(images)
    position = self.absolute_pos_embed[...]
    if ids is not None:
      units = self.ops.gather_units(units, ids)
      position = self.ops.gather_shared(position[0], ids)  # (B, K, C)
    x = self.patch_embed(units)

    rates = self.drop_path_rates
    if noise is not None:
      noise = jnp.moveaxis(noise, 1, 0)  # (blocks, B, 2)
    stages = []
    start = 0
    for i, depth in enumerate(self.stem_blocks):
      x = layers.apply_blocks(
        self.blocks[start + i : start + i + depth],
        x,
        rates=rates[start : start + depth],
        noise=None if noise is None else noise[start : start + depth],
        remat=self.remat,
        scan=False,
      )
      stages.append(x)
      start += depth
      x = self.blocks[start + i](x)
    x = layers.add_parameter(x[:, :, 0], position)
    x = layers.apply_blocks(
      self.blocks[start + 2 :],
      x,
      ids,
      self.grid,
      rates=rates[start:],
      noise=None if noise is None else noise[start:],
      remat=self.remat,
      scan=self.scan,
    )
    return (*stages, x)

  @property
  def feature_info(self) -> tuple[FeatureInfo, ...]:
    """Channels and strides of the levels of `features`."""
    channels = (self.embed_dim // 4, self.embed_dim // 2, self.embed_dim, self.embed_dim)
    return tuple(FeatureInfo(i + 1, c, PATCH * 2**i) for i, c in enumerate(channels))

  def features(
    self,
    images: jax.Array,
    levels: Sequence[int] = (1, 2, 3, 4),
    *,
    window_size: int | None = None,
    global_blocks: Sequence[int] = (),
    noise: jax.Array | None = None,
  ) -> tuple[jax.Array, ...]:
    """Feature maps of strides 4, 8, 16 and 32 for dense tasks.

    Level 1 is taken in the middle of the first stage and level 2 right after the first merge, as in
    the published detectors; level 3 after the last block; level 4 is level 3, max-pooled 2x2 (an
    odd last row or column is dropped). Position parameters are resized to the images' grid.

    Args:
      images: (B, H, W, channels) normalised images of any size that is a multiple of 16.
      levels: which, in which order.
      window_size: the main blocks attend within windows of so many units a side; None: globally.
      global_blocks: main blocks, counted from 0, that attend globally all the same.
      noise: from `drop_path_noise` in training; None (evaluation) switches drop path off.

    Returns:
      For each of `levels` (B, h, w, C), see `feature_info`.

    Raises:
      UserError: a size, level or block that there is not, or windows together with relative
        position bias.
    """
    if images.ndim != 4 or images.shape[3] != self.channels:
      raise UserError(f'images must be (B, H, W, {self.channels}), got {images.shape}')
    b, height, width, _ = images.shape
    grid = unit_grid((height, width))
    self._check_features(levels, grid, window_size, global_blocks)
    rates = self.drop_path_rates
    if noise is not None:
      noise = jnp.moveaxis(noise, 1, 0)  # (blocks, B, 2)

    def apply(start: int, stop: int, merges: int, x: jax.Array, side: int | None = None):
      """Residual blocks `start` to `stop`, counted without the merges, `merges` of them before."""
      part = None if noise is None else noise[start:stop]
      if side is not None:
        x = windows.split_windows(x, grid, side)
        part = None if part is None else jnp.repeat(part, len(x) // b, axis=1)
      blocks = self.blocks[start + merges : stop + merges]
      args = (None, grid) if merges == 2 else ()
      x = layers.apply_blocks(
        blocks,
        x,
        *args,
        rates=rates[start:stop],
        noise=part,
        remat=self.remat,
        scan=self.scan and merges == 2,
      )
      return x if side is None else windows.join_windows(x, grid, side)

    first, second = self.stem_blocks
    maps = {}
    x = apply(0, first // 2, 0, self.patch_embed(split_units(images)))
    maps[1] = _to_map(x, grid)
    x = self.blocks[first](apply(first // 2, first, 0, x))
    maps[2] = _to_map(x, grid)
    x = self.blocks[first + 1 + second](apply(first, first + second, 1, x))
    position = resize.position_embedding(
      self.absolute_pos_embed[...], self.grid, grid, overhang=OVERHANG
    )
    x = layers.add_parameter(x[:, :, 0], position)
    start = first + second
    local = [window_size is not None and i not in global_blocks for i in range(self.depths[2])]
    for is_local, run in itertools.groupby(range(self.depths[2]), key=local.__getitem__):
      indices = list(run)
      x = apply(
        start + indices[0], start + indices[-1] + 1, 2, x, window_size if is_local else None
      )
    maps[3] = x.reshape(b, *grid, -1)
    rows, columns = grid[0] // 2, grid[1] // 2
    cells = maps[3][:, : 2 * rows, : 2 * columns].reshape(b, rows, 2, columns, 2, -1)
    maps[4] = cells.max(axis=(2, 4))
    return tuple(maps[level] for level in levels)

  def _check_features(self, levels, grid, window_size, global_blocks) -> None:
    if not set(levels) <= {1, 2, 3, 4}:
      raise UserError(f'levels must be of 1, 2, 3, 4, got {tuple(levels)}')
    if 4 in levels and min(grid) < 2:
      raise UserError(
        f'level 4 has a stride of 32 pixels, the image only {UNIT * grid[0]}x{UNIT * grid[1]}; '
        'leave out level 4'
      )
    if window_size is None:
      return
    if window_size < 1 or not set(global_blocks) <= set(range(self.depths[2])):
      raise UserError(
        f'window_size must be positive and global_blocks within 0..{self.depths[2] - 1}, '
        f'got {window_size} and {tuple(global_blocks)}'
      )
    last: Any = self.blocks[-1]
    if last.attn.grid is not None:
      raise UserError(
        'window attention has no relative position bias: create the model with rpe=False, '
        'or leave out window_size'
      )


def _to_map(x: jax.Array, grid: tuple[int, int]) -> jax.Array:
  """Cells of all units in merge order, (B, N, cells, C), to a (B, h, w, C) map."""
  x = to_rows_and_columns(x)
  b, _, side, _, c = x.shape
  x = x.reshape(b, *grid, side, side, c).swapaxes(2, 3)
  return x.reshape(b, grid[0] * side, grid[1] * side, c)


class HiViT(HiViTEncoder, classifier.Classifier):
  """HiViT classifier: encoder, mean over the tokens, LayerNorm, Linear.

  Args:
    num_classes, head_std, head_batch_norm: see `classifier.Classifier`.
    Others as for `HiViTEncoder`.
  """

  def __init__(
    self,
    *,
    image_size: tuple[int, int] = (224, 224),
    channels: int = 3,
    num_classes: int = 1000,
    embed_dim: int,
    depths: Sequence[int],
    num_heads: int,
    stem_blocks: Sequence[int] | None = None,
    stem_mlp_ratio: float = 3.0,
    mlp_ratio: float = 4.0,
    rpe: bool = True,
    drop_path_rate: float = 0.0,
    remat: bool = False,
    head_std: float = 0.02,
    head_batch_norm: bool = False,
    scan: bool = False,
    dtype: Any = jnp.float32,
    rngs: nnx.Rngs,
  ):
    super().__init__(
      image_size=image_size,
      channels=channels,
      embed_dim=embed_dim,
      depths=depths,
      stem_blocks=stem_blocks,
      num_heads=num_heads,
      stem_mlp_ratio=stem_mlp_ratio,
      mlp_ratio=mlp_ratio,
      rpe=rpe,
      drop_path_rate=drop_path_rate,
      remat=remat,
      scan=scan,
      dtype=dtype,
      pos_embed_init=nnx.initializers.normal(0.02),
      table_init=nnx.initializers.normal(0.02),
      rngs=rngs,
    )
    self.fc_norm = layer_norm(embed_dim, rngs=rngs, dtype=dtype)
    self._add_head(
      embed_dim, num_classes, std=head_std, batch_norm=head_batch_norm, rngs=rngs, dtype=dtype
    )

  def pooled(self, images: jax.Array, *, noise: jax.Array | None = None) -> jax.Array:
    """(B, H, W, channels) normalised images -> (B, C) mean of the main stage's tokens."""
    return self.encode(images, noise=noise)[-1].mean(axis=1)
