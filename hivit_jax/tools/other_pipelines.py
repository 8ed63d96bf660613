"""Input pipelines of PyTorch and TensorFlow, run by another Python that has these packages.

  PYTHON other_pipelines.py torchvision|tf.data|tf.data-aliased FOLDER THREADS

`pipelines_beside` starts it. It imports nothing of this package. For each line on stdin, a number
of images, it answers with a line of JSON: `cpu` and `wall`, in seconds, of loading so many.

All sides make uint8 images 224x224 from the JPEG files in FOLDER, read from memory: the crop of MAE
pretraining, bicubic with antialiasing (aliased: without it), mirrored half of the times, in batches
of 64.
"""

import importlib
import io
import json
import os
import pathlib
import sys
import time

SIZE, BATCH_SIZE = 224, 64
FULL = 8  # Batches that are taken before the clock starts: more than are loaded ahead.


def torchvision_batches(files, threads):
  """DataLoader with worker processes that stay, and torchvision's transforms on PIL images."""
  torch = importlib.import_module('torch')
  transforms = importlib.import_module('torchvision.transforms')
  image_module = importlib.import_module('PIL.Image')
  transform = transforms.Compose(
    [
      transforms.RandomResizedCrop(
        SIZE, scale=(0.2, 1.0), interpolation=transforms.InterpolationMode.BICUBIC
      ),
      transforms.RandomHorizontalFlip(),
      transforms.PILToTensor(),
    ]
  )

  class Images(torch.utils.data.Dataset):
    def __len__(self):
      return 2**31

    def __getitem__(self, index):
      image = image_module.open(io.BytesIO(files[index % len(files)])).convert('RGB')
      return transform(image), 0

  torch.set_num_threads(1)
  loader = torch.utils.data.DataLoader(
    Images(), batch_size=BATCH_SIZE, num_workers=threads, persistent_workers=True
  )
  return iter(loader)


def tf_batches(files, threads, antialias):
  """tf.data with the crop inside the decoder, which skips what lies below and beside it."""
  tf = importlib.import_module('tensorflow')

  def load(data):
    shape = tf.image.extract_jpeg_shape(data)
    begin, size, _ = tf.image.sample_distorted_bounding_box(
      shape,
      tf.zeros([1, 0, 4]),
      area_range=(0.2, 1.0),
      aspect_ratio_range=(3 / 4, 4 / 3),
      use_image_if_no_bounding_boxes=True,
    )
    window = tf.stack([begin[0], begin[1], size[0], size[1]])
    image = tf.image.decode_and_crop_jpeg(data, window, channels=3)
    image = tf.image.resize(image, (SIZE, SIZE), 'bicubic', antialias=antialias)
    image = tf.image.random_flip_left_right(image)
    return tf.cast(tf.clip_by_value(tf.round(image), 0, 255), tf.uint8), 0

  data = tf.data.Dataset.from_tensor_slices(files).repeat()
  data = data.map(load, num_parallel_calls=threads).batch(BATCH_SIZE).prefetch(2)
  options = tf.data.Options()
  options.threading.private_threadpool_size = threads
  return iter(data.with_options(options))


def cpu_seconds() -> float:
  """CPU time of this process and of its living children (Linux)."""
  own = os.getpid()
  ticks = 0
  for folder in pathlib.Path('/proc').glob('[0-9]*'):
    try:
      fields = (folder / 'stat').read_text().rpartition(')')[2].split()
    except OSError:  # it has just ended
      continue
    if int(folder.name) == own or int(fields[1]) == own:
      ticks += int(fields[11]) + int(fields[12])
  return ticks / os.sysconf('SC_CLK_TCK')


def main() -> None:
  sys.path.pop(0)  # Beside this file there is a statistics.py.
  side, folder, threads = sys.argv[1:]
  files = [path.read_bytes() for path in sorted(pathlib.Path(folder).iterdir())]
  if side == 'torchvision':
    batches = torchvision_batches(files, int(threads))
  else:
    batches = tf_batches(files, int(threads), antialias=side != 'tf.data-aliased')
  next(batches)
  print(json.dumps('ready'), flush=True)
  for line in sys.stdin:
    for _ in range(FULL):
      next(batches)
    cpu, wall = cpu_seconds(), time.perf_counter()
    for _ in range(int(line) // BATCH_SIZE):
      next(batches)
    spent = {'cpu': cpu_seconds() - cpu, 'wall': time.perf_counter() - wall}
    wait_until_idle()
    print(json.dumps(spent), flush=True)


def wait_until_idle() -> None:
  """Lets it load ahead as far as it does, so that it takes no time from others afterwards."""
  before = -1.0
  while before < (now := cpu_seconds()):
    before = now
    time.sleep(0.3)


if __name__ == '__main__':
  main()
