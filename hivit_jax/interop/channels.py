"""Weights for RGB images, in a model for images of other channels.

| way | patch embedding | exact for |
|---|---|---|
| `repeat` | R, G, B, R, G, ..., each divided by how often it is there | images that repeat RGB |
| `mean` | the sum of the three, divided by the number of channels | channels that are all equal |
| `copy` | the three as they are, the other channels at 0 | RGB first, whatever follows |

"Exact": the encoder computes what it did of that RGB image. With fewer than three channels every
way is `mean`. timm's `in_chans` is `repeat`, divided by the mean number of copies; two images as
SUTrack has them get one half each. A decoder's pixels are repeated, averaged,
or copied in the same way, without being divided.
"""

from typing import Any

import numpy as np

from hivit_jax.settings import RGB

WAYS = ('repeat', 'mean', 'copy')
_PATCHES = 'patch_embed.proj.weight'
# Names of the layers that predict pixels -> where their outputs have the channels of a pixel.
_PIXELS = {
  'decoder_pred.weight': -1,
  'decoder_pred.bias': -1,
  'decoder.0.weight': 0,
  'decoder.0.bias': 0,
}


def adapted(
  name: str, value: np.ndarray, leaf: Any, channels: int, way: str
) -> tuple[np.ndarray, str | None]:
  """A parameter for images of other channels, and what was done; as it is where that is nothing.

  Args:
    name: PyTorch's.
    value: In PyTorch's layout, from a model for RGB images.
    leaf: The model's parameter, in its own layout.
    channels: Of the model's images.
    way: One of `WAYS`.
  """
  if channels == RGB:
    return value, None
  if name == _PATCHES and value.ndim == 4 and value.shape[1] == RGB:
    new = np.einsum('osij,sc->ocij', value.astype(np.float32), _shares(channels, way))
    return new, f'from {RGB} channels to {channels}, init_channels={way}'
  outputs = leaf.shape[-1]
  if name in _PIXELS and value.shape[0] * channels == outputs * RGB:
    shares, rest = _shares(channels, way), value.shape[1:]
    values = shares / np.maximum(shares.sum(axis=0), np.finfo(np.float32).tiny)
    if _PIXELS[name] == 0:
      new = np.einsum('sp...,sc->cp...', value.reshape(RGB, -1, *rest), values)
    else:
      new = np.einsum('ps...,sc->pc...', value.reshape(-1, RGB, *rest), values)
    new = new.reshape(outputs, *rest).astype(np.float32)
    return new, f'from {RGB} channels to {channels}, init_channels={way}'
  return value, None


def _shares(channels: int, way: str) -> np.ndarray:
  """(3, channels): how much of each RGB kernel that of a channel gets."""
  if way == 'mean' or channels < RGB:
    return np.full((RGB, channels), 1 / channels, np.float32)
  shares = np.eye(RGB, channels, dtype=np.float32)
  if way == 'repeat':
    shares = np.eye(RGB, dtype=np.float32)[:, np.arange(channels) % RGB]
    shares /= shares.sum(axis=1, keepdims=True)
  return shares
