"""Fast-iTPN (IEEE TPAMI 2024), the successor of iTPN (arXiv 2211.12735): HiViT with other blocks.

Stages, units and order of the cells are HiViT's. What differs: no norm after the patch embedding, a
LayerNorm before the last product of every MLP, SwiGLU in the transformer blocks, a scale for each
of their branches, and merges that are convolutions.

The authors' code has three projections for queries, keys and values, the second without a bias.
Here they are one product; its bias for the keys changes nothing, as it adds the same number to all
logits of a query.
"""

import dataclasses
from typing import Any

import jax
from flax import nnx

from hivit_jax.models import layers
from hivit_jax.models.backbone import Backbone, DenseSettings
from hivit_jax.models.classifier import Classifier, HeadSettings
from hivit_jax.models.hivit import HiViTEncoder, StagesSettings
from hivit_jax.models.patches import Stem
from hivit_jax.ops.gelu import gelu
from hivit_jax.ops.modules import layer_norm, linear
from hivit_jax.ops.precision import widen


@dataclasses.dataclass(frozen=True, kw_only=True)
class FastITPNSettings(StagesSettings):
  """Settings of Fast-iTPN's encoder."""

  mlp_ratio: float = 3.0
  layer_scale: float | None = 0.1


class NormedMlp(nnx.Module):
  """Linear, GELU, LayerNorm, Linear."""

  def __init__(self, features: int, hidden: int, *, rngs: nnx.Rngs, dtype: Any):
    self.fc1 = linear(features, hidden, rngs=rngs, dtype=dtype)
    self.ffn_ln = layer_norm(hidden, rngs=rngs, dtype=dtype)
    self.fc2 = linear(hidden, features, rngs=rngs, dtype=dtype)

  def __call__(self, x: jax.Array) -> jax.Array:
    rows = x.reshape(-1, x.shape[-1])  # as in `layers.Mlp`
    return self.fc2(self.ffn_ln(gelu(self.fc1(rows)))).reshape(x.shape)


class SwiGLU(nnx.Module):
  """w3(LayerNorm(silu(w1 x) * w2 x)) (arXiv 2002.05202)."""

  def __init__(self, features: int, hidden: int, *, rngs: nnx.Rngs, dtype: Any):
    self.w1 = linear(features, hidden, rngs=rngs, dtype=dtype)
    self.w2 = linear(features, hidden, rngs=rngs, dtype=dtype)
    self.ffn_ln = layer_norm(hidden, rngs=rngs, dtype=dtype)
    self.w3 = linear(hidden, features, rngs=rngs, dtype=dtype)

  def __call__(self, x: jax.Array) -> jax.Array:
    rows = x.reshape(-1, x.shape[-1])
    gate = jax.nn.silu(widen(self.w1(rows))).astype(x.dtype)
    return self.w3(self.ffn_ln(gate * self.w2(rows))).reshape(x.shape)


class ConvMerge(nnx.Module):
  """Joins 2x2 neighbours: a LayerNorm each, then a convolution of 2x2 cells and stride 2."""

  def __init__(self, features: int, *, rngs: nnx.Rngs, dtype: Any):
    self.norm = layer_norm(features, rngs=rngs, dtype=dtype)
    self.reduction = linear(4 * features, 2 * features, rngs=rngs, dtype=dtype)

  def __call__(self, x: jax.Array) -> jax.Array:
    """(..., cells, c), neighbours in sequence -> (..., cells / 4, 2c)."""
    *leading, cells, c = x.shape
    return self.reduction(self.norm(x).reshape(*leading, cells // 4, 4 * c))


class FastITPNEncoder(HiViTEncoder):
  """Fast-iTPN's encoder.

  Levels 1 and 2 of `features` are the outputs of the first two stages.
  """

  merges_are_layers = True  # where the learning rate falls with the layers
  patch_norm = False
  position_name = 'pos_embed'
  overhang = 0.0

  def _stem_block(self, settings: Any, channels: int, **options: Any) -> nnx.Module:
    return layers.MlpBlock(channels, mlp_ratio=settings.stem_mlp_ratio, mlp=NormedMlp, **options)

  def _merge(self, channels: int, **options: Any) -> nnx.Module:
    return ConvMerge(channels, **options)

  def _main_block(self, settings: Any, **options: Any) -> nnx.Module:
    return layers.Block(
      settings.embed_dim,
      settings.num_heads,
      mlp_ratio=settings.mlp_ratio,
      mlp=SwiGLU,
      layer_scale=settings.layer_scale,
      **options,
    )

  def _taps(self, stem: Stem) -> tuple[jax.Array, jax.Array]:
    return stem.stage1, stem.stage2


@dataclasses.dataclass(frozen=True, kw_only=True)
class FastITPNClassifierSettings(HeadSettings, FastITPNSettings):
  """Settings of Fast-iTPN with a head."""


class FastITPN(FastITPNEncoder, Classifier):
  """Fast-iTPN classifier: encoder, mean over the tokens, LayerNorm, Linear."""

  def __init__(self, settings: FastITPNClassifierSettings, *, rngs: nnx.Rngs):
    super().__init__(settings, rngs=rngs)
    self.fc_norm = layer_norm(settings.embed_dim, rngs=rngs, dtype=settings.dtype)
    self._add_head(settings, settings.embed_dim, rngs=rngs)


@dataclasses.dataclass(frozen=True, kw_only=True)
class FastITPNBackboneSettings(DenseSettings, FastITPNSettings):
  """Settings of Fast-iTPN as a backbone."""


class FastITPNBackbone(FastITPNEncoder, Backbone):
  """Fast-iTPN as a backbone."""

  def __init__(self, settings: FastITPNBackboneSettings, *, rngs: nnx.Rngs):
    super().__init__(settings, rngs=rngs)
    self._add_level_norms(settings, rngs=rngs)
