"""Inference on images of any size against mmsegmentation's: windows, scales, mirroring, means."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from PIL import Image

from hivit_jax.data.segmentation_transforms import ClassMap
from hivit_jax.errors import UserError
from hivit_jax.models import resize
from hivit_jax.tasks import images, segmentation, views
from hivit_jax.tasks.segment import SegmentTask
from tests.helpers import abstract_model, assert_close, golden_params, load_golden

CONFIG, ARRAYS = load_golden('segmentation_inference.npz')
CROP, STRIDE = tuple(CONFIG['crop_size']), tuple(CONFIG['stride'])
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
TOLERANCE = 5e-5


def _task(**options):
  task = {'inference': 'slide', 'stride': STRIDE, 'num_classes': 5, 'image_size': CROP}
  return SegmentTask(mean=MEAN, std=STD, **task | options)


def _model(whole: bool = False, image_size=CROP):
  """Static half and parameters."""
  backbone, head = CONFIG['whole_backbone' if whole else 'backbone'], CONFIG['decode_head']
  graphdef, abstract = abstract_model(
    'segment_hivit_tiny',
    image_size=image_size,
    position_image_size=backbone['img_size'],
    embed_dim=backbone['embed_dim'],
    depths=tuple(backbone['depths']),
    num_heads=backbone['num_heads'],
    rpe=backbone['rpe'],
    num_classes=head['num_classes'],
    head_channels=head['channels'],
    auxiliary_channels=CONFIG['auxiliary_head']['channels'],
  )
  prefix = 'whole_param/' if whole else 'param/'
  given = {k.replace(prefix, 'param/'): v for k, v in ARRAYS.items() if k.startswith(prefix)}
  unused = {name.removeprefix('param/') for name in given if name.endswith('position_index')}
  return graphdef, golden_params(abstract, given, unused)


def _nhwc(x):
  return np.moveaxis(x, -3, -1)


def _softmax(x):
  return np.asarray(jax.nn.softmax(x, axis=-1))


def _joined(logits: np.ndarray, view: views.View, size) -> np.ndarray:
  """The logits of a view at a size, from those of its windows."""
  rows, columns = views.matrices(view, CROP, size)
  _, h, w, classes = logits.shape
  x = logits.reshape(len(view.tops), -1, h, w, classes).swapaxes(1, 2)
  x = x.reshape(rows.shape[1], columns.shape[1], classes)
  return np.einsum('Hh,hwk,Ww->HWk', rows, x, columns, optimize=True)


def test_windows_slide_as_published():
  names = [name for name in ARRAYS if name.startswith('boxes_640_426/')]
  assert len(names) == 5
  for name in names:
    height, width = map(int, name.split('/')[1].split('x'))
    found = [
      (top, top + 640, left, left + 640)
      for top in views.starts(height, 640, 426)
      for left in views.starts(width, 640, 426)
    ]
    assert found == [tuple(box) for box in ARRAYS[name]], name


def test_views_have_the_sizes_and_weights_of_the_published_scales():
  golden = load_golden('segmentation_transforms.npz')[0]['setr_sizes_2560_640']
  scales = (0.5, 0.75, 1.0, 1.25, 1.5, 1.75)
  found = views.Views((640, 640), 'slide', scales=scales, flip=True)
  for height, width in {(row[0], row[1]) for row in golden}:
    sizes = [(h, w) for a, b, _, h, w in golden if (a, b) == (height, width)]
    if (height, width) == (300, 2400):
      continue  # checked below: the longer side is limited to 2560 * ratio there
    own = found.of((height, width))
    assert {view.size for view in own} == set(sizes)
    for view in own:
      assert view.weight == pytest.approx(sizes.count(view.size) / 12)
  assert sum(view.weight for view in own) == pytest.approx(1)


@pytest.mark.parametrize(
  ('options', 'said'),
  [
    ({}, 'slide 64x64, stride 43x43, scale 1'),
    ({'scales': (0.5, 1.0, 1.75)}, 'slide 64x64, stride 43x43, scales 0.5 1 1.75'),
    ({'mirrored': True}, 'slide 64x64, stride 43x43, scale 1, mirrored'),
    ({'inference': 'whole'}, 'whole 64x64'),
  ],
)
def test_views_say_what_a_score_was_measured_with(options, said):
  assert str(_task(**options).views) == said


def test_sliding_windows():
  graphdef, params = _model()
  image = _nhwc(ARRAYS['slide/image_nchw'])[0]
  size = image.shape[:2]
  view = views.View(
    size, False, 1.0, *(views.starts(*sides) for sides in zip(size, CROP, STRIDE, strict=True))
  )
  assert [
    (top, top + CROP[0], left, left + CROP[1]) for top in view.tops for left in view.lefts
  ] == [tuple(box) for box in ARRAYS['slide/boxes_y1y2x1x2']]

  def windows(image):
    return [image[t : t + CROP[0], x : x + CROP[1]] for t in view.tops for x in view.lefts]

  run = jax.jit(lambda params, x: nnx.merge(graphdef, params)(x))
  both = np.stack([*windows(image), *windows(image[:, ::-1])])
  logits, mirrored = np.split(np.asarray(run(params, both)), 2)
  first = resize.bilinear(logits[:1], CROP)
  assert_close(first, _nhwc(ARRAYS['slide/first_crop_logits']), relative=TOLERANCE)
  out = tuple(CONFIG['slide_ori_shape'])
  for name, at in (('logits', size), ('rescaled_logits', out)):
    expected = _nhwc(ARRAYS[f'slide/{name}'])[0]
    assert_close(_joined(logits, view, at), expected, name=name, relative=TOLERANCE)
  found = _softmax(_joined(logits, view, out))
  assert_close(found, _nhwc(ARRAYS['slide/probabilities'])[0], relative=TOLERANCE)
  np.testing.assert_array_equal(found.argmax(-1), ARRAYS['slide/prediction'][0])
  found = _softmax(_joined(mirrored, view._replace(mirrored=True), out))
  assert_close(found, _nhwc(ARRAYS['slide/flipped_probabilities'])[0], relative=TOLERANCE)


def test_a_whole_image():
  """Padded to the model's size; the padding is cut away before resizing."""
  image = _nhwc(ARRAYS['whole/image_nchw'])
  crop, out = image.shape[1:3], tuple(CONFIG['whole_ori_shape'])
  graphdef, params = _model(whole=True, image_size=crop)
  logits = jax.jit(lambda params, x: nnx.merge(graphdef, params)(x))(params, image)
  enlarged = resize.bilinear(logits, crop)
  assert_close(enlarged, _nhwc(ARRAYS['whole/logits']), relative=TOLERANCE)
  sizes = (
    ((0,), crop[0], CONFIG['whole_img_shape'][0]),
    ((0,), crop[1], CONFIG['whole_img_shape'][1]),
  )
  rows, columns = (views.matrix(*along, side) for along, side in zip(sizes, out, strict=True))
  found = np.einsum('Hh,hwk,Ww->HWk', rows, logits[0], columns)
  assert_close(found, _nhwc(ARRAYS['whole/rescaled_logits'])[0], relative=TOLERANCE)
  assert_close(_softmax(found), _nhwc(ARRAYS['whole/probabilities'])[0], relative=TOLERANCE)


def test_all_scales_and_mirrored(monkeypatch):
  """The published twelve views, computed as eight, through all of `Segmentation`."""
  task = _task(scales=tuple(CONFIG['tta']['ratios']), mirrored=True)
  image = ARRAYS['tta/image_rgb']
  resized = {  # by OpenCV, which reduces and enlarges otherwise
    tuple(map(int, name.split('/')[1].split('x')[::-1])): ARRAYS[name]
    for name in ARRAYS
    if name.endswith('/image_rgb') and name.count('/') == 2
  }

  monkeypatch.setattr(
    Image.Image, 'resize', lambda self, size, resample: Image.fromarray(resized[size])
  )
  example = _unlabelled(task)({'image': image})
  monkeypatch.undo()
  graphdef, params = _model()
  segment = segmentation.Segmentation(graphdef, task, 4, jax.local_devices()[:1])
  add, totals = segmentation._add_view, [np.zeros((), np.float32)]

  def recorded(*args):
    total = add(*args)
    totals.append(np.array(total))  # a copy: the next view takes its memory
    return total

  monkeypatch.setattr(segmentation, '_add_view', recorded)
  (found,) = segment(params, [example])
  height, width = image.shape[:2]
  shown, first = task.views.of((height, width)), 0
  normalised = images.normalize_padded(example['windows'], example['extent'], MEAN, STD)
  for view, before, after in zip(shown, totals, totals[1:], strict=False):
    name = 'tta/{}x{}'.format(*view.size) + '_flip' * view.mirrored
    if not view.mirrored:
      corner = ARRAYS[f'{name}/image_normalised_0_0']
      assert_close(normalised[first, :4, :4], _nhwc(corner), name=name, relative=1e-6)
    first += len(view.tops) * len(view.lefts)
    own = ((after - before) / view.weight)[:height, :width]
    assert_close(own, _nhwc(ARRAYS[f'{name}/probabilities'])[0], name=name, relative=TOLERANCE)
  assert len(totals) == len(shown) + 1 == 9
  assert_close(
    totals[-1][:height, :width], _nhwc(ARRAYS['tta/mean_probabilities'])[0], relative=TOLERANCE
  )
  np.testing.assert_array_equal(found[:height, :width], ARRAYS['tta/prediction'])


def test_images_of_many_sizes_share_few_programs():
  """One for each pair of rounded sides and number of windows, whatever the sizes and scales."""
  task = _StubTask(image_size=(16, 16), stride=(16, 16), num_classes=2, mirrored=True)
  graphdef, params = nnx.split(nnx.Linear(1, 1, rngs=nnx.Rngs(0)))
  segment = segmentation.Segmentation(graphdef, task, 4, jax.local_devices()[:1])
  sizes = [(h, w) for h in range(33, 49, 3) for w in range(33, 65, 8)]
  assert len(sizes) == 24
  made = _unlabelled(task)
  examples = [made({'image': np.zeros((*size, 3), np.uint8)}) for size in sizes]
  before = segmentation._add_view._cache_size()
  for size, found in zip(sizes, segment(nnx.to_pure_dict(params), examples), strict=True):
    assert found.shape == tuple(map(segmentation.bucket, size))
  views_of = {size: task.views.of(size)[0] for size in sizes}
  shared = {
    (*map(segmentation.bucket, size), len(view.tops), len(view.lefts))
    for size, view in views_of.items()
  }
  assert segmentation._add_view._cache_size() - before <= len(shared) <= 6


@dataclasses.dataclass(frozen=True, kw_only=True)
class _StubTask(SegmentTask):
  """Segmentation with logits that cost nothing."""

  mean: tuple[float, ...] = MEAN
  std: tuple[float, ...] = STD
  inference: str = 'slide'

  def logits(self, model, windows, extent):
    return jnp.zeros((len(windows), 4, 4, self.num_classes))


def _unlabelled(task):
  """The views of a task for images without label maps."""
  return views.Views(task.image_size, task.inference, task.stride, task.scales, task.mirrored, None)


@pytest.mark.parametrize('channels', [3, 1])
def test_images_smaller_than_the_crop_and_their_padding(channels):
  """A whole image that does not fill the crop: what is beyond it is the mean colour, and cut."""
  made = views.Views((64, 64), classes=ClassMap(5), channels=channels)(
    {
      'image': np.full((30, 60, 3), 200, np.uint8),
      'segmentation': np.zeros((30, 60), np.uint8),
    }
  )
  assert made['windows'].shape == (1, 64, 64, channels)
  assert made['image'].shape == (30, 60, channels)
  assert made['extent'].tolist() == [[32, 64]]
  assert made['label_map'].shape == (30, 60)
  shown = images.normalize_padded(made['windows'], made['extent'], MEAN, STD)
  assert np.abs(shown[0, 32:]).max() == 0
  assert np.abs(shown[0, :32]).min() > 0.5


@pytest.mark.parametrize('side', [1, 64, 65, 128, 300, 683, 1024, 2000])
def test_sides_are_rounded_up_to_few(side):
  assert side <= segmentation.bucket(side) <= max(16, side * 1.25)
  assert len({segmentation.bucket(i) for i in range(64, 2049)}) <= 25


@pytest.mark.parametrize(
  ('options', 'message'),
  [
    ({'inference': 'windows'}, 'inference=windows: expected one of whole, slide'),
    ({'inference': 'whole', 'scales': (1.0, 1.5)}, 'several take inference=slide'),
    ({'scales': ()}, 'expected numbers above 0'),
    ({'stride': (0, 43)}, r'expected \(rows, columns\) from 1 to the crop'),
    ({'stride': (65, 43)}, r'expected \(rows, columns\) from 1 to the crop'),
    ({'class_weights': (1.0, 2.0)}, '2 numbers for 5 classes'),
    ({'mean_over': 'some'}, 'mean_over=some: expected one of all, labelled'),
    ({'ignore_index': 4}, 'expected a number that is no class'),
  ],
)
def test_mistakes(options, message):
  with pytest.raises(UserError, match=message):
    _task(**options)
