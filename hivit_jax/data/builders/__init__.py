"""TFDS builders of ours: they work without TensorFlow and write ArrayRecord."""

from hivit_jax.data.builders.digits import Digits
from hivit_jax.data.builders.photo_scenes import PhotoScenes
from hivit_jax.data.builders.photo_tiles import PhotoTiles

# Sets made from files that installed packages carry, so that they can be prepared on first use.
EMBEDDED = {'photo_tiles': PhotoTiles, 'photo_scenes': PhotoScenes, 'digits': Digits}
