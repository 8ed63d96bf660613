"""Swin as a backbone (arXiv 2103.14030), to compare HiViT with; its windows divide its maps."""

import jax
from flax import nnx

from hivit_jax.models.swin import LAYER_NORM_EPS, SwinEncoder, SwinSettings
from hivit_jax.ops.modules import layer_norm


class SwinBackbone(SwinEncoder):
  """Swin whose maps are the outputs of its stages, each with a LayerNorm."""

  def __init__(self, settings: SwinSettings, *, rngs: nnx.Rngs):
    super().__init__(settings, rngs=rngs)
    options = {'epsilon': LAYER_NORM_EPS, 'rngs': rngs, 'dtype': settings.dtype}
    self.norms = nnx.List(
      layer_norm(settings.channels_of(stage), **options)
      for stage in range(len(settings.depths) - 1)
    )

  def __call__(
    self, images: jax.Array, *, drop_path_noise: jax.Array | None = None
  ) -> tuple[jax.Array, ...]:
    """(B, H, W, channels) of this model's image size -> (B, h, w, c) of each stage."""
    *maps, last = self.stages(images, drop_path_noise)
    return (*(norm(x) for norm, x in zip(self.norms, maps, strict=True)), last)
