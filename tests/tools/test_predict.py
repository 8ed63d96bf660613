"""The command that tells what a classifier sees: against the model's own logits."""

import functools
import json
import re

import jax
import numpy as np
import pytest
from flax import nnx
from PIL import Image, ImageDraw

from hivit_jax.data.transforms import eval_transform
from hivit_jax.interop import exporter, files
from hivit_jax.tools import contact_sheet
from hivit_jax.train.checkpoint import Checkpoints
from tests.helpers import TINY, TINY_SWIN, TINY_VIT, random_model
from tests.runs import content, error_of

SIZE = (32, 48)
MODEL = TINY | {'image_size': SIZE, 'num_classes': 7}
NAMES = ['ant', 'bee', 'cat', 'dog', 'eel', 'fox', 'gnu']
IMAGENET = {'mean': (0.485, 0.456, 0.406), 'std': (0.229, 0.224, 0.225)}
OWN = {'mean': (0.6, 0.4, 0.5), 'std': (0.2, 0.3, 0.4)}


def pixels(path, size):
  image = np.asarray(Image.open(path).convert('RGB'))
  return eval_transform(size)({'image': image})['image']


@pytest.fixture(scope='module')
def predict(forks):
  return functools.partial(forks, 'hivit_jax/tools/predict.py')


@pytest.fixture(scope='module')
def classifier():
  graphdef, params = random_model('hivit_tiny', **MODEL)
  # Far apart, so that pictures differ in their classes.
  params['head']['kernel'] = params['head']['kernel'] * 4
  return graphdef, params, jax.tree.map(lambda x: x * 0.7, params)


@pytest.fixture(scope='module')
def workdir(classifier, tmp_path_factory):
  """A workdir as a run leaves it that trained a classifier and averaged its parameters."""
  path = tmp_path_factory.mktemp('classifier')
  _, params, averaged = classifier
  model = {k: v for k, v in MODEL.items() if k != 'image_size'}
  config = {
    'task': 'classify', 'seed': 0, 'image_size': SIZE, 'channels': 3, 'data': OWN,
    'model': model | {'name': 'hivit_tiny', 'rpe': None, 'dtype': 'float32'},
  }  # fmt: skip
  with Checkpoints(path / 'checkpoints') as checkpoints:
    state = {'params': params, 'ema': averaged}
    checkpoints.save(5, state, {'config': config, 'class_names': NAMES})
  return path


@pytest.fixture(scope='module')
def weights(classifier, tmp_path_factory):
  """The same parameters as a bare safetensors file."""
  path = tmp_path_factory.mktemp('weights') / 'x.safetensors'
  arrays = exporter.state_dict(nnx.merge(*classifier[:2]))
  files.write(path, arrays, metadata={'image_size': SIZE})
  return path


@pytest.fixture(scope='module')
def photographs(tmp_path_factory):
  """36 images of many sizes in folders, among them one that is none, and other files."""
  root = tmp_path_factory.mktemp('photographs')
  rng = np.random.default_rng(0)
  for i in range(36):
    coarse = rng.integers(0, 256, (3, 4, 3), np.uint8)
    image = Image.fromarray(coarse).resize((40 + 3 * i, 90 - i), Image.Resampling.BICUBIC)
    path = root / f'{i % 2}' / f'{i:02}.{"png" if i % 3 else "jpg"}'
    path.parent.mkdir(exist_ok=True)
    image.save(path)
  (root / '0' / '10.png').write_bytes(b'no image')
  (root / '0' / 'notes.txt').write_text('no image, and not called one')
  return root


def readable(folder) -> list[str]:
  paths = sorted(str(p) for p in folder.rglob('*.*g'))
  return [path for path in paths if not path.endswith('10.png')]


@pytest.fixture(scope='module')
def probabilities(classifier, photographs):
  """`(paths, statistics, ema=False)` -> (B, 7): numpy around the model's logits."""
  graphdef, params, averaged = classifier
  logits = jax.jit(lambda params, images: nnx.merge(graphdef, params)(images))
  paths = readable(photographs)
  images = np.stack([pixels(path, SIZE) for path in paths]) / 255

  def compute(paths_asked, statistics, ema=False):
    normalized = (images - np.array(statistics['mean'])) / np.array(statistics['std'])
    values = logits(averaged if ema else params, normalized.astype(np.float32))
    exponentials = np.exp(np.asarray(values, np.float64))
    rows = dict(zip(paths, exponentials / exponentials.sum(axis=1, keepdims=True), strict=True))
    return np.stack([rows[path] for path in paths_asked])

  return compute


def check(rows: list[dict], paths, expected: np.ndarray, labels, top: int = 5) -> None:
  assert [row['file'] for row in rows] == list(paths)
  for row, values in zip(rows, expected, strict=True):
    indices = [p['index'] for p in row['predictions']]
    assert len(indices) == top
    assert indices == list(np.argsort(-values)[:top])
    found = [p['probability'] for p in row['predictions']]
    np.testing.assert_allclose(found, values[indices], rtol=2e-3, atol=1e-6)
    assert [p['label'] for p in row['predictions']] == [labels[i] for i in indices]


def parsed(text: str) -> list[dict]:
  return [json.loads(line) for line in text.splitlines()]


def test_a_folder_of_more_than_a_batch_with_a_broken_image_among_it(
  predict, probabilities, workdir, photographs
):
  status, stderr, stdout = predict(f'--workdir={workdir}', str(photographs), '--json')
  assert status == 2
  *_, told, last = stderr.splitlines()
  assert told.startswith(f'cannot read the image {photographs}/0/10.png: not an image (8 bytes')
  assert last == 'error: 1 of 36 images could not be read'
  paths = readable(photographs)
  assert len(paths) == 35
  expected = probabilities(paths, OWN)
  assert len(set(expected.argmax(axis=1))) > 1
  check(parsed(stdout), paths, expected, NAMES)


def test_text_names_the_classes_and_their_shares(predict, probabilities, workdir, photographs):
  paths = readable(photographs / '1')[:2]
  done = predict(f'--workdir={workdir}/checkpoints/5', *paths, '--top=3')
  assert done.status == 0, done.stderr
  lines = iter(done.stdout.splitlines())
  for path, values in zip(paths, probabilities(paths, OWN), strict=True):
    assert next(lines) == path
    for index in np.argsort(-values)[:3]:
      share, name = re.fullmatch(r'  ([ \d]{3}\.\d) %  (\w+)', next(lines)).groups()
      assert name == NAMES[index]
      assert float(share) == pytest.approx(100 * values[index], abs=0.1)
  assert not list(lines)


def test_a_weight_file_gets_imagenets_statistics_and_names_from_a_file(
  predict, probabilities, weights, photographs, tmp_path
):
  paths = readable(photographs / '1')[:3]
  expected = probabilities(paths, IMAGENET)
  done = predict(f'--weights={weights}', *paths, '--json', '--top=9')
  assert done.status == 0, done.stderr
  check(parsed(done.stdout), paths, expected, '0123456', top=7)
  (tmp_path / 'names.txt').write_text('\n'.join(f'class {c}' for c in 'ABCDEFG') + '\n')
  done = predict(f'--weights={weights}', *paths, '--json', f'--labels={tmp_path}/names.txt')
  check(parsed(done.stdout), paths, expected, [f'class {c}' for c in 'ABCDEFG'])


@pytest.mark.parametrize('suffix', ['.pth', '.safetensors'])
def test_exported_files_bring_class_names_and_pixel_statistics(
  predict, forks, probabilities, workdir, photographs, tmp_path, suffix
):
  if suffix == '.pth':
    pytest.importorskip('torch')
  file = tmp_path / f'x{suffix}'
  done = forks('hivit_jax/tools/convert.py', 'to-torch', str(workdir), f'--out={file}')
  assert done.status == 0, done.stderr
  paths = readable(photographs / '1')[:2]
  done = predict(f'--weights={file}', *paths, '--json')
  assert done.status == 0, done.stderr
  check(parsed(done.stdout), paths, probabilities(paths, OWN), NAMES)


@pytest.mark.parametrize(
  ('name', 'options'), [('vit_base', TINY_VIT), ('swin_tiny', TINY_SWIN)], ids=['vit', 'swin']
)
def test_a_baseline_is_told_from_its_weights(predict, photographs, tmp_path, name, options):
  model = nnx.merge(*random_model(name, num_classes=7, **options))
  files.write(tmp_path / 'x.safetensors', exporter.state_dict(model))
  path = readable(photographs)[0]
  image = pixels(path, options['image_size']) / 255
  image = (image - np.array(IMAGENET['mean'])) / np.array(IMAGENET['std'])
  expected = jax.nn.softmax(jax.jit(model.__call__)(image[None].astype(np.float32)))
  done = predict(f'--weights={tmp_path}/x.safetensors', path, '--json')
  check(parsed(done.stdout), [path], np.asarray(expected), '0123456')


def test_averaged_parameters(predict, probabilities, workdir, photographs):
  paths = readable(photographs / '1')[:2]
  done = predict(f'--workdir={workdir}', *paths, '--json', '--ema')
  check(parsed(done.stdout), paths, probabilities(paths, OWN, ema=True), NAMES)


@pytest.mark.parametrize(
  ('arguments', 'message'),
  [
    (['{images}'], "which model? Either a run's --workdir=DIRECTORY or --weights=FILE"),
    (['--workdir={run}', '--weights={weights}', '{images}'], 'which model? Either'),
    (['--workdir={run}'], 'which images? Name files or folders of them'),
    (['--workdir={run}', '{tmp}'], 'no images in {tmp} (looked for .jpg, '),
    (['--workdir={tmp}/no', '{images}'], '{tmp}/no does not exist; give a .pth or'),
    (['--workdir={tmp}', '{images}'], 'there is no checkpoint in {tmp}; give the --workdir'),
    (['--weights={tmp}/no.pth', '{images}'], '{tmp}/no.pth does not exist'),
    (['--weights={weights}', '--ema', '{images}'], 'has no averaged weights'),
    (['--workdir={run}', '--top=0', '{images}'], '--top=0: 0 is not a positive integer'),
    (['--workdir={run}', '--labels={tmp}/no', '{images}'], 'read --labels={tmp}/no: No such file'),
    (['--workdir={run}', '--labels={tmp}/b', '{images}'], 'read --labels={tmp}/b: not UTF-8'),
    (
      ['--workdir={run}', '--labels={tmp}/names.txt', '{images}'],
      '--labels={tmp}/names.txt has 2 lines for 7 classes',
    ),
    (
      ['--workdir={mae}', '{images}'],
      'step 40 of {mae} is mae_hivit_tiny, which has no classifier. Finetune it first: '
      'python main.py --config=configs/finetune_hivit_b.py --config.init={mae}',
    ),
  ],
)
def test_mistakes_are_one_line_and_change_nothing(
  predict, workdir, weights, finished, photographs, tmp_path, arguments, message
):
  (tmp_path / 'names.txt').write_text('ant\nbee\n')
  (tmp_path / 'b').write_bytes(b'\xff\xfe\xfd')
  before = content(workdir)
  fill = functools.partial(
    str.format, tmp=tmp_path, run=workdir, weights=weights, mae=finished.workdir, images=photographs
  )
  assert fill(message) in error_of(predict(*map(fill, arguments)))
  assert content(workdir) == before


# The contact sheet


def places(canvas: np.ndarray, image: np.ndarray) -> list[tuple[int, int]]:
  """Where an image (H, W, 3) is in a larger one."""
  h, w, _ = image.shape
  return [
    (int(y), int(x))
    for y, x in np.argwhere((canvas[: 1 - h, : 1 - w] == image[0, 0]).all(axis=-1))
    if np.array_equal(canvas[y : y + h, x : x + w], image)
  ]


def test_the_sheet_shows_what_the_model_saw(predict, workdir, photographs, tmp_path):
  paths = readable(photographs / '1')[:3]
  out = tmp_path / 'sheet.png'
  done = predict(f'--workdir={workdir}', *paths, f'--save={out}')
  assert done.status == 0, done.stderr
  assert done.stderr.endswith(f'wrote {out}\n')
  assert len(done.stdout.splitlines()) == 3 * 6
  with Image.open(out) as sheet:
    canvas = np.asarray(sheet)
  found = []
  for path in paths:
    image = pixels(path, SIZE)
    found += places(canvas, image.repeat(4, axis=0).repeat(4, axis=1))
  (top, left), (same_top, right), (below, same_left) = found
  assert top == same_top
  assert left == same_left
  assert right - left > 4 * 48
  assert below - top > 4 * 32 + 6 * 16  # with a name and five classes in between


def test_a_sheet_that_cannot_be_written_is_told_after_the_predictions(
  predict, workdir, photographs, tmp_path
):
  path = readable(photographs)[0]
  done = predict(f'--workdir={workdir}', path, f'--save={tmp_path}/no/sheet.png', '--json')
  assert done.status == 2
  assert len(parsed(done.stdout)) == 1
  last = done.stderr.splitlines()[-1]
  assert last == f'error: cannot write --save={tmp_path}/no/sheet.png: No such file or directory'


@pytest.mark.parametrize('channels', [1, 3])
@pytest.mark.parametrize('size', [(32, 32), (224, 224), (16, 160)])
def test_texts_and_bars_of_a_sheet(monkeypatch, channels, size):
  drawn, bars = [], []
  text, rectangle = ImageDraw.ImageDraw.text, ImageDraw.ImageDraw.rectangle

  def draw_text(self, xy, text_, fill=None, font=None, anchor='la'):
    left, _, right, bottom = font.getbbox(text_, anchor=anchor)
    assert xy[0] + left >= 0
    assert xy[0] + right <= self.im.size[0]
    assert xy[1] + bottom <= self.im.size[1]
    drawn.append(text_)
    return text(self, xy, text_, fill, font, anchor)

  def draw_bar(self, box, fill=None):
    bars.append(box[2] - box[0])
    return rectangle(self, box, fill)

  monkeypatch.setattr(ImageDraw.ImageDraw, 'text', draw_text)
  monkeypatch.setattr(ImageDraw.ImageDraw, 'rectangle', draw_bar)
  image = np.zeros((*size, channels), np.uint8)
  classes = [('a cat', 0.75), ('a long name ' * 30, 0.25)]
  contact_sheet.draw(
    [contact_sheet.Predicted(f'/photos/{i}.jpg', image, classes) for i in range(7)]
  )
  assert [name for name in drawn if name.endswith('.jpg')] == [f'{i}.jpg' for i in range(7)]
  assert drawn.count('a cat') == drawn.count('75.0 %') == drawn.count('25.0 %') == 7
  assert sum(name.startswith('a long name a') and name.endswith('...') for name in drawn) == 7
  assert bars[0] == pytest.approx(3 * bars[1], abs=2)
  assert bars[0] > 100
