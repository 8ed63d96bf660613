"""Every published recipe: all numbers of its config are those that the authors' own scripts use."""

import functools
import importlib
import json
import re

import jax
import ml_collections
import numpy as np
import pytest
from flax import nnx

import hivit_jax
from hivit_jax.data import randaugment, transforms
from hivit_jax.interop import torch_names
from hivit_jax.tasks import mixing
from hivit_jax.train import assemble, inputs, optim, validate
from tests.helpers import GOLDEN

_GOLDEN = json.loads((GOLDEN / 'recipes.json').read_text())
_DECAY = json.loads((GOLDEN / 'recipe_decay.json').read_text())

# Since October 2022 Swin's code is another recipe than that of its published weights.
_NEW_COSINE = {'optim.warmup_prefix': True}
# Official run -> config and what is to be changed in it.
RECIPES = {
  'hivit_tiny_1024': ('supervised_hivit_t', {}),
  'hivit_small_1024': ('supervised_hivit_s', {}),
  'hivit_base_1024': ('supervised_hivit_b', {}),
  # A batch of another size: peak, end and start of the rate follow.
  'hivit_tiny_256': ('supervised_hivit_t', {'batch_size': 256, 'augment.mix_group': 32}),
  'hivit_small_256': ('supervised_hivit_s', {'batch_size': 256, 'augment.mix_group': 32}),
  'hivit_base_256': ('supervised_hivit_b', {'batch_size': 256, 'augment.mix_group': 32}),
  'swin_tiny': ('supervised_swin_t', {}),
  'swin_small': ('supervised_swin_s', {}),
  'swin_base': ('supervised_swin_b', {}),
  'swin_tiny_since_2022_10': ('supervised_swin_t', _NEW_COSINE),
  'swin_small_since_2022_10': ('supervised_swin_s', _NEW_COSINE),
  'swin_base_since_2022_10': ('supervised_swin_b', _NEW_COSINE | {'augment.mix_group': 128}),
  'simmim_pretrain_swin_base_800': ('simmim_swin_b', {}),
  'simmim_pretrain_swin_base_100': ('simmim_swin_b:100', {}),
  'simmim_finetune_swin_base_after_800': ('finetune_swin_b', {}),
  'simmim_finetune_swin_base_after_100': ('finetune_swin_b:100', {}),
  'simmim_finetune_swin_base_after_100_at_192': (
    'finetune_swin_b:100', {'image_size': (192,), 'model.window_size': 6},
  ),
  'simmim_finetune_swin_base_after_800_since_2022_10': ('finetune_swin_b', _NEW_COSINE),
  'mae_vit_base_pretrain_1600': ('mae_vit_b:1600', {}),
  'mae_vit_base_pretrain_800': ('mae_vit_b:800', {}),
  'mae_vit_large_pretrain_1600': ('mae_vit_l:1600', {}),
  'mae_vit_large_pretrain_800': ('mae_vit_l:800', {}),
  'mae_vit_base_finetune': ('finetune_vit_b', {}),
  'mae_vit_large_finetune': ('finetune_vit_l', {}),
  # The probe of a ViT's class token is the recipe of the probe of a HiViT, which has none.
  'mae_vit_base_linear': ('linear_hivit_b', {}),
  'mae_hivit_base_pretrain_1600': ('mae_hivit_b:1600', {}),
  'mae_hivit_base_pretrain_800': ('mae_hivit_b:800', {}),
  'mae_hivit_base_pretrain_300': ('mae_hivit_b:300', {}),
  'mae_hivit_base_finetune': ('finetune_hivit_b', {}),
}  # fmt: skip
NOT_HERE = {
  'mae_vit_large_linear': 'probes the class token; ViT classifiers here average the patches',
}
# Our configs that no run was published of -> the published one, and all that differs from it.
VARIATIONS = {
  'mae_hivit_t': ('mae_hivit_b', {'model.name': 'mae_hivit_tiny'}),
  'mae_hivit_s': ('mae_hivit_b', {'model.name': 'mae_hivit_small'}),
  'mae_hivit_l': ('mae_hivit_b', {'model.name': 'mae_hivit_large', 'optim.base_lr': 1.5e-4}),
  'continue_mae_hivit_b': (
    'mae_hivit_b',
    {
      'epochs': 400.0, 'batch_size': 256, 'optim.base_lr': 5e-5, 'optim.warmup_epochs': 20.0,
      'checkpoint.every_epochs': 20.0, 'checkpoint.keep_every_epochs': 0.0, 'log_every_steps': 20,
      'knn.every_epochs': 0.0, 'rankme.every_epochs': 20.0,
    },
  ),
  'finetune_hivit_t': (
    'finetune_hivit_b',
    {'model.name': 'hivit_tiny', 'init': 'workdirs/mae_hivit_t', 'model.drop_path_rate': 0.1},
  ),
  'finetune_hivit_s': (
    'finetune_hivit_b',
    {'model.name': 'hivit_small', 'init': 'workdirs/mae_hivit_s', 'model.drop_path_rate': 0.1},
  ),
  'finetune_hivit_l': (
    'finetune_hivit_b',
    {
      'model.name': 'hivit_large', 'init': 'workdirs/mae_hivit_l', 'epochs': 50.0,
      'optim.base_lr': 1e-3, 'optim.layer_decay': 0.84,
    },
  ),
  'supervised_vit_b': (
    'supervised_hivit_b', {'model.name': 'vit_base', 'model.drop_path_rate': 0.1}
  ),
  'ladder_1_three_stages': ('supervised_swin_b', {'model.name': 'swin_base_three_stages'}),
  'ladder_2_global': ('supervised_swin_b', {'model.name': 'swin_base_global'}),
  'ladder_3_mlp_stem': ('supervised_swin_b', {'model.name': 'swin_base_mlp_stem'}),
}  # fmt: skip
# Where a finetuning looks for the pretraining: the directory that main.py takes by default.
INITS = {
  'finetune_hivit_b': 'mae_hivit_b',
  'finetune_vit_b': 'mae_vit_b',
  'finetune_vit_l': 'mae_vit_l',
  'finetune_swin_b': 'simmim_swin_b',
  'finetune_swin_b:100': 'simmim_swin_b_100',
  'finetune_swin_b:800': 'simmim_swin_b_800',
  'linear_hivit_b': 'mae_hivit_b',
}


def load(name: str, changes: dict | None = None) -> ml_collections.ConfigDict:
  """The config of a file, with `:variant` or without, as a run checks it."""
  file, _, variant = name.partition(':')
  config = importlib.import_module(f'configs.{file}').get_config(variant or None)
  config.update_from_flattened_dict(changes or {})
  return validate.checked(config)


@functools.cache
def recipe(name: str) -> tuple[dict, ml_collections.ConfigDict]:
  """What the official run `name` uses, and our config of it."""
  golden = dict(_GOLDEN['recipes'][name])
  for key in ('transform', 'eval_transform', 'mixup', 'drop_path_by_block'):
    golden[key] = golden[key] and _GOLDEN['shared'][golden[key]]
  return golden, load(*RECIPES[name])


@functools.cache
def _abstract_model(arguments: str) -> nnx.Module:
  config = ml_collections.ConfigDict(json.loads(arguments))
  config.model.ignore_type()
  return nnx.eval_shape(assemble.model_creator(config))


def abstract_model(config: ml_collections.ConfigDict) -> nnx.Module:
  """The full-size model as shapes; the same for configs that agree in it."""
  keys = ('model', 'image_size', 'channels', 'seed')
  return _abstract_model(json.dumps({key: config.to_dict()[key] for key in keys}))


def test_every_official_run_is_compared_or_has_a_reason():
  assert RECIPES.keys() | NOT_HERE.keys() == _GOLDEN['recipes'].keys()
  assert not RECIPES.keys() & NOT_HERE.keys()


@pytest.mark.parametrize('name', RECIPES)
def test_learning_rates_at_every_epoch_and_of_every_layer(name):
  golden, config = recipe(name)
  schedule = assemble.schedule(config)
  epochs, scales = np.array(golden['epoch']), golden['layer_scales'] or {'head': 1.0}
  rates = golden['lr'] if golden['layer_scales'] else {'head': golden['lr']}
  assert len(epochs) > 30
  assert config.epochs == golden['epochs']
  assert config.optim.warmup_epochs == golden['warmup_epochs']
  assert bool(config.optim.layer_decay) == bool(golden['layer_decay'])
  in_a_step = jax.jit(schedule)
  for layer, scale in scales.items():
    tolerance = 1e-6 * golden['peak_lr'] * scale
    for rate in (schedule(epochs, scale), in_a_step(epochs.astype(np.float32), scale)):
      np.testing.assert_allclose(rate, rates[layer], rtol=0, atol=tolerance, err_msg=layer)
    # `plot` asks for epochs one by one, and double precision keeps them apart.
    ones = [schedule(epoch, scale) for epoch in golden['epoch']]
    np.testing.assert_allclose(ones, rates[layer], rtol=0, atol=tolerance * 1e-6)


@pytest.mark.parametrize('name', RECIPES)
def test_batch_optimizer_and_average(name):
  golden, config = recipe(name)
  o, official = config.optim, golden['optimizer']
  assert config.batch_size == golden['batch'] == (
    golden['per_gpu'] * golden['gpus'] * golden['accumulation']
  )  # fmt: skip
  assert config.image_size == (golden['image_size'],) * 2
  assert o.name == official['name'].lower()
  assert o.weight_decay == official['weight_decay']
  if o.name == 'adamw':
    assert [o.b1, o.b2, o.eps] == [*official['betas'], official['eps']]
  else:
    assert (o.momentum, optim.TRUST_COEFFICIENT) == (
      official['momentum'], official['trust_coefficient'],
    )  # fmt: skip
  assert o.clip_norm == golden['clip']
  assert config.ema_decay == golden['ema']


@pytest.mark.parametrize('name', RECIPES)
def test_augmentation(name):
  golden, config = recipe(name)
  steps = iter(inputs.train_transform(config).steps)
  official = {step['is']: step for step in golden['transform']}
  assert not official.keys() - {
    'Lambda', 'RandomResizedCrop', 'RandomResizedCropAndInterpolation', 'RandomHorizontalFlip',
    'RandAugment', 'ToTensor', 'Normalize', 'RandomErasing',
  }  # fmt: skip
  theirs = official.get('RandomResizedCrop') or official['RandomResizedCropAndInterpolation']
  assert next(steps) == transforms.RandomResizedCrop(
    size=tuple(theirs['size']),
    scale=tuple(theirs['scale']),
    ratio=tuple(theirs['ratio']),
    clamp=name.endswith('_linear'),  # what MAE's own class of that name does there
    interpolation=theirs['interpolation'],
  )
  assert next(steps) == transforms.RandomFlip()
  assert official['RandomHorizontalFlip']['p'] == 0.5
  theirs = official.get('RandAugment')
  if theirs:
    ours = next(steps)
    assert isinstance(ours, randaugment.RandAugment)
    assert (ours.magnitude, ours.magnitude_std) == (theirs['magnitude'], theirs['magnitude_std'])
    assert (ours.num_ops, ours.fill('RGB')) == (theirs['num_layers'], tuple(theirs['fill']))
    assert theirs['operation_probability'] == randaugment.PROBABILITY
    assert len(randaugment.OPERATIONS) == theirs['operations']
    assert theirs['interpolation'] == 'bicubic'
  assert next(steps, None) is None

  task = assemble.task(config)
  statistics = official['Normalize']
  assert (list(task.mean), list(task.std)) == (statistics['mean'], statistics['std'])
  if not assemble.task_class(config).needs_classes:
    assert not golden['mixup']
    return
  erasing = official.get('RandomErasing')
  assert task.erase == (erasing['probability'] if erasing else 0)
  if erasing:
    assert (erasing['mode'], erasing['max_count']) == ('pixel', 1)
    np.testing.assert_allclose(mixing.ERASED_AREA, (erasing['min_area'], erasing['max_area']))
    np.testing.assert_allclose(np.log(mixing.ERASED_ASPECT), erasing['log_aspect_ratio'])
  assert task.label_smoothing == (golden['label_smoothing'] or 0)
  assert task.mix_group == golden['mixup_group']
  if golden['mixup'] is None:
    assert (task.mixup, task.cutmix) == (0, 0)
    return
  theirs = golden['mixup']
  assert (task.mixup, task.cutmix) == (theirs['mixup_alpha'], theirs['cutmix_alpha'])
  assert task.switch_probability == theirs['switch_prob']
  assert task.label_smoothing == theirs['label_smoothing']
  assert (theirs['mode'], theirs['prob'], theirs['correct_lam']) == ('batch', 1.0, True)


@pytest.mark.parametrize('name', [n for n in RECIPES if _GOLDEN['recipes'][n]['eval_transform']])
def test_evaluation_crops(name):
  """An image whose shorter side is what the official resize makes it is not resized here."""
  golden, config = recipe(name)
  steps = {step['is']: step for step in golden['eval_transform']}
  assert steps['Resize']['interpolation'] == 'bicubic'
  short, side = steps['Resize']['size'], golden['image_size']
  assert steps['CenterCrop']['size'] == [side, side]
  pixels = np.random.default_rng(0).integers(0, 256, (short, short + 30, 3), np.uint8)
  ours = inputs.eval_transform(config)({'image': pixels})['image']
  top, left = round((short - side) / 2), round((short + 30 - side) / 2)
  np.testing.assert_array_equal(ours, pixels[top : top + side, left : left + side])


def _numbers(name: str) -> list[int]:
  return [int(number) for number in re.findall(r'\d+', name)]


@pytest.mark.slow
@pytest.mark.parametrize('name', [n for n in RECIPES if not n.endswith('_linear')])
def test_the_model_and_what_it_drops(name):
  golden, config = recipe(name)
  model = abstract_model(config)
  rates = golden['drop_path_by_block']
  assert not any(rate for block, rate in rates.items() if 'decoder' in block)
  rates = [rates[b] for b in sorted(rates, key=_numbers) if 'decoder' not in b]
  np.testing.assert_allclose(model.drop_path_rates, rates, atol=1e-7)
  if golden.get('window'):
    encoder = getattr(model, 'encoder', model)
    table = encoder.layers[0].blocks[0].attn.relative_position_bias_table
    assert table.shape[0] == (2 * golden['window'] - 1) ** 2
  if golden['mask']:
    assert model.mask_ratio == golden['mask']['ratio']
    assert model.norm_pix_loss == golden['mask'].get('norm_pix', False)
    assert np.prod(model.grid) == (golden['image_size'] // golden['mask'].get('patch', 16)) ** 2


_TINY = {
  'hivit': {'embed_dim': 32, 'depths': (1, 1, 1), 'num_heads': 2},
  'vit': {'embed_dim': 32, 'depth': 1, 'num_heads': 2},
  'swin': {'embed_dim': 8, 'depths': (1, 1, 1, 1), 'num_heads': (1, 1, 1, 1)},
}


@functools.cache
def _std_of_the_head(family: str, head_std: float | None) -> float:
  model = hivit_jax.create_model(
    f'{family}_{"base" if family == "vit" else "tiny"}', **_TINY[family], num_classes=1000,
    **({} if head_std is None else {'head_std': head_std}),
  )  # fmt: skip
  return float(np.std(model.head.kernel[...]))


@pytest.mark.parametrize(
  'name', [n for n in RECIPES if 'head_std_at_start' in _GOLDEN['recipes'][n]]
)
def test_the_first_weights_of_the_head(name):
  golden, config = recipe(name)
  ours = _std_of_the_head(config.model.name.split('_')[0], config.model.head_std)
  np.testing.assert_allclose(ours, golden['head_std_at_start'], rtol=0.02)  # of 32 000 values


DECAYS = {
  'hivit_base_supervised': 'hivit_base_1024',
  'swin_base_supervised': 'swin_base',
  'simmim_pretrain_swin_base': 'simmim_pretrain_swin_base_800',
  'simmim_finetune_swin_base_after_800': 'simmim_finetune_swin_base_after_800',
  'simmim_finetune_swin_base_after_100': 'simmim_finetune_swin_base_after_100',
  'mae_vit_base_pretrain': 'mae_vit_base_pretrain_1600',
  'mae_vit_base_finetune': 'mae_vit_base_finetune',
  'mae_hivit_base_pretrain': 'mae_hivit_base_pretrain_1600',
  'mae_hivit_base_finetune': 'mae_hivit_base_finetune',
}


def test_every_official_optimizer_is_compared():
  # The probe's is that of a model with a class token: its head alone learns, see test_optim.py.
  assert DECAYS.keys() | {'mae_vit_base_linear'} == _DECAY['recipes'].keys()


@pytest.mark.parametrize('name', DECAYS)
def test_factor_of_the_rate_and_weight_decay_of_every_parameter(name):
  golden = _DECAY['recipes'][name]
  pairs = [golden['pairs'][index] for index in golden['pair_of']]
  expected = dict(zip(_DECAY['names'][golden['names']], pairs, strict=True))
  _, config = recipe(DECAYS[name])
  params = nnx.to_pure_dict(nnx.state(abstract_model(config)))
  optimizer = assemble.optimizer(config)(params)
  # Without gradients the update of a parameter of ones is its weight decay.
  ones = jax.tree.map(lambda leaf: np.ones((1,) * leaf.ndim, np.float32), params)
  trained, _ = optim.split(ones, optimizer.trained)
  zeros = jax.tree.map(np.zeros_like, trained)
  updates, _ = optimizer.tx.update(zeros, optimizer.tx.init(trained), trained)
  updates = torch_names.flatten(updates)
  scales = torch_names.flatten(optimizer.scales) if optimizer.scales is not None else {}
  for path, leaf in torch_names.flatten(params).items():
    theirs, _ = torch_names.to_torch(path, np.empty((0,) * leaf.ndim))
    pair = expected.pop(theirs)
    if pair is None:
      assert updates[path] is None, theirs
    else:
      assert scales.get(path, 1.0) == pytest.approx(pair[0], rel=1e-12), theirs
      np.testing.assert_allclose(updates[path], pair[1], rtol=1e-6, err_msg=theirs)
  assert not expected
  if optimizer.scales is not None:
    official = recipe(DECAYS[name])[0]['layer_scales']
    values = jax.tree.leaves(optimizer.scales)
    np.testing.assert_allclose([min(values), max(values)], [official['first'], official['head']])


@pytest.mark.parametrize('name', VARIATIONS)
def test_what_is_not_published_differs_from_what_is_in_a_few_settings(name):
  published, changes = VARIATIONS[name]
  assert load(name).to_dict() == load(published, changes).to_dict()
  assert published in {file.partition(':')[0] for file, _ in RECIPES.values()}


@pytest.mark.parametrize('name', INITS)
def test_a_finetuning_starts_where_the_pretraining_leaves_its_weights(name):
  assert load(name).init == f'workdirs/{INITS[name]}'


def test_the_head_of_the_probe_is_that_of_mae():
  model = load('linear_hivit_b').model
  assert (model.head_std, model.head_batch_norm, model.drop_path_rate) == (0.01, True, 0)


def test_300_epochs_are_the_default_of_mae():
  for name in ('mae_hivit_b', 'mae_vit_b'):
    assert load(name).to_dict() == load(f'{name}:300').to_dict()


def test_rates_that_are_set_as_such_do_not_follow_the_batch():
  own = {'optim.lr': 3e-3, 'optim.end_lr': 0.0, 'optim.warmup_start_lr': 2e-6}
  for batch in (256, 4096):
    schedule = assemble.schedule(load('supervised_hivit_b', {'batch_size': batch} | own))
    assert (schedule.lr, schedule.end_lr, schedule.warmup_start_lr) == (3e-3, 0.0, 2e-6)
