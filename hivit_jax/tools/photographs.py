"""The photographs that benchmarks of the input read."""

import io

from PIL import Image

from hivit_jax.data.builders.packages import package_file

PHOTO_SIZE = (500, 375)  # Width and height: the most frequent ones in ImageNet.
JPEG_QUALITY = 95
PHOTOS = ('astronaut.png', 'coffee.png', 'motorcycle_left.png', 'ihc.png', 'rocket.jpg')


def photo_files(size: tuple[int, int] = PHOTO_SIZE) -> list[bytes]:
  """Returns photographs that scikit-image carries, as JPEG files of a width and height.

  Raises:
    UserError: scikit-image is not installed.
  """
  files = []
  for name in PHOTOS:
    with Image.open(package_file('skimage', f'data/{name}')) as image:
      photo = image.convert('RGB').resize(size, Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    photo.save(buffer, 'JPEG', quality=JPEG_QUALITY)
    files.append(buffer.getvalue())
  return files
