"""HiViT and masked autoencoding in JAX."""

from typing import Any

__version__ = '0.1.0'
__all__ = [
  *('create_model', 'list_models', 'load_weights', 'push_to_hub', 'run', 'save_pretrained'),
]

# Imports are inside: data workers and `main.py --help` import this package and must not wait for
# JAX. This file stands above all others: it may import any part, no part imports it.


def list_models() -> list[str]:
  """Names that `create_model` accepts."""
  from hivit_jax import models

  return models.list_models()


def create_model(
  name: str | None = None,
  *,
  seed: int = 0,
  attention: str = 'xla',
  weights: Any = None,
  partial: bool = False,
  ema: bool = False,
  fold_layer_scale: bool = False,
  init_channels: str = 'repeat',
  **overrides: Any,
) -> Any:
  """Builds a model, with new parameters or with given weights.

  The model takes images (B, H, W, channels) of its image size as normalised floating point numbers;
  uint8 is refused. Call it under `jax.jit`, which takes models as arguments::

    forward = jax.jit(lambda model, images: model(images))
    logits = forward(model, images)

  Classifiers (`hivit_*`, `fast_itpn_*`, `vit_*`, `swin_*`) give (B, num_classes) logits,
  autoencoders (`mae_*`, `simmim_*`) a loss, predictions and a mask, backbones feature maps,
  segmenters (`segment_*`) logits of every fourth pixel; detectors (`detect_*`) have
  `detect(images, sizes)`. All but these two have `forward_features(images)`, what the last stage
  gives; `pooled(images)`, (B, C) its mean; and `feature_info`, channels and strides.

  Args:
    name: one of `list_models()`; None: the model that `weights` are for. Weights from here carry
      the arguments that the model was trained with. What a file of other code does not show is
      guessed, and one warning names it. 'local-dir:PATH' and 'hf-hub:OWNER/NAME[@REVISION]' are the
      model of a directory or of a repository on the Hugging Face Hub, with its weights.
    seed: of the initialisation.
    attention: 'xla', or for NVIDIA GPUs 'auto' or 'cudnn', see `ops.choice`.
    weights: path of a file, workdir or checkpoint, see `load_weights`, or hf-hub:OWNER/NAME.
    partial: see `load_weights`.
    ema: see `load_weights`.
    fold_layer_scale: see `load_weights`.
    init_channels: see `load_weights`.
    **overrides: settings instead of the named model's or the weights', see below. `dtype`,
      `attention`, `ops`, `remat` and `scan` never come with weights. `ops='plain'`, which
      is no setting of a family, computes every operation by its definition, see `ops.choice`.

  Settings of every model:
    image_size: one side or (height, width) in pixels.
    channels: of the images.
    drop_path_rate: largest probability of dropping a residual branch in training.
    dtype: of the computation, 'float32' or 'bfloat16'; parameters are float32.
    remat: recompute activations in the backward pass: less memory, more time.

  Settings of a family:
    hivit_*: embed_dim, depths, num_heads, stem_blocks, stem_mlp_ratio, mlp_ratio, rpe, layer_scale,
      scan, num_classes (0: no head, the output is the features before it), head_std,
      head_batch_norm.
    backbone_hivit_*: as hivit_* up to scan; bias_image_size, window_size, global_blocks,
      level_norms.
    detect_hivit_*: as hivit_* up to scan; position_image_size, window_size, global_blocks,
      num_classes, neck_channels, hidden, cascade, anchor_scale, nms_pre, proposals,
      detections, candidates, score_threshold.
    segment_hivit_*: as hivit_* up to scan; position_image_size, num_classes (of a pixel),
      head_channels, auxiliary_channels (0: no second head), linear_levels, dropout_rate.
    mae_hivit_*: as hivit_* up to scan; decoder_embed_dim, decoder_depth, decoder_num_heads,
      mask_ratio, norm_pix_loss, target, hifeat.
    backbone_itpn_*: as hivit_* up to scan; fpn_dim, fpn_depth, join_stages.
    mae_itpn_*: as hivit_* up to scan; fpn_dim, fpn_depth, decoder_embed_dim, decoder_depth,
      decoder_num_heads, mask_ratio, norm_pix_loss, target, position_overhang.
    fast_itpn_*: embed_dim, depths, num_heads, stem_mlp_ratio, mlp_ratio, layer_scale, scan,
      num_classes, head_std, head_batch_norm.
    backbone_fast_itpn_*: as fast_itpn_* up to scan; window_size, global_blocks, level_norms.
    vit_*: embed_dim, depth, num_heads, mlp_ratio, scan, num_classes, head_std, head_batch_norm.
    detect_vit_*: as vit_* up to scan; position_image_size, window_size, global_blocks, num_classes,
      neck_channels, hidden, cascade, anchor_scale, nms_pre, proposals, detections, candidates,
      score_threshold.
    segment_vit_*: as vit_* up to scan; num_classes, head_channels, auxiliary_channels,
      linear_levels, dropout_rate.
    mae_vit_*: as vit_* up to scan; decoder_embed_dim, decoder_depth, decoder_num_heads,
      mask_ratio, norm_pix_loss, target.
    swin_*: embed_dim, depths, num_heads, window_size, mlp_ratio, mlp_stages, global_stages,
      num_classes, head_std, head_batch_norm.
    detect_swin_*: as swin_* up to global_stages; num_classes, neck_channels, hidden, cascade,
      anchor_scale, nms_pre, proposals, detections, candidates, score_threshold.
    segment_swin_*: as swin_* up to global_stages; num_classes, head_channels,
      auxiliary_channels, linear_levels, dropout_rate.
    simmim_swin_*: as swin_* up to global_stages; mask_ratio.

  Returns:
    A `flax.nnx.Module`.

  Raises:
    UserError: an unknown name or argument, or values or weights that do not fit.
  """
  import jax

  from hivit_jax import models
  from hivit_jax.errors import UserError

  if attention == 'auto' and jax.default_backend() != 'gpu':
    attention = 'xla'
  if name is not None and ':' in name:
    if weights is not None:
      raise UserError(f'{name} has weights of its own: leave out weights={weights}')
    name, weights = None, name
  if weights is None:
    if name is None:
      raise UserError('give the name of a model, or weights=')
    return models.create_model(name, seed=seed, attention=attention, **overrides)
  from hivit_jax.train import weights as reader

  options: dict[str, Any] = {
    'partial': partial,
    'ema': ema,
    'fold_layer_scale': fold_layer_scale,
    'init_channels': init_channels,
  }
  return reader.create_model(name, weights, seed=seed, attention=attention, **options, **overrides)


def load_weights(model: Any, path: Any, **options: Any) -> Any:
  """Loads weights into a model, in place: see `hivit_jax.train.weights.load_weights`."""
  from hivit_jax.train import weights

  return weights.load_weights(model, path, **options)


def save_pretrained(model: Any, directory: Any, **options: Any) -> None:
  """Writes a model as a directory: see `hivit_jax.train.publish.save_pretrained`."""
  from hivit_jax.train import publish

  publish.save_pretrained(model, directory, **options)


def push_to_hub(model: Any, name: str, **options: Any) -> str:
  """Uploads a model to the Hugging Face Hub: see `hivit_jax.train.publish.push_to_hub`."""
  from hivit_jax.train import publish

  return publish.push_to_hub(model, name, **options)


def run(config: Any, workdir: Any, overrides: Any = None) -> Any:
  """Trains what a config describes: see `hivit_jax.train.launch.run`."""
  from hivit_jax.train import launch

  return launch.run(config, workdir, overrides)
