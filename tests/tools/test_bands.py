"""Images of 13 bands of 16 bits through the programs: trained on, reconstructed, predicted."""

import json

import numpy as np
import pytest
import tifffile
from flax import nnx
from PIL import Image

from hivit_jax.tasks.images import normalize
from hivit_jax.train.checkpoint import Checkpoints
from tests.helpers import TINY, random_model

BANDS = 13
SHOWN = (13, 5, 1)
DATA = {
  'dtype': 'uint16', 'mean': (0.1,) * BANDS, 'std': (0.05,) * BANDS, 'eval_crop': 1.0
}  # fmt: skip


def stretched(bands: np.ndarray) -> np.ndarray:
  """The bands that are shown, as floats: from their 2nd to their 98th percentile."""
  shown = bands[..., [c - 1 for c in SHOWN]].astype(float)
  low, high = np.percentile(shown.reshape(-1, 3), (2, 98), axis=0)
  return np.clip((shown - low) / (high - low), 0, 1) * 255


@pytest.fixture(scope='module')
def fields(tmp_path_factory):
  """A folder of 32x32 images, half of them arrays, half of them TIFF files with planes."""
  root, rng = tmp_path_factory.mktemp('fields'), np.random.default_rng(0)
  for split, count in (('train', 8), ('val', 4)):
    (root / split).mkdir()
    for i in range(count):
      bands = rng.integers(0, 1000 * np.arange(1, BANDS + 1), (32, 32, BANDS)).astype(np.uint16)
      if i % 2:
        np.save(root / split / f'{i}.npy', bands)
      else:
        planes = np.moveaxis(bands, -1, 0)
        tifffile.imwrite(root / split / f'{i}.tif', planes, photometric='minisblack')
  return root


def test_a_run_learns_from_them_and_its_reconstructions_show_the_bands_asked_for(
  runs, forks, fields, tmp_path
):
  settings = {
    'data.name': f'folder:{fields}', 'data.train_split': 'train',
    'data.eval_split': 'val', 'channels': BANDS, 'batch_size': 8,
    **{f'data.{key}': value for key, value in DATA.items()}, 'pictures.channels': SHOWN,
    'max_steps': 2, 'knn.every_epochs': 0, 'pictures.every_epochs': 0, 'log_every_steps': 1,
  }  # fmt: skip
  flags = [f'--config.{key}={value}'.replace(' ', '') for key, value in settings.items()]
  workdir, out = tmp_path / 'run', tmp_path / 'out.png'
  done = forks('main.py', '--config=configs/mae_hivit_t.py:debug', f'--workdir={workdir}', *flags)
  assert done.status == 0, done.stderr
  rows = [json.loads(line) for line in (workdir / 'metrics.jsonl').read_text().splitlines()]
  losses = [row['train/loss'] for row in rows if 'train/loss' in row]
  assert len(losses) == 2
  assert np.isfinite(losses).all()
  image = fields / 'val' / '1.npy'
  done = forks(
    'hivit_jax/tools/reconstruct.py', f'--workdir={workdir}', f'--images={image}', f'--out={out}'
  )
  assert done == (0, '', f'wrote {out}\n')
  original = np.asarray(Image.open(out))[48:, 8:][:160:5, :160:5]
  np.testing.assert_allclose(original, stretched(np.load(image)), atol=1)


def test_a_segmenter_learns_from_them_and_draws_them(runs, forks, tmp_path):
  root, rng = tmp_path / 'scenes', np.random.default_rng(0)
  for split in ('train', 'val'):
    for folder in ('images', 'annotations'):
      (root / folder / split).mkdir(parents=True)
    for i in range(4):
      bands = rng.integers(0, 65536, (64, 64, BANDS)).astype(np.uint16)
      np.save(root / 'images' / split / f'{i}.npy', bands)
      labels = rng.integers(0, 2, (64, 64)).astype(np.uint8)
      Image.fromarray(labels).save(root / 'annotations' / split / f'{i}.png')
  (root / 'classes.txt').write_text('land\nsea\n')
  settings = {
    'data.name': f'folder:{root}', 'data.train_split': 'train', 'data.eval_split': 'val',
    'channels': BANDS, **{f'data.{key}': DATA[key] for key in ('dtype', 'mean', 'std')},
    'batch_size': 4, 'max_steps': 2, 'segment.photometric': False, 'segment.inference': 'whole',
    'pictures.channels': SHOWN, 'pictures.count': 1,
  }  # fmt: skip
  flags = [f'--config.{key}={value}'.replace(' ', '') for key, value in settings.items()]
  workdir, folder = tmp_path / 'run', tmp_path / 'drawn'
  done = forks(
    'main.py', '--config=configs/segment_hivit_t.py:debug', f'--workdir={workdir}', *flags
  )
  assert done.status == 0, done.stderr
  rows = [json.loads(line) for line in (workdir / 'metrics.jsonl').read_text().splitlines()]
  assert sum('train/loss' in row for row in rows) == 2
  assert any('eval/miou' in row for row in rows)
  assert list((workdir / 'segmentations').glob('*.png'))
  image = root / 'images' / 'val' / '1.npy'
  done = forks('hivit_jax/tools/predict.py', f'--workdir={workdir}', f'--save={folder}', str(image))
  assert done.status == 0, done.stderr
  overlay, colours = (
    np.asarray(Image.open(folder / f'1_{kind}.png'), int) for kind in ('overlay', 'colour')
  )
  np.testing.assert_allclose(2 * overlay - colours, stretched(np.load(image)), atol=2)


@pytest.fixture(scope='module')
def classifier(tmp_path_factory):
  """The model, and a workdir as a run leaves it that trained it."""
  settings = TINY | {'image_size': (32, 32), 'channels': BANDS, 'num_classes': 3}
  graphdef, params = random_model('hivit_tiny', **settings)
  model = {k: v for k, v in settings.items() if k not in ('image_size', 'channels')}
  config = {
    'task': 'classify', 'seed': 0, 'image_size': (32, 32), 'channels': BANDS, 'data': DATA,
    'model': model | {'name': 'hivit_tiny', 'rpe': None, 'dtype': 'float32'},
    'pictures': {'channels': SHOWN},
  }  # fmt: skip
  workdir = tmp_path_factory.mktemp('classifier')
  with Checkpoints(workdir / 'checkpoints') as checkpoints:
    checkpoints.save(5, {'params': params}, {'config': config, 'class_names': ['a', 'b', 'c']})
  return nnx.merge(graphdef, params), workdir


def test_a_classifier_tells_classes_from_either_kind_of_file(forks, fields, classifier, tmp_path):
  model, workdir = classifier
  array, same, sheet = fields / 'val' / '1.npy', tmp_path / 'same.tif', tmp_path / 'sheet.png'
  bands = np.load(array)
  tifffile.imwrite(same, np.moveaxis(bands, -1, 0), photometric='minisblack')
  files = [str(array), str(same), str(fields / 'val' / '0.tif')]
  flags = [f'--workdir={workdir}', '--json', '--top=3', f'--save={sheet}']
  done = forks('hivit_jax/tools/predict.py', *flags, *files)
  assert done.status == 0, done.stderr
  rows = [json.loads(line)['predictions'] for line in done.stdout.splitlines()]
  logits = model(normalize(bands[None], DATA['mean'], DATA['std']))
  expected = np.asarray(nnx.softmax(logits[0]))
  for found in rows[:2]:
    chances = {each['index']: each['probability'] for each in found}
    np.testing.assert_allclose([chances[i] for i in range(3)], expected, rtol=2e-3)
  assert rows[2] != rows[0]
  picture = np.asarray(Image.open(sheet))[8:, 8:][:192:6, :192:6]
  np.testing.assert_allclose(picture, stretched(bands), atol=1)


def test_files_of_another_kind_are_a_line_that_names_them(forks, classifier, tmp_path):
  photograph = tmp_path / 'a.png'
  Image.new('RGB', (32, 32)).save(photograph)
  done = forks('hivit_jax/tools/predict.py', f'--workdir={classifier[1]}', str(photograph))
  assert done.status == 2
  assert f'{photograph}: uint8 of shape (32, 32, 3), but config.channels=13' in done.stderr
