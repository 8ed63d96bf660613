"""The command that shows what a model makes of images: against the model itself."""

import functools

import jax
import numpy as np
import pytest
from flax import nnx
from PIL import Image

from hivit_jax.interop import exporter, files
from hivit_jax.models import inside
from hivit_jax.tools import components
from tests.helpers import TINY, TINY_SWIN, TINY_VIT, assert_close, random_model
from tests.runs import content

OWN = {'mean': (0.6, 0.4, 0.5), 'std': (0.2, 0.3, 0.4)}


@pytest.fixture(scope='module')
def features(forks):
  return functools.partial(forks, 'hivit_jax/tools/features.py')


def stored(name: str, path, **options):
  """A random model and its file, with pixel statistics of its own."""
  model = nnx.merge(*random_model(name, **options))
  metadata = {'image_size': model.image_size, 'data': OWN}
  files.write(path, exporter.state_dict(model), metadata=metadata)
  return model


@pytest.fixture(scope='module')
def weights(tmp_path_factory):
  return tmp_path_factory.mktemp('weights') / 'x.safetensors'


@pytest.fixture(scope='module')
def model(weights):
  return stored('hivit_tiny', weights, **TINY, num_classes=3)


@pytest.fixture(scope='module')
def pictures(tmp_path_factory):
  """Two images of two textures, left and right; the second has them the other way round."""
  root = tmp_path_factory.mktemp('pictures')
  rng = np.random.default_rng(0)
  for name, height, width in (('a', 64, 128), ('b', 96, 128)):
    rows, columns = np.indices((height, width))
    stripes = np.where(rows // 2 % 2, 220, 30)
    left = np.where(columns < width // 2, stripes, 128)
    image = left if name == 'a' else left[:, ::-1]
    noisy = image[..., None] + rng.integers(-20, 20, (height, width, 3))
    Image.fromarray(np.clip(noisy, 0, 255).astype(np.uint8)).save(root / f'{name}.png')
  return root


@pytest.fixture(scope='module')
def shown(features, model, weights, pictures, tmp_path_factory):
  """What the command writes about the two."""
  out = tmp_path_factory.mktemp('shown') / 'of' / 'both'
  done = features(
    f'--weights={weights}', str(pictures), f'--out={out}', '--image_size=own', '--units=1,2',
    '--units=0,7', '--point=20,30', f'--folder={pictures}', '--count=1',
  )  # fmt: skip
  assert done.status == 0, done.stderr
  written = ('attention.png', 'features.npz', 'neighbours.png', 'pca.png', 'similarity.png')
  assert tuple(content(out)) == written
  with np.load(out / 'features.npz') as file:
    return out, dict(file)


def test_the_arrays_are_the_models(shown, model, pictures):
  _, arrays = shown
  assert list(arrays['paths']) == [str(pictures / 'a.png'), str(pictures / 'b.png')]
  look = jax.jit(inside.look)
  for i, name in enumerate('ab'):
    with Image.open(pictures / f'{name}.png') as image:
      pixels = np.asarray(image) / 255
    normalized = (pixels - np.array(OWN['mean'])) / np.array(OWN['std'])
    found = look(model, normalized[None].astype(np.float32))
    for level, expected in enumerate(found.maps, 1):
      assert_close(arrays[f'{i}/level{level}'], expected[0], relative=1e-4)
      centred = expected[0] - arrays[f'mean{level}']
      assert_close(arrays[f'{i}/pca{level}'], centred @ arrays[f'basis{level}'], relative=1e-3)
    attention = arrays[f'{i}/attention']
    assert attention.shape == (TINY['num_heads'], 2, (4 + 2 * i) * 8)
    assert_close(attention, found.attention[-1][0][:, [10, 7]], relative=1e-3)
    np.testing.assert_allclose(attention.sum(axis=-1), 1, rtol=1e-5)


def test_two_textures_separate_in_colours_and_similarity(shown):
  """In both images alike, wherever the textures are."""
  _, arrays = shown
  for level in (1, 2, 3):
    halves = []
    for i in range(2):
      left, right = np.split(arrays[f'{i}/pca{level}'], 2, axis=1)
      striped, grey = (left, right) if i == 0 else (right, left)
      halves.append((striped.reshape(-1, 3), grey.reshape(-1, 3)))
    striped, grey = (np.concatenate(half) for half in zip(*halves, strict=True))
    apart = striped.mean(axis=0) - grey.mean(axis=0)
    threshold = (striped.mean(axis=0) + grey.mean(axis=0)) @ apart / 2
    assert (striped @ apart > threshold).mean() > 0.95, level
    assert (grey @ apart < threshold).mean() > 0.95, level
    for i in range(2):
      left, right = np.split(arrays[f'{i}/similarity{level}'], 2, axis=1)
      striped, grey = (left, right) if i == 0 else (right, left)  # the point is among stripes
      assert striped.mean() > grey.mean(), (level, i)
    side = 2 ** (level + 1)
    assert arrays[f'0/similarity{level}'][30 // side, 20 // side] == pytest.approx(1)


def test_an_image_is_nearest_to_itself(shown, pictures):
  _, arrays = shown
  assert arrays['neighbour_paths'][:, 0].tolist() == [str(pictures / f'{x}.png') for x in 'ab']
  np.testing.assert_allclose(arrays['neighbour_similarities'], 1, rtol=1e-6)


def test_the_sheet_shows_the_colours(shown):
  out, arrays = shown
  with Image.open(out / 'pca.png') as sheet:
    canvas = np.asarray(sheet)
  assert canvas.shape[1] > 5 * 128
  levels = [arrays[f'{i}/pca1'] for i in range(2)]
  values = np.concatenate([x.reshape(-1, 3) for x in levels])
  low, high = np.percentile(values, (1, 99), axis=0)
  colour = np.rint(255 * np.clip((levels[0][0, 0] - low) / (high - low), 0, 1))
  assert (canvas == colour).all(axis=-1).sum() >= 16


def test_signs_do_not_depend_on_chance():
  rng = np.random.default_rng(0)
  maps = [rng.standard_normal((4, 5, 6)), rng.standard_normal((2, 3, 6))]
  basis = components.principal(maps).basis
  assert (basis[np.abs(basis).argmax(axis=0), range(3)] > 0).all()
  np.testing.assert_allclose(basis, components.principal(maps[::-1]).basis, atol=1e-9)
  np.testing.assert_allclose(basis.T @ basis, np.eye(3), atol=1e-12)
  narrow = components.principal([x[..., :2] for x in maps])
  np.testing.assert_array_equal(narrow.basis[:, 2], 0)
  assert np.isfinite(narrow.colours[0]).all()


@pytest.mark.parametrize(
  ('name', 'options', 'levels', 'attended'),
  [
    ('vit_base', TINY_VIT | {'num_classes': 3}, 1, 5),
    ('simmim_swin_tiny', TINY_SWIN, 2, 16),
    ('segment_vit_base', TINY_VIT | {'num_classes': 3, 'head_channels': 8}, 4, 5),
    ('segment_hivit_tiny', TINY | {'num_classes': 3, 'head_channels': 8}, 4, 16),
  ],
)
def test_other_models(features, pictures, tmp_path, name, options, levels, attended):
  stored(name, tmp_path / 'x.safetensors', **options)
  done = features(
    f'--weights={tmp_path}/x.safetensors', f'{pictures}/a.png', f'--out={tmp_path}', '--units=1,1',
    f'--folder={pictures}',
  )  # fmt: skip
  assert done.status == 0, done.stderr
  with np.load(tmp_path / 'features.npz') as file:
    found = [key for key in file.files if key.startswith('0/level')]
    assert len(found) == levels
    assert file['0/attention'].shape[1:] == (1, attended)
    assert file['neighbour_paths'].shape == (1, 2)


@pytest.mark.parametrize(
  ('arguments', 'message'),
  [
    (['{images}'], "which model? Either a run's --workdir=DIRECTORY or --weights=FILE"),
    (['--weights={weights}'], 'which images? Name files or folders of them'),
    (['--weights={weights}', '{images}', '--units=1'], '--units=1: expected row,column of a unit'),
    (
      ['--weights={weights}', '{images}', '--units=0,4'],
      '--units=0,4: {images}/a.png has 4 rows and 4 columns of units, from 0',
    ),
    (
      ['--weights={weights}', '{images}', '--units=0,0', '--block=2'],
      '--block=2: hivit_tiny has 2 blocks with attention, from 0',
    ),
    (['--weights={weights}', '{images}', '--block=1'], '--block=1: attention of which units?'),
    (
      ['--weights={weights}', '{images}', '--point=128,0'],
      '--point=128,0: {images}/a.png is 128 pixels wide and 64 high, counted from 0',
    ),
    (
      ['--weights={weights}', '{images}', '--image_size=100'],
      '--image_size=100: expected multiples of 32, or "own"',
    ),
    (['--weights={weights}', '{images}', '--folder={tmp}'], 'no images in {tmp} (looked for'),
    (['--weights={weights}', '{tmp}/no.png'], 'none of the 1 images could be read'),
    (
      ['--weights={swin}', '{images}', '--image_size=64'],
      '--image_size=64: swin_tiny takes images of 32x32 pixels only; leave out the flag',
    ),
    (
      ['--weights={swin}', '{images}', '--units=0,0', '--block=0'],
      '--block=0: it attends within windows in swin_tiny',
    ),
  ],
)
def test_mistakes_are_one_line(features, model, weights, pictures, tmp_path, arguments, message):
  swin = weights.with_name('swin.safetensors')
  if not swin.exists():
    stored('swin_tiny', swin, **TINY_SWIN)
  fill = functools.partial(str.format, tmp=tmp_path, weights=weights, images=pictures, swin=swin)
  done = features(*map(fill, arguments), f'--out={tmp_path}/out')
  assert done.status == 2, done.stderr
  *logged, last = done.stderr.splitlines()
  assert fill(f'error: {message}') in last
  assert 'Traceback' not in '\n'.join(logged)
  assert not (tmp_path / 'out').exists()
