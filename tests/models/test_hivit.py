"""HiViT: sizes, names, initialisation, what sees what, and every option of the encoder."""

import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from scipy import stats

import hivit_jax
from hivit_jax.errors import UserError
from hivit_jax.interop import torch_names
from hivit_jax.models import layers, positions
from hivit_jax.models.units import join_units, split_units, to_rows_and_columns, unit_patches
from hivit_jax.ops.gelu import gelu
from hivit_jax.ops.modules import layer_norm
from hivit_jax.planning.flops import matmul_flops
from tests.helpers import (
  GOLDEN,
  TINY,
  TINY_MAE,
  abstract_model,
  assert_close,
  assert_trees_close,
  equations,
  marks_of,
  random_images,
  random_model,
)

# The classifiers and mae_hivit_base as published; the others follow from the architecture.
PARAMETERS = {
  'hivit_tiny': 19_181_668,
  'hivit_small': 37_526_464,
  'hivit_base': 66_418_952,
  'hivit_large': 290_712_328,
  'mae_hivit_tiny': 39_544_480,
  'mae_hivit_small': 57_845_536,
  'mae_hivit_base': 87_041_152,
  'mae_hivit_large': 311_765_824,
  # Without head, final norm and relative position bias, which dense users switch on.
  'backbone_hivit_tiny': 18_752_160,
  'backbone_hivit_small': 37_053_216,
  'backbone_hivit_base': 65_788_288,
  'backbone_hivit_large': 289_591_872,
  # With a feature pyramid; autoencoders as published.
  'backbone_itpn_base': 82_604_160,
  'backbone_itpn_large': 292_450_624,
  'mae_itpn_base': 108_493_344,
  'mae_itpn_large': 318_339_808,
  # As published, beside the bias of the keys, C for each transformer block.
  'fast_itpn_tiny': 24_219_976 + 12 * 384,
  'fast_itpn_small': 39_902_920 + 20 * 384,
  'fast_itpn_base': 84_825_192 + 24 * 512,
  'fast_itpn_large': 312_063_400 - (256 - 196) * 768 + 40 * 768,  # published for 256 pixels
  'backbone_fast_itpn_tiny': 23_838_816,
  'backbone_fast_itpn_small': 39_524_832,
  'backbone_fast_itpn_base': 84_323_456,
  'backbone_fast_itpn_large': 311_277_504,
  # Mask R-CNN of 80 classes; its 2048 running statistics are counted, too.
  'detect_hivit_tiny': 40_243_664,
  'detect_hivit_small': 58_544_720,
  'detect_hivit_base': 87_370_608,
  'detect_hivit_large': 311_355_824,
  'detect_vit_base': 110_214_832,
  'detect_vit_large': 329_962_480,
  'detect_swin_tiny': 49_108_394,
  'detect_swin_small': 70_426_298,
  'detect_swin_base': 108_455_592,
  # For crops of 224 pixels, with the running statistics.
  'segment_hivit_tiny': 129_532_072,
  'segment_hivit_small': 147_876_868,
  'segment_hivit_base': 178_869_324,
  'segment_hivit_large': 407_362_636,
  'segment_swin_tiny': 143_368_678,
  'segment_swin_small': 164_686_582,
  'segment_swin_base': 206_525_156,
  'segment_vit_base': 211_284_268,
  'segment_vit_large': 439_077_676,
  # As published, with the fixed position embeddings of the autoencoders.
  'vit_base': 86_567_656,
  'vit_large': 304_326_632,
  'mae_vit_base': 111_907_840,
  'mae_vit_large': 329_541_888,
  'swin_tiny': 28_288_354,
  'swin_small': 49_606_258,
  'swin_base': 87_768_224,
  'swin_base_three_stages': 66_260_864,
  'swin_base_global': 66_440_064,
  'swin_base_mlp_stem': 65_776_040,
  'simmim_swin_tiny': 29_875_194,
  'simmim_swin_small': 51_186_186,
  'simmim_swin_base': 89_874_104,
}
MAE_BASE = 'mae_hivit_base_dec512d6b'  # the official name: of the decoder, 512 channels, 6 blocks


def _stages(graphdef, **options):
  return lambda params, images, **more: nnx.merge(graphdef, params).stages(
    images, **options, **more
  )


# --- sizes and names


def test_every_model_has_a_pinned_size():
  assert set(PARAMETERS) == set(hivit_jax.list_models())


@pytest.mark.parametrize('name', [pytest.param(name, marks=marks_of(name)) for name in PARAMETERS])
def test_parameter_count_is_exact(name):
  _, params = abstract_model(name)
  assert sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params)) == PARAMETERS[name]


@pytest.mark.parametrize(
  ('name', 'file'),
  [
    ('mae_vit_base', 'state_dict_names_mae_vit_base.json'),
    ('swin_base', 'state_dict_names_swin_base.json'),
  ],
)
def test_names_and_shapes_of_the_baselines_are_the_official_ones(name, file):
  """But for the constants in Swin's."""
  expected = json.loads((GOLDEN / file).read_text())
  _, params = abstract_model(name)
  ours = {}
  for path, leaf in torch_names.flatten(params).items():
    torch_name, value = torch_names.to_torch(path, np.empty(leaf.shape))
    ours[torch_name] = list(value.shape)
  assert ours.items() <= expected.items()
  assert all(
    name.endswith(('relative_position_index', 'attn_mask')) for name in expected.keys() - ours
  )


@pytest.mark.parametrize('official', ['hivit_tiny', 'hivit_small', 'hivit_base', MAE_BASE])
def test_names_and_shapes_are_those_of_the_official_state_dict(official):
  expected = json.loads((GOLDEN / 'state_dict_names.json').read_text())[official]
  _, params = abstract_model(official.removesuffix('_dec512d6b'))
  ours = {}
  for path, leaf in torch_names.flatten(params).items():
    name, value = torch_names.to_torch(path, np.broadcast_to(np.float32(0), leaf.shape))
    ours[name] = list(value.shape)
  buffers = {'relative_position_index'}  # a constant of the program here
  assert ours == {k: v for k, v in expected.items() if k.split('.')[-1] not in buffers}


# --- initialisation


@pytest.fixture(scope='module', params=['hivit_tiny', 'mae_hivit_tiny'])
def fresh(request):
  sizes = {
    'image_size': (64, 96),
    'embed_dim': 96,
    'depths': (1, 1, 2),
    'num_heads': 4,
    'rpe': True,
  }
  if request.param.startswith('mae'):
    sizes |= {'decoder_embed_dim': 64, 'decoder_depth': 1, 'decoder_num_heads': 2}

  def create(seed):
    model = hivit_jax.create_model(request.param, seed=seed, **sizes)
    return torch_names.flatten(nnx.to_pure_dict(nnx.state(model)))

  return request.param, create


def test_initial_distributions(fresh):
  name, create = fresh
  normal = []
  for path, leaf in create(seed=0).items():
    value, where = np.asarray(leaf, np.float64), '/'.join(path)
    assert leaf.dtype == jnp.float32, where
    if path[:2] == ('patch_embed', 'proj'):  # PyTorch's default of a convolution
      bound = 1 / math.sqrt(4 * 4 * 3)
      assert np.abs(value).max() < bound, where
      assert stats.kstest(value.ravel(), 'uniform', (-bound, 2 * bound)).pvalue > 1e-3, where
    elif path[-1] == 'scale':
      assert (value == 1).all(), where
    elif path[-1] == 'bias':
      assert (value == 0).all(), where
    elif where == 'decoder_pos_embed':
      np.testing.assert_array_equal(leaf, positions.sincos_2d(64, (4, 6)))
    elif where == 'absolute_pos_embed' and name.startswith('mae'):
      np.testing.assert_array_equal(leaf, positions.sincos_2d(96, (4, 6)))
    else:  # linear layers, position bias tables, the classifier's position embedding, mask token
      assert stats.kstest(value.ravel() / 0.02, 'norm').pvalue > 1e-3, where
      normal.append(value.ravel())
  normal = np.concatenate(normal)
  assert normal.size > 200_000
  assert stats.kstest(normal / 0.02, 'norm').pvalue > 1e-2
  assert np.abs(normal).max() > 4 * 0.02  # not cut at two standard deviations


def test_initial_values_are_a_function_of_the_seed(fresh):
  _, create = fresh
  first, again, other = create(seed=3), create(seed=3), create(seed=4)
  constant = ('bias', 'scale')
  seen = set()
  for path, value in first.items():
    np.testing.assert_array_equal(value, again[path])
    drawn = path[-1] not in constant or path[:2] == ('patch_embed', 'proj')
    if drawn and 'pos_embed' not in path[-1]:
      assert not np.array_equal(value, other[path]), path
      start = np.asarray(value).ravel()[:8].tobytes()
      assert start not in seen, f'{path} has the numbers of another parameter'
      seen.add(start)


# --- units


def test_units_are_in_row_major_order_and_join_again():
  images = np.arange(2 * 32 * 64 * 3).reshape(2, 32, 64, 3)
  units = split_units(images)
  assert units.shape == (2, 8, 16, 16, 3)
  for n in range(8):
    row, column = divmod(n, 4)
    expected = images[:, 16 * row : 16 * row + 16, 16 * column : 16 * column + 16]
    np.testing.assert_array_equal(units[:, n], expected)
  np.testing.assert_array_equal(join_units(units, (2, 4)), images)


def test_sub_patches_are_in_the_order_of_the_merges():
  """Four in sequence are the neighbours that a merge joins: (0,0), (1,0), (0,1), (1,1)."""
  units = np.arange(16 * 16 * 2).reshape(1, 1, 16, 16, 2)
  patches = unit_patches(units)
  corners = [(0, 0), (1, 0), (0, 1), (1, 1)]  # (row, column)
  places = [(2 * r2 + r1, 2 * c2 + c1) for r2, c2 in corners for r1, c1 in corners]
  grid = np.asarray(to_rows_and_columns(patches))
  for place, (row, column) in enumerate(places):
    pixels = units[0, 0, 4 * row : 4 * row + 4, 4 * column : 4 * column + 4].ravel()
    np.testing.assert_array_equal(patches[0, 0, place], pixels)
    np.testing.assert_array_equal(grid[0, 0, row, column], pixels)
  joined = to_rows_and_columns(np.arange(4).reshape(1, 1, 4, 1))
  assert np.asarray(joined)[0, 0, :, :, 0].tolist() == [[0, 2], [1, 3]]


@pytest.fixture(scope='module')
def rpe_model():
  return random_model('hivit_tiny', **TINY)


def test_stem_treats_units_independently(rpe_model):
  graphdef, params = rpe_model
  encode = jax.jit(_stages(graphdef))
  images = random_images(1, 64, 64, 3)
  changed = images.copy()
  changed[:, 16:32, 32:48] = random_images(1, 16, 16, 3, seed=1)  # unit 1 * 4 + 2
  before, after = encode(params, images), encode(params, changed)
  others = np.arange(16) != 6
  for x, y in zip(before[:2], after[:2], strict=True):
    np.testing.assert_array_equal(x[:, others], y[:, others])
    assert (x[:, 6] != y[:, 6]).all(axis=-1).all()
  # The main stage is where they meet.
  assert (np.asarray(before[2] != after[2])).any(axis=-1).all()


def test_dropped_units_leave_the_others_as_they_are(rpe_model):
  """Stem outputs of kept units are those of the whole image, in the order asked for; with every
  unit kept, in any order, the main stage's are too: positions and their biases move along."""
  graphdef, params = rpe_model
  encode = jax.jit(_stages(graphdef))
  images = random_images(2, 64, 64, 3)
  rng = np.random.default_rng(0)
  order = np.stack([rng.permutation(16) for _ in range(2)])
  whole = encode(params, images)
  permuted = encode(params, images, ids=order)
  some = encode(params, images, ids=order[:, :5])
  for level in range(3):
    expected = np.stack([np.asarray(x)[ids] for x, ids in zip(whole[level], order, strict=True)])
    assert_close(permuted[level], expected, name=f'stage {level + 1}')
    if level < 2:
      assert_close(some[level], expected[:, :5], name=f'stage {level + 1}, some')
  assert some[2].shape == (2, 5, 32)
  assert not np.allclose(some[2], permuted[2][:, :5], rtol=1e-2)


def test_masked_units_get_no_gradient_and_have_no_influence(rpe_model):
  graphdef, params = rpe_model
  images = random_images(2, 64, 64, 3)
  ids = np.array([[3, 7, 1, 12], [0, 15, 5, 6]])
  weights = [random_images(2, 4, *rest) for rest in ((16, 8), (4, 16), (32,))]

  def objective(images):
    outputs = _stages(graphdef)(params, images, ids=ids)
    return sum((w * x).sum() for w, x in zip(weights, outputs, strict=True)), outputs

  run = jax.jit(jax.value_and_grad(objective, has_aux=True))
  (_, outputs), gradient = run(images)
  gradient = np.asarray(split_units(gradient))
  kept = np.zeros((2, 16), bool)
  np.put_along_axis(kept, ids, True, axis=1)
  assert (gradient[kept] != 0).all()
  assert (gradient[~kept] == 0).all()

  units = np.array(split_units(images))
  units[~kept] = np.nan  # which any arithmetic with them would spread
  (_, poisoned), _ = run(np.asarray(join_units(units, (4, 4))))
  jax.tree.map(np.testing.assert_array_equal, outputs, poisoned)


def test_masking_saves_the_work_of_the_masked_units():
  """At 75 % masking under 30 % of the operations: as compiled, and of the matrix products."""
  graphdef, params = abstract_model(
    'mae_hivit_tiny', image_size=128, embed_dim=96, depths=(1, 1, 4), num_heads=4
  )
  images = jax.ShapeDtypeStruct((2, 128, 128, 3), jnp.float32)
  ids = jax.ShapeDtypeStruct((2, 16), jnp.int32)  # of 64

  def whole(params, images):
    return nnx.merge(graphdef, params).latent(images)

  def masked(params, images, ids):
    return nnx.merge(graphdef, params).latent(images, ids=ids)

  def compiled_flops(function, *args):
    return jax.jit(function).lower(*args).compile().cost_analysis()['flops']

  full = matmul_flops(whole, params, images)
  assert compiled_flops(whole, params, images) > 0.9 * full  # it counts them all
  assert matmul_flops(masked, params, images, ids) < 0.3 * full
  ratio = compiled_flops(masked, params, images, ids) / compiled_flops(whole, params, images)
  assert ratio < 0.3


# --- relative position bias


def test_bias_of_kept_units_is_a_part_of_the_whole_bias():
  table = np.random.default_rng(0).standard_normal((5 * 7, 2), np.float32)
  whole = np.asarray(positions.relative_position_bias(table, (3, 4)))
  ids = np.array([[5, 0, 11, 7], [2, 3, 4, 10]])
  masked = np.asarray(positions.relative_position_bias(table, (3, 4), ids))
  assert whole.shape == (2, 12, 12)
  assert masked.shape == (2, 2, 4, 4)
  for b in range(2):
    np.testing.assert_array_equal(masked[b], whole[:, ids[b]][:, :, ids[b]])


def test_rpe_can_be_switched_off():
  with_table = abstract_model('hivit_tiny', **TINY)[1]
  without = abstract_model('hivit_tiny', **TINY, rpe=False)[1]
  names = [set(torch_names.flatten(tree)) for tree in (with_table, without)]
  assert names[1] < names[0]
  assert {path[-1] for path in names[0] - names[1]} == {'relative_position_bias_table'}
  assert len(names[0] - names[1]) == 2  # one a main block


# --- images of other shapes


def _transposed(params, grid):
  """Parameters of the model that does to transposed images what `params` do to images."""
  rows, columns = grid

  def swap(path, leaf):
    leaf = np.asarray(leaf)
    names = [str(key.key) for key in path]
    if names[:2] == ['patch_embed', 'proj'] and names[-1] == 'kernel':
      return leaf.swapaxes(0, 1)
    if names[-1] == 'absolute_pos_embed':
      return leaf.reshape(1, rows, columns, -1).swapaxes(1, 2).reshape(leaf.shape)
    if names[-1] == 'relative_position_bias_table':
      table = leaf.reshape(2 * rows - 1, 2 * columns - 1, -1)
      return table.swapaxes(0, 1).reshape(leaf.shape)
    if names[1] in ('2', '5') and names[2] in ('norm', 'reduction'):  # merges: (1,0) <-> (0,1)
      return leaf.reshape(4, -1, *leaf.shape[1:])[np.array([0, 2, 1, 3])].reshape(leaf.shape)
    return leaf

  return jax.tree_util.tree_map_with_path(swap, params)


def test_non_square_images():
  """A 32x64 image and its transpose: the same numbers from correspondingly swapped parameters."""
  options = TINY | {'num_classes': 5}
  wide, params = random_model('hivit_tiny', **options | {'image_size': (32, 64)})
  high, _ = abstract_model('hivit_tiny', **options | {'image_size': (64, 32)})
  images = random_images(2, 32, 64, 3)

  def run(graphdef):
    def function(params, images):
      model = nnx.merge(graphdef, params)
      stages = model.stages(images)
      return *map(to_rows_and_columns, stages[:2]), stages[2], model(images)

    return jax.jit(function)

  first, second, tokens, logits = run(wide)(params, images)
  swapped = run(high)(_transposed(params, (2, 4)), images.swapaxes(1, 2))
  units = np.arange(8).reshape(2, 4).T.ravel()
  assert_close(swapped[0], np.asarray(first)[:, units].swapaxes(2, 3))
  assert_close(swapped[1], np.asarray(second)[:, units].swapaxes(2, 3))
  assert_close(swapped[2], np.asarray(tokens)[:, units])
  assert_close(swapped[3], logits)


def test_non_square_sincos():
  wide = positions.sincos_2d(16, (2, 4)).reshape(2, 4, 2, 8)  # halves: column, row
  high = positions.sincos_2d(16, (4, 2)).reshape(4, 2, 2, 8)
  np.testing.assert_array_equal(wide.swapaxes(0, 1)[:, :, ::-1], high)
  assert (wide[0, :, 0] == wide[1, :, 0]).all()
  assert (wide[:, 0, 1] == wide[:, 3, 1]).all()
  np.testing.assert_allclose(wide[0, 3, 0, 0], np.sin(3), rtol=1e-6)  # the fastest frequency


def test_other_channel_counts():
  """Grey images with the summed kernel, and a fourth channel that the kernel ignores, give what
  three channels give."""
  options = TINY | {'image_size': 32}
  graphdef, params = random_model('hivit_tiny', **options)
  images = random_images(2, 32, 32, 3)

  def with_kernel(change):
    new = jax.device_get(params)
    new['patch_embed']['proj']['kernel'] = change(new['patch_embed']['proj']['kernel'])
    return new

  def tokens(graphdef, params, images):
    return jax.jit(_stages(graphdef))(params, images)[2]

  grey = abstract_model('hivit_tiny', **options, channels=1)
  four = abstract_model('hivit_tiny', **options, channels=4)
  summed = with_kernel(lambda kernel: kernel.sum(axis=2, keepdims=True))
  ignoring = with_kernel(lambda kernel: np.pad(kernel, ((0, 0), (0, 0), (0, 1), (0, 0))))
  for abstract, given in ((grey, summed), (four, ignoring)):
    assert jax.tree.map(jnp.shape, given) == jax.tree.map(jnp.shape, abstract[1])
  expected = tokens(graphdef, params, images[..., :1].repeat(3, axis=-1))
  assert_close(tokens(grey[0], summed, images[..., :1]), expected)
  extra = random_images(2, 32, 32, 1, seed=1)
  expected = tokens(graphdef, params, images)
  assert_close(tokens(four[0], ignoring, np.concatenate([images, extra], axis=-1)), expected)


# --- forms of the same computation


def _training_function(graphdef, images, noise):
  def loss(params):
    logits = nnx.merge(graphdef, params)(images, drop_path_noise=noise)
    return jnp.square(logits).sum(), logits

  return jax.value_and_grad(loss, has_aux=True)


@pytest.mark.slow
def test_remat_and_scan_change_nothing():
  options = TINY | {'image_size': 32, 'depths': (1, 1, 3), 'drop_path_rate': 0.5, 'num_classes': 5}
  _, params = random_model('hivit_tiny', **options)
  images = random_images(2, 32, 32, 3)
  noise = np.random.default_rng(0).random((2, 7, 2), np.float32)
  forms = {
    form: _training_function(
      abstract_model('hivit_tiny', **options, **dict.fromkeys(form.split(), True))[0], images, noise
    )
    for form in ('', 'remat', 'scan', 'remat scan')
  }
  expected = jax.jit(forms[''])(params)
  for form in ('remat', 'scan'):
    assert_trees_close(jax.jit(forms[form])(params), expected)

  # And they are what they say: recomputation, and a loop over the main blocks.
  flops = {form: matmul_flops(function, params) for form, function in forms.items()}
  assert flops[''] == flops['scan'] < flops['remat'] == flops['remat scan']
  scans = {
    form: [e.params['length'] for e in equations(f, params) if e.primitive.name == 'scan']
    for form, f in forms.items()
  }
  assert scans == {'': [], 'remat': [], 'scan': [3, 3], 'remat scan': [3, 3]}


# --- drop path


def test_drop_path_drops_examples_and_keeps_the_mean():
  x = np.random.default_rng(0).standard_normal((1000, 3, 2), np.float32)
  noise = (np.arange(1000, dtype=np.float32) + 0.5) / 1000
  scale = np.asarray(layers.drop_path(x, 0.3, noise)) / x
  np.testing.assert_allclose(scale[:700], 1 / 0.7, rtol=1e-6)
  assert (scale[700:] == 0).all()
  np.testing.assert_allclose(scale.mean(axis=0), 1, rtol=1e-4)
  assert layers.drop_path(x, 0.3, None) is x


def test_drop_path_rates_rise_linearly_over_all_blocks():
  graphdef, params = abstract_model('hivit_tiny', drop_path_rate=0.2)
  rates = nnx.merge(graphdef, params).drop_path_rates
  np.testing.assert_allclose(rates, np.linspace(0, 0.2, 1 * 2 + 1 * 2 + 10), atol=1e-12)


def test_drop_path_acts_on_each_branch_of_each_example():
  """Training with drop path is, for every example, evaluation of a model whose branches end in
  weights that are zero or enlarged; rate zero keeps a branch whatever its number."""
  options = TINY | {'image_size': 32, 'drop_path_rate': 0.6, 'num_classes': 5}
  graphdef, params = random_model('hivit_tiny', **options)
  images = random_images(3, 32, 32, 3)
  noise = np.random.default_rng(5).random((3, 6, 2), np.float32)
  noise[:, 0] = 0.99
  rates = np.linspace(0, 0.6, 6)
  scales = (noise < 1 - rates[:, None]) / (1 - rates[:, None])  # (B, blocks, 2)
  assert 3 < (scales == 0).sum() < 15

  def scaled(example):
    new = jax.device_get(params)
    for (attention, mlp), at in zip(scales[example], [0, 1, 3, 4, 6, 7], strict=True):  # no merges
      block = new['blocks'][at]
      last = [(block['mlp']['fc2'], mlp)]
      if 'attn' in block:
        last.append((block['attn']['proj'], attention))
      for layer, scale in last:
        layer.update({key: value * np.float32(scale) for key, value in layer.items()})
    return new

  run = jax.jit(
    lambda params, images, noise=None: nnx.merge(graphdef, params)(images, drop_path_noise=noise)
  )
  trained = run(params, images, noise)
  expected = np.concatenate([run(scaled(b), images)[b : b + 1] for b in range(3)])
  assert_close(trained, expected)
  # Without numbers, in evaluation, nothing is dropped.
  plain, _ = abstract_model('hivit_tiny', **options | {'drop_path_rate': 0.0})
  evaluated = jax.jit(lambda params, images: nnx.merge(plain, params)(images))(params, images)
  assert_close(run(params, images), evaluated)


def test_drop_path_noise_is_uniform_and_one_number_a_branch():
  graphdef, params = abstract_model('hivit_tiny', **TINY)
  noise = nnx.merge(graphdef, params).drop_path_noise(jax.random.key(0), 400)
  assert noise.shape == (400, 6, 2)
  assert stats.kstest(np.asarray(noise).ravel(), 'uniform').pvalue > 1e-3


# --- precision


def test_bfloat16_is_close_to_float32():
  images = random_images(2, 32, 32, 3)
  results = {}
  for dtype in (jnp.float32, jnp.bfloat16):
    graphdef, params = random_model('hivit_tiny', **TINY | {'image_size': 32}, dtype=dtype)

    def loss(params, graphdef=graphdef):
      logits = nnx.merge(graphdef, params)(images)
      return jnp.square(logits).mean(), logits

    results[dtype] = jax.jit(jax.value_and_grad(loss, has_aux=True))(params)
  (loss, logits), grads = results[jnp.bfloat16]
  (exact_loss, exact_logits), exact_grads = results[jnp.float32]
  assert loss.dtype == logits.dtype == jnp.float32
  assert {leaf.dtype for leaf in jax.tree.leaves(grads)} == {jnp.dtype('float32')}
  np.testing.assert_allclose(loss, exact_loss, rtol=0.02)
  assert 0 < np.abs(logits - exact_logits).max() < 0.05 * np.abs(exact_logits).max()
  flat, exact_flat = (
    np.concatenate([np.ravel(x) for x in jax.tree.leaves(g)]) for g in (grads, exact_grads)
  )
  cosine = flat @ exact_flat / np.linalg.norm(flat) / np.linalg.norm(exact_flat)
  assert cosine > 0.999


@pytest.mark.parametrize('name', ['hivit_tiny', 'mae_hivit_tiny'])
def test_bfloat16_where_it_belongs(name):
  """Matrix products, forward and backward, take bfloat16, except those of the classes' logits, of
  the bias tables, and of the gradients of attention's logits; parameters, LayerNorm's statistics,
  the softmax and the loss are float32."""
  classes = 37  # a number that no other product has
  offsets = 2 * 4 - 1  # along a side of the bias tables
  sizes = TINY_MAE if name.startswith('mae') else TINY | {'num_classes': classes}
  graphdef, params = abstract_model(name, **sizes, dtype=jnp.bfloat16)
  assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype('float32')}
  images, noise = random_images(2, 64, 64, 3), np.zeros((2, 16), np.float32)

  def loss(params):
    model = nnx.merge(graphdef, params)
    return model(images, noise=noise).loss if name.startswith('mae') else model(images).sum()

  assert jax.eval_shape(loss, params).dtype == jnp.float32
  operands, functions = set(), set()
  for equation in equations(jax.grad(loss), params):
    kinds = {str(v.aval.dtype) for v in equation.invars}
    shapes = [v.aval.shape for v in (*equation.invars, *equation.outvars)]
    if any(classes in shape for shape in shapes) and equation.primitive.name == 'dot_general':
      assert kinds == {'float32'}
    elif equation.primitive.name == 'dot_general':
      pairs = any(len(shape) == 4 and shape[2] == shape[3] for shape in shapes[:2])  # of tokens
      if not pairs and not any(offsets in shape for shape in shapes):
        operands |= kinds
    elif equation.primitive.name in ('rsqrt', 'log', 'reduce_max'):
      functions |= kinds
  assert operands == {'bfloat16'}
  assert functions == {'float32'}


def test_layer_norm_of_features_with_a_large_mean():
  x = 300 + np.random.default_rng(0).standard_normal((4, 64), np.float32)
  norm = layer_norm(64, rngs=nnx.Rngs(0), dtype=jnp.float32)
  wide = x.astype(np.float64)
  expected = (wide - wide.mean(axis=1, keepdims=True)) / np.sqrt(
    wide.var(axis=1, keepdims=True) + 1e-6
  )
  assert_close(norm(x), expected, relative=1e-4)


def test_gelu_is_the_exact_one():
  x = np.linspace(-6, 6, 101, dtype=np.float32)
  np.testing.assert_allclose(gelu(x), x * stats.norm.cdf(x), atol=2e-6)


# --- mistakes


@pytest.mark.parametrize(
  ('shape', 'message'),
  [
    ((1, 64, 64, 1), r'\(B, H, W, 3\).*\(1, 64, 64, 1\)'),
    ((64, 64, 3), r'\(B, H, W, 3\).*\(64, 64, 3\)'),
    ((1, 32, 64, 3), r'takes images of 64x64 pixels.*32x64'),
    ((1, 64, 72, 3), r'takes images of 64x64 pixels.*64x72'),
  ],
)
def test_images_that_do_not_fit(rpe_model, shape, message):
  model = nnx.merge(*rpe_model)
  with pytest.raises(UserError, match=message) as caught:
    model(jnp.zeros(shape))
  assert '\n' not in str(caught.value)


# Heads of classifiers


def test_the_last_layer_starts_as_wide_as_asked():
  widths = {}
  for std in (0.02, 2e-5):
    model = hivit_jax.create_model('hivit_tiny', **TINY, num_classes=500, head_std=std)
    widths[std] = float(model.head.kernel[...].std())
    assert not model.head.bias[...].any()
  assert widths == pytest.approx({0.02: 0.02, 2e-5: 2e-5}, rel=0.03)


def test_the_batch_norm_of_a_linear_probe():
  """Of the batch in training, of the running statistics otherwise, and neither scale nor bias."""
  graphdef, params = random_model('hivit_tiny', **TINY, num_classes=5, head_batch_norm=True)
  params['head_norm'] = {'mean': jnp.full(32, 0.5), 'var': jnp.full(32, 4.0)}
  model = nnx.merge(graphdef, params)
  images = random_images(6, 64, 64, 3)
  features = np.asarray(model.fc_norm(model.pooled(images)), np.float64)
  kernel, bias = np.asarray(model.head.kernel[...]), np.asarray(model.head.bias[...])
  assert_close(model(images), (features - 0.5) / np.sqrt(4.0 + 1e-6) @ kernel + bias)
  batch = (features - features.mean(axis=0)) / np.sqrt(features.var(axis=0) + 1e-6)
  assert_close(model(images, train=True), batch @ kernel + bias, relative=1e-4)
