"""UPerNet against mmsegmentation, as a share of each array's largest magnitude; see test_golden."""

import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from hivit_jax.errors import UserError
from hivit_jax.interop import exporter, infer, torch_names
from hivit_jax.models import resize
from hivit_jax.models.convolutions import BatchNorm
from hivit_jax.models.upernet import FCNHead, UPerHead
from hivit_jax.ops import conv
from hivit_jax.tasks import pixels
from tests.helpers import (
  GOLDEN,
  abstract_model,
  assert_close,
  golden_params,
  load_golden,
  random_images,
  random_model,
  torch_gradients,
)

TOLERANCE = {'float64': 1e-5, 'float32': 5e-5}
IGNORED = 255


class Heads(nnx.Module):
  """Both heads without an encoder."""

  def __init__(self, config: dict, dtype: str):
    options = {'rate': 0.1, 'rngs': nnx.Rngs(0), 'dtype': jnp.dtype(dtype)}
    main, second = config['decode_head'], config['auxiliary_head']
    classes = main['num_classes']
    self.decode_head = UPerHead(main['in_channels'], main['channels'], classes, **options)
    self.auxiliary_head = FCNHead(second['in_channels'], second['channels'], classes, **options)


def _nhwc(x: np.ndarray) -> np.ndarray:
  return np.moveaxis(x, -3, -1)


def _nchw(x: jax.Array) -> np.ndarray:
  return np.moveaxis(np.asarray(x), -1, -3)


def _losses(logits, auxiliary, labels):
  """By mmsegmentation's names, and its total."""
  found, total = {}, 0.0
  for name, weight, own in (('decode', 1.0, logits), ('aux', 0.4, auxiliary)):
    loss, right = pixels.cross_entropy(own, labels, ignore_index=IGNORED)
    found[f'{name}.loss_ce'] = weight * loss / labels.size
    found[f'{name}.acc_seg'] = 100 * right[None] / (labels != IGNORED).sum()
    total += found[f'{name}.loss_ce']
  return total, found | {'total': total}


def _run(graphdef, params, dtype, function, *inputs):
  """Of `function(model, *inputs) -> (value, results)`: gradients, results, statistics then."""

  def loss(params, *inputs):
    model = nnx.merge(graphdef, params)
    value, results = function(model, *inputs)
    return value, (results, nnx.to_pure_dict(nnx.state(model, nnx.BatchStat)))

  with jax.enable_x64(dtype == 'float64'):
    params = jax.tree.map(lambda x: np.asarray(x, dtype), params)
    of = tuple(range(1 + len(inputs)))
    return jax.device_get(jax.jit(jax.grad(loss, of, has_aux=True))(params, *inputs))


@pytest.mark.parametrize('dtype', TOLERANCE)
def test_heads(dtype):
  config, arrays = load_golden('upernet.npz')
  graphdef, abstract = nnx.split(nnx.eval_shape(lambda: Heads(config, dtype)))
  params = golden_params(nnx.to_pure_dict(abstract), arrays, set())
  labels = arrays['label']
  close = lambda name, value: assert_close(  # noqa: E731
    value, arrays[name], name=name, relative=TOLERANCE[dtype]
  )
  maps = [_nhwc(arrays[f'feature_{i}']).astype(dtype) for i in range(4)]

  def evaluated(model):
    head = model.decode_head
    logits, auxiliary = head(maps, train=False), model.auxiliary_head(maps[2], train=False)
    pooled = {f'eval/pooled_{s}': resize.adaptive_mean(maps[3], s) for s in (1, 2, 3, 6)}
    branches = {
      f'eval/ppm_{s}': branch[1](pooled[f'eval/pooled_{s}'], train=False)
      for s, branch in zip((1, 2, 3, 6), head.psp_modules, strict=True)
    }
    return 0.0, pooled | branches | {
      'eval/psp': head.pyramid(maps[3], train=False),
      'eval/fpn': head.fused(maps, train=False),
      'eval/logits': logits,
      'eval/aux_logits': auxiliary,
      'large': resize.bilinear(logits, labels.shape[1:]),
      'auxiliary': resize.bilinear(auxiliary, labels.shape[1:]),
    }

  _, (found, statistics) = _run(graphdef, params, dtype, evaluated)
  large, second = found.pop('large'), found.pop('auxiliary')
  for name, value in found.items():
    close(name, _nchw(value))
  close('eval/resized_logits_0', _nchw(large[0]))
  close('eval/aux_resized_logits_0_class_0', second[0, ..., 0])
  np.testing.assert_array_equal(large.argmax(axis=-1), arrays['eval/prediction'])
  for name, value in torch_gradients(statistics).items():  # untouched
    close(f'param/{name}', value)

  def trained(model, maps):
    logits = model.decode_head(maps, train=True)
    auxiliary = model.auxiliary_head(maps[2], train=True)
    total, losses = _losses(logits, auxiliary, labels)
    return total, (losses, logits, auxiliary)

  (grads, of_maps), ((losses, logits, auxiliary), statistics) = _run(
    graphdef, params, dtype, trained, maps
  )
  for i in (2, 3):
    close(f'grad_feature_{i}', _nchw(of_maps[i]))
  for name, value in losses.items():
    close(f'train/{name}', value)
  close('train/accuracy_check', losses['decode.acc_seg'][0])
  close('train/logits', _nchw(logits))
  close('train/aux_logits', _nchw(auxiliary))
  labelled = (labels != IGNORED).mean()
  close('train/decode.loss_ce_avg_non_ignore', losses['decode.loss_ce'] / labelled)
  _check_statistics_and_gradients(statistics, grads, arrays, close)

  def dropped(model):
    noise = [np.where(arrays[f'dropout/{key}_mask'] > 0, 0.5, 0.95) for key in ('decode', 'aux')]
    logits = model.decode_head(maps, noise[0], train=True)
    total, losses = _losses(logits, model.auxiliary_head(maps[2], noise[1], train=True), labels)
    return total, losses

  _, (losses, _) = _run(graphdef, params, dtype, dropped)
  for name, value in losses.items():
    close(f'dropout/{name}', value)


def _check_statistics_and_gradients(statistics, grads, arrays, close):
  states = torch_gradients(statistics)
  assert {f'train/state/{name}' for name in states} == {
    name for name in arrays if name.startswith('train/state/')
  }
  for name, value in states.items():
    close(f'train/state/{name}', value)
  grads = {name: x for name, x in torch_gradients(grads).items() if 'running_' not in name}
  assert {f'grad/{name}' for name in grads} == {n for n in arrays if n.startswith('grad/')}
  for name, value in grads.items():
    close(f'grad/{name}', value)


def _segmenter(config: dict, **options):
  """Static half and parameters' shapes of the model of a golden file."""
  backbone, head = config['backbone'], config['decode_head']
  keys = ('embed_dim', 'num_heads', 'stem_mlp_ratio', 'mlp_ratio', 'rpe')
  size = backbone['task_img_size'] if backbone['rpe'] else tuple(config['input_hw'])
  return abstract_model(
    'segment_hivit_tiny',
    image_size=size,
    position_image_size=backbone['img_size'],
    depths=tuple(backbone['depths']),
    num_classes=head['num_classes'],
    head_channels=head['channels'],
    auxiliary_channels=config['auxiliary_head']['channels'],
    **{key: backbone[key] for key in keys},
    **options,
  )


@pytest.mark.parametrize(
  ('name', 'options', 'dtype'),
  [
    ('segmentation_model', {}, 'float64'),
    ('segmentation_model', {}, 'float32'),
    ('segmentation_model_norpe', {'scan': True, 'remat': True}, 'float64'),
  ],
)
def test_model(name, options, dtype):
  config, arrays = load_golden(f'{name}.npz')
  graphdef, abstract = _segmenter(config, dtype=dtype, **options)
  unused = {'backbone.relative_position_index'} if config['backbone']['rpe'] else set()
  params = golden_params(abstract, arrays, unused)
  images, labels = _nhwc(arrays['image_nchw']).astype(dtype), arrays['label']
  close = lambda name, value: assert_close(  # noqa: E731
    value, arrays[name], name=name, relative=TOLERANCE[dtype]
  )

  def trained(model):
    results = {f'eval/feature_{i}': x for i, x in enumerate(model.backbone(images))}
    results['eval/logits'], results['eval/aux_logits'] = model.heads(images, train=False)
    logits, auxiliary = model.heads(images)
    total, losses = _losses(logits, auxiliary, labels)
    return total, (results, losses, logits)

  (grads,), ((found, losses, logits), statistics) = _run(graphdef, params, dtype, trained)
  for key, value in found.items():
    close(key, _nchw(value))
  large = np.asarray(resize.bilinear(np.asarray(found['eval/logits']), labels.shape[1:]))
  close('eval/full_logits_0_class_1', large[0, ..., 1])
  np.testing.assert_array_equal(large.argmax(axis=-1), arrays['eval/prediction'])
  for key, value in losses.items():
    close(f'train/{key}', value)
  close('train/logits', _nchw(logits))
  _check_statistics_and_gradients(statistics, grads, arrays, close)


def test_names_and_size_are_those_of_the_official_model():
  """But for constants and counters of steps."""
  file = GOLDEN / 'state_dict_names_segmentation_base.json'
  expected = json.loads(file.read_text())['upernet_hivit_base_80k_ade20k']
  _, params = abstract_model('segment_hivit_base', image_size=640)
  ours = {}
  for path, leaf in torch_names.flatten(params).items():
    name, value = torch_names.to_torch(path, np.broadcast_to(np.float32(0), leaf.shape))
    ours[name] = list(value.shape)
  unused = ('relative_position_index', 'num_batches_tracked')
  assert ours == {name: shape for name, shape in expected.items() if not name.endswith(unused)}
  trained = [math.prod(shape) for name, shape in ours.items() if '.running_' not in name]
  assert sum(trained) == 179_726_156


def test_pooling_and_resizing():
  _, arrays = load_golden('upernet.npz')
  for name, expected in arrays.items():
    if name.startswith('pool/') and not name.endswith('input'):
      _, size, cells = name.split('/')
      found = resize.adaptive_mean(_nhwc(arrays[f'pool/{size}/input']), int(cells))
      assert_close(_nchw(found), expected, name=name, relative=1e-6)
    if name.startswith('resize/') and not name.endswith('input'):
      size = tuple(map(int, name.split('/')[1].split('x')))
      found = resize.bilinear(_nhwc(arrays['resize/input']), size)
      assert_close(_nchw(found), expected, name=name, relative=1e-6)


def test_a_convolution_in_bfloat16_sums_its_gradient_in_float32():
  x, g = (jnp.asarray(random_images(2, 6, 5, 3, seed=s), jnp.bfloat16) for s in (0, 1))
  kernel = jnp.asarray(random_images(3, 3, 3, 3))
  fast = jax.vjp(conv.fast, x, kernel)[1](g)
  plain = jax.vjp(conv.plain, x, kernel)[1](g)
  wide = jax.vjp(conv.plain, x.astype(jnp.float32), kernel)[1](g.astype(jnp.float32))
  np.testing.assert_array_equal(fast[0], plain[0])
  assert_close(fast[1], wide[1], relative=1e-6)
  assert np.abs(plain[1] - wide[1]).max() > 1e-3  # what is prevented


def test_batch_norm_has_means_of_the_batch_and_an_unbiased_variance():
  x = random_images(3, 2, 2, 4) * 3 + 5
  norm = BatchNorm(4)
  out = norm(jnp.asarray(x), train=True)
  rows = x.reshape(-1, 4)
  assert_close(out.reshape(-1, 4), (rows - rows.mean(0)) / rows.std(0), relative=1e-5)
  assert_close(norm.mean[...], 0.1 * rows.mean(0), relative=1e-6)
  assert_close(norm.var[...], 0.9 + 0.1 * rows.var(0, ddof=1), relative=1e-6)


def test_dropout_drops_channels_of_single_examples():
  graphdef, params = random_model(
    'segment_hivit_tiny', image_size=32, position_image_size=32, embed_dim=16, depths=(1, 1, 1),
    num_heads=2, num_classes=3, head_channels=8, auxiliary_channels=4, dropout_rate=0.5,
  )  # fmt: skip
  params = jax.tree.map(jnp.abs, params)
  model = nnx.merge(graphdef, params)
  images = random_images(2, 32, 32, 3)
  noise = jnp.zeros((2, 12)).at[0].set(0.9)
  one, two = jax.jit(lambda m, n: m.heads(images, dropout_noise=n, train=False))(model, noise)
  plain = jax.jit(lambda m: m.heads(images, train=False))(model)
  for dropped, kept, head in zip(
    (one, two), plain, (model.decode_head, model.auxiliary_head), strict=True
  ):
    bias = head.conv_seg.bias[...]
    np.testing.assert_array_equal(dropped[0], jnp.broadcast_to(bias, dropped[0].shape))
    assert_close(dropped[1] - bias, 2 * (kept[1] - bias), relative=1e-5)


@pytest.mark.parametrize(
  ('options', 'message'),
  [
    ({'num_classes': 1}, 'num_classes must be 2 or more'),
    ({'head_channels': 0}, 'head_channels=0'),
    ({'dropout_rate': 1.0}, 'dropout_rate must be'),
    ({'position_image_size': 100}, 'multiples of 16'),
  ],
)
def test_mistakes(options, message):
  with pytest.raises(UserError, match=message):
    abstract_model('segment_hivit_tiny', **options)


ENCODERS = {
  'segment_hivit_tiny': {
    'position_image_size': 32, 'embed_dim': 16, 'depths': (1, 1, 1), 'num_heads': 2,
  },
  'segment_vit_base': {'embed_dim': 16, 'depth': 3, 'num_heads': 2},
  'segment_swin_base': {
    'embed_dim': 8, 'depths': (1, 1, 1, 1), 'num_heads': (1, 1, 1, 1), 'window_size': 2,
  },
}  # fmt: skip
HEADS = {'head_channels': 8, 'auxiliary_channels': 4}, {'linear_levels': (1, 3)}


@pytest.mark.parametrize('name', ENCODERS)
def test_every_encoder_takes_either_head(name):
  """All parameters have a gradient, and the arrays of a model tell which one it is."""
  images = jnp.asarray(random_images(2, 64, 64, 3))
  for head in HEADS:
    options = ENCODERS[name] | head | {'image_size': 64, 'num_classes': 3}
    graphdef, params = random_model(name, **options)
    logits = jax.eval_shape(lambda p, g=graphdef: nnx.merge(g, p)(images), params)
    assert logits.shape == (2, 16, 16, 3)
    heads = {key: options[key] for key in ('num_heads',) if name != 'segment_swin_base'}
    described = infer.describe(exporter.named_arrays(params), 'it', image_size=64, **heads)
    assert described.name.rsplit('_', 1)[0] == name.rsplit('_', 1)[0]
    assert head.items() <= described.arguments.items()
    # A linear head is the only part that is not the encoder's.
    parts = {path[0] for path in torch_names.flatten(params)}
    assert ('linear_levels' in head) == (parts == {'backbone', 'decode_head'})
  graphdef, params = random_model(name, **ENCODERS[name] | HEADS[0] | {'image_size': 64})

  @jax.jit
  def gradients(params):
    return jax.grad(lambda p: sum(map(jnp.sum, nnx.merge(graphdef, p).heads(images))))(params)

  for path, value in torch_names.flatten(gradients(params)).items():
    assert path[-1] in ('mean', 'var') or np.any(value), path


def test_a_linear_head_is_one_classifier_of_all_its_levels():
  """By the definition: maps enlarged, normalised by the batch, joined, and one product."""
  graphdef, params = random_model(
    'segment_hivit_tiny', **ENCODERS['segment_hivit_tiny'], image_size=64, num_classes=3,
    linear_levels=(1, 3),
  )  # fmt: skip
  model = nnx.merge(graphdef, params)
  images = jnp.asarray(random_images(2, 64, 64, 3))
  fine, _, coarse, _ = model.backbone(images)
  found, _ = model.heads(images)
  rows = [(x - x.mean((0, 1, 2))) / np.sqrt(x.var((0, 1, 2)) + 1e-6) for x in (fine, coarse)]
  joined = np.concatenate([rows[0], resize.bilinear(rows[1], (16, 16))], axis=-1)
  head, old = model.decode_head, params['decode_head']
  assert_close(found, joined @ head.conv_seg.kernel[...][0, 0] + head.conv_seg.bias[...])
  mean = 0.9 * old['norm3']['mean'] + 0.1 * coarse.mean((0, 1, 2))
  assert_close(head.norm3.mean[...], mean)
