"""HiViT as the backbone of a detector or a segmenter."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from hivit_jax.models.hivit import HiViTEncoder
from hivit_jax.ops.modules import layer_norm


class _MaxPool(nnx.Module):
  """Has no parameters; in the reference the fourth norm is the second part of a sequence."""


class HiViTBackbone(HiViTEncoder):
  """HiViT encoder whose output are the feature maps of strides 4, 8, 16 and 32.

  The published detector (COCO) has `window_size=14, global_blocks=(4, 9, 14, 19),
  level_norms=True`; the published segmenter (ADE20K) has `rpe=True` with its tables made for the
  crops of the task, `bias_image_size=(640, 640)`.

  Args:
    image_size: (height, width) that the position embedding is for; images may have any size.
    window_size, global_blocks: see `HiViTEncoder.features`.
    level_norms: LayerNorm on every level.
    Others as for `HiViTEncoder`.
  """

  def __init__(
    self,
    *,
    image_size: tuple[int, int] = (224, 224),
    channels: int = 3,
    embed_dim: int,
    depths: Sequence[int],
    num_heads: int,
    stem_blocks: Sequence[int] | None = None,
    stem_mlp_ratio: float = 3.0,
    mlp_ratio: float = 4.0,
    rpe: bool = False,
    bias_image_size: tuple[int, int] | None = None,
    window_size: int | None = None,
    global_blocks: Sequence[int] = (),
    level_norms: bool = False,
    drop_path_rate: float = 0.0,
    remat: bool = False,
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
      bias_image_size=bias_image_size,
      drop_path_rate=drop_path_rate,
      remat=remat,
      scan=scan,
      dtype=dtype,
      pos_embed_init=nnx.initializers.normal(0.02),
      table_init=nnx.initializers.normal(0.02),
      rngs=rngs,
    )
    self.window_size = window_size
    self.global_blocks = tuple(global_blocks)
    self.level_norms = level_norms
    if level_norms:
      norms = [layer_norm(info.channels, rngs=rngs, dtype=dtype) for info in self.feature_info]
      self.fpn1, self.fpn2, self.fpn3, _ = norms
      self.fpn4 = nnx.List([_MaxPool(), norms[3]])

  def __call__(
    self,
    images: jax.Array,
    levels: Sequence[int] = (1, 2, 3, 4),
    *,
    noise: jax.Array | None = None,
  ) -> tuple[jax.Array, ...]:
    """Feature maps, see `HiViTEncoder.features`, with this model's windows and norms."""
    maps = self.features(
      images,
      levels,
      window_size=self.window_size,
      global_blocks=self.global_blocks,
      noise=noise,
    )
    if not self.level_norms:
      return maps
    norms = {1: self.fpn1, 2: self.fpn2, 3: self.fpn3, 4: self.fpn4[1]}
    return tuple(norms[level](x) for level, x in zip(levels, maps, strict=True))
