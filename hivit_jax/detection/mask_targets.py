"""What the mask head learns: masks of objects as a RoI sees them.

Whole bitmaps of 100 objects would be 100 MB an image. A mask comes as a crop to its box instead, a
fixed grid of coverages (`data.masks.crop`), which a RoI's grid is sampled from by two products.
"""

import jax
import jax.numpy as jnp

from hivit_jax.detection import roi_align

CROP = 112  # cells along a side of a crop
MARGIN = 2  # cells of zeros around a crop, so that its border falls off within the grid


def mask_targets(
  crops: jax.Array, boxes: jax.Array, rois: jax.Array, size: int = 28, samples: int = 48
) -> jax.Array:
  """Binary masks within RoIs.

  The bins of a RoI have the mean of as many samples as if the mask were a bitmap in pixels, taken
  from the crop. Against such a bitmap one target pixel in a few hundred differs.

  Args:
    crops: (R, side, side) coverage in [0, 1] (float) or 0..255 (uint8) of the mask of each RoI's
      object within the object's box.
    boxes: (R, 4) these boxes, in pixels, not empty where the result matters.
    rois: (R, 4) in pixels, clipped to the image.
    size: rows and columns of a target.
    samples: the most in a bin and axis.

  Returns:
    (R, size, size) float32 of 0 and 1.
  """
  side = crops.shape[-1]
  scale = 1 / 255 if crops.dtype == jnp.uint8 else 1.0
  grid = crops.astype(jnp.float32) * scale
  corner, extent = boxes[:, :2], jnp.maximum(boxes[:, 2:] - boxes[:, :2], 1e-3)

  def weights(axis: int) -> jax.Array:
    start, roi_side = rois[:, axis], rois[:, 2 + axis] - rois[:, axis]
    width = (roi_side / size)[:, None, None]
    count = jnp.clip(jnp.ceil(width), 1, samples)
    number = jnp.arange(samples, dtype=rois.dtype)
    pixel = start[:, None, None] + jnp.arange(size)[None, :, None] * width
    pixel = pixel + (number + 0.5) * width / count
    pixel = (pixel - corner[:, axis, None, None]) * (side / extent[:, axis, None, None])
    cell = jnp.clip(pixel - 0.5, -MARGIN, side + MARGIN - 1)  # farther away there is nothing, too
    taken = (number < count) & (width > 0)
    return jnp.where(taken[..., None], roi_align.hat(cell, side), 0).sum(axis=2) / count

  within = jnp.einsum('rph,rhw,rqw->rpq', weights(1), grid, weights(0), precision='highest')
  return (within >= 0.5).astype(jnp.float32)
