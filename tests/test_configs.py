"""Every file in configs/: loads, describes the published recipe, and trains."""

import collections
import contextlib
import functools
import importlib
import itertools
import json
import logging
import pathlib
import re

import jax
import ml_collections
import numpy as np
import pytest
from flax import nnx
from jax.experimental.compilation_cache import compilation_cache

from configs import base
from hivit_jax.errors import UserError
from hivit_jax.train import build, experiment, hints, settings, sharding

ROOT = pathlib.Path(__file__).parents[1]
NAMES = sorted(file.stem for file in (ROOT / 'configs').glob('*.py') if file.stem != 'base')

# Parameters of each config's model, all of them counted, the fixed position embedding too.
PARAMETERS = {
  'demo': 1_515_744,
  'mae_hivit_t': 39_544_480,
  'mae_hivit_s': 57_845_536,
  'mae_hivit_b': 87_041_152,
  'mae_hivit_l': 311_765_824,
  'supervised_hivit_t': 19_181_668,
  'supervised_hivit_s': 37_526_464,
  'supervised_hivit_b': 66_418_952,
  'finetune_hivit_t': 19_181_668,
  'finetune_hivit_s': 37_526_464,
  'finetune_hivit_b': 66_418_952,
  'finetune_hivit_l': 290_712_328,
  'mae_vit_b': 111_907_840,
  'mae_vit_l': 329_541_888,
  'finetune_vit_b': 86_567_656,
  'finetune_vit_l': 304_326_632,
  'supervised_vit_b': 86_567_656,
  'simmim_swin_b': 89_874_104,
  'finetune_swin_b': 87_768_224,
  'supervised_swin_t': 28_288_354,
  'supervised_swin_s': 49_606_258,
  'supervised_swin_b': 87_768_224,
  'ladder_1_three_stages': 66_260_864,
  'ladder_2_global': 66_440_064,
  'ladder_3_mlp_stem': 65_776_040,
  'linear_hivit_b': 66_418_952 + 2 * 512,  # and the statistics of its BatchNorm
}


def load(name: str, variant: str | None = None) -> ml_collections.ConfigDict:
  get_config = importlib.import_module(f'configs.{name}').get_config
  return get_config(variant) if variant else get_config()


def variants(name: str) -> list[str]:
  """The variants that a config's docstring names, without `debug`, which all have."""
  doc = importlib.import_module(f'configs.{name}').__doc__
  return sorted(set(re.findall(r'(?:(?<!\S)|\.py):(\w+)', doc)) - {'debug'})


def keys(config: ml_collections.ConfigDict, prefix: str = '') -> set[str]:
  """Dotted names of the settings; groups of settings are no settings."""
  found = set()
  for key in config:
    value = config.get_ref(key).get()
    if isinstance(value, ml_collections.ConfigDict):
      found |= keys(value, f'{prefix}{key}.')
    else:
      found.add(prefix + key)
  return found


@contextlib.contextmanager
def reads_of(config: ml_collections.ConfigDict, monkeypatch):
  """Collects the settings that are used: being checked or recorded is not enough."""
  paths = {id(config): ''}
  for key in config:
    group = config.get_ref(key).get()
    if isinstance(group, ml_collections.ConfigDict):
      paths[id(group)] = f'{key}.'
  found: set[str] = set()
  recording = True
  getitem = ml_collections.ConfigDict.__getitem__

  def recorded_getitem(self, key):
    if recording and id(self) in paths:
      found.add(f'{paths[id(self)]}{key}')
    return getitem(self, key)

  def silent(function):
    @functools.wraps(function)
    def wrapper(*args, **kwargs):
      nonlocal recording
      before, recording = recording, False
      try:
        return function(*args, **kwargs)
      finally:
        recording = before

    return wrapper

  with monkeypatch.context() as patch:
    patch.setattr(ml_collections.ConfigDict, '__getitem__', recorded_getitem)
    patch.setattr(ml_collections.ConfigDict, 'to_dict', silent(ml_collections.ConfigDict.to_dict))
    patch.setattr(settings, 'check', silent(settings.check))
    patch.setattr(hints, 'without_effect', silent(hints.without_effect))
    yield found


Run = collections.namedtuple('Run', 'workdir config reads')


@pytest.fixture(scope='module')
def debug_run(tmp_path_factory):
  """`debug_run(name)`: trains `configs/<name>.py:debug` in this process, each config once."""
  monkeypatch = pytest.MonkeyPatch()
  root = logging.getLogger()
  handlers, level = root.handlers[:], root.level
  # The tiny models are all alike: compile them once.
  cache = {
    'jax_compilation_cache_dir': str(tmp_path_factory.mktemp('compiled')),
    'jax_persistent_cache_min_compile_time_secs': 0.0,
  }
  before = {key: getattr(jax.config, key) for key in cache}
  for key, value in cache.items():
    jax.config.update(key, value)

  @functools.cache
  def run(name: str) -> Run:
    config = load(name, 'debug')
    config.data.data_dir = data_dir
    workdir = tmp_path_factory.mktemp(name)
    with reads_of(config, monkeypatch) as reads:
      experiment.run(config, str(workdir))
    return Run(workdir, config, reads)

  data_dir = str(tmp_path_factory.mktemp('data'))
  options = sharding.compiler_options
  quick = {'xla_backend_optimization_level': '0'}  # to compile; two steps may be slow
  monkeypatch.setattr(sharding, 'compiler_options', lambda mesh: options(mesh) | quick)
  yield run
  monkeypatch.undo()
  for key, value in before.items():
    jax.config.update(key, value)
  compilation_cache.reset_cache()
  root.handlers[:] = handlers
  root.setLevel(level)
  logging.captureWarnings(False)


def assert_two_steps(workdir: pathlib.Path):
  rows = [json.loads(line) for line in (workdir / 'metrics.jsonl').read_text().splitlines()]
  assert [row['step'] for row in rows] == [0, 1, 2]
  assert all(np.isfinite(row['train/loss']) for row in rows[1:])
  assert (workdir / 'checkpoints' / '2').is_dir()


@pytest.mark.parametrize('name', NAMES)
def test_every_config_and_named_variant_loads(name):
  known = keys(base.get_config())
  for variant in [None, *variants(name)]:
    config = load(name, variant)
    assert keys(config) == known
    assert config.is_locked


@pytest.mark.parametrize('name', NAMES)
def test_an_unknown_variant_is_refused_with_the_known_ones(name):
  with pytest.raises(UserError) as error:
    load(name, 'debgu')
  for variant in ['debug', *variants(name)]:
    assert re.search(rf'\b{variant}\b', str(error.value))


@pytest.mark.parametrize('name', NAMES)
def test_the_debug_variant_trains_two_steps(name, debug_run):
  run = debug_run(name)
  assert_two_steps(run.workdir)
  written = json.loads((run.workdir / 'config.json').read_text())['config']
  assert written == json.loads(json.dumps(run.config.to_dict()))


def test_every_setting_is_read_by_some_run(debug_run):
  read = set().union(*(debug_run(name).reads for name in NAMES))
  assert keys(base.get_config()) - read == set()


def test_every_setting_has_a_comment():
  """A comment on its line, or one on the line above its group that speaks for the whole group."""
  lines = (ROOT / 'configs' / 'base.py').read_text().splitlines()
  commented, groups = set(), set()
  for above, line in itertools.pairwise(lines):
    assignment = re.match(r'  config\.([\w.]+) = ([^#]*)(#?)', line)
    if assignment:
      key, value, comment = assignment.groups()
      if 'ConfigDict()' in value and above.startswith('  # '):
        groups.add(key)
      if comment or key.split('.')[0] in groups:
        commented.add(key)
  assert keys(base.get_config()) - commented == set()


def test_what_may_be_none_is_none_by_default():
  defaults = settings.dotted(base.get_config())
  assert {key for key, value in defaults if value is None} == settings.OPTIONAL


@functools.cache
def count_parameters(model: str) -> int:
  """Of the model that a config's settings, as JSON, describe."""
  config = base.get_config()
  config.update(json.loads(model))
  state = nnx.state(nnx.eval_shape(build.model_creator(config)))
  return sum(leaf.size for leaf in jax.tree.leaves(state))


@pytest.mark.parametrize('name', sorted(PARAMETERS))
def test_parameter_counts(name):
  config = load(name).to_dict()
  # What recipes for one model differ in.
  config['model'] |= {'drop_path_rate': 0.0, 'head_std': None}
  model = {key: config[key] for key in ('model', 'image_size', 'channels')}
  assert count_parameters(json.dumps(model, sort_keys=True)) == PARAMETERS[name]


@pytest.mark.parametrize(
  ('name', 'lr'),
  [
    ('mae_hivit_t', 1.6e-3),
    ('mae_hivit_s', 1.6e-3),
    ('mae_hivit_b', 1.6e-3),
    ('mae_hivit_l', 2.4e-3),
  ],
)
@pytest.mark.parametrize('epochs', [300, 800, 1600])
def test_the_published_pretraining_recipe(name, lr, epochs):
  config = load(name, str(epochs))
  assert (config.batch_size, config.epochs) == (4096, epochs)
  assert config.image_size == (224, 224)
  optim = config.optim
  assert (optim.b1, optim.b2, optim.weight_decay, optim.clip_norm) == (0.9, 0.95, 0.05, None)
  model = config.model
  assert (model.mask_ratio, model.norm_pix_loss, model.hifeat) == (0.75, True, True)
  assert model.drop_path_rate == 0
  assert config.data.name == 'imagenet2012'
  assert (config.augment.crop_scale, config.augment.flip) == ((0.2, 1.0), True)
  schedule = build.schedule(config)
  np.testing.assert_allclose(schedule(20.0), lr / 2, rtol=1e-6)  # half of the warmup
  np.testing.assert_allclose(schedule(40.0), lr, rtol=1e-6)
  np.testing.assert_allclose(schedule((40 + epochs) / 2), lr / 2, rtol=1e-5)
  np.testing.assert_allclose(schedule(float(epochs)), 0, atol=1e-9)


AUGMENTATION = {
  'crop_scale': (0.08, 1.0), 'crop_ratio': (3 / 4, 4 / 3), 'flip': True, 'color_jitter': 0.0,
  'rand_augment': 'rand-m9-mstd0.5-inc1', 'erase': 0.25, 'mixup': 0.8, 'cutmix': 1.0,
  'switch_probability': 0.5, 'label_smoothing': 0.1,
}  # fmt: skip


def _assert_classification(
  name, *, epochs, warmup, start, peak, end, drop_path, layer_decay, batch=1024, clip=None
):
  """Epochs, learning rates at the start, after the warmup and at the end; all else is shared."""
  config = load(name)
  assert (config.task, config.batch_size, config.epochs) == ('classify', batch, epochs)
  assert (config.model.drop_path_rate, config.optim.layer_decay) == (drop_path, layer_decay)
  optim = config.optim
  assert (optim.name, optim.b1, optim.b2, optim.weight_decay) == ('adamw', 0.9, 0.999, 0.05)
  assert optim.clip_norm == clip
  assert config.augment.to_dict() == AUGMENTATION
  schedule = build.schedule(config)
  np.testing.assert_allclose(schedule(0.0), start, atol=1e-12)
  np.testing.assert_allclose(schedule(float(warmup)), peak, rtol=1e-6)
  np.testing.assert_allclose(schedule(float(epochs)), end, rtol=1e-4)
  return config


@pytest.mark.parametrize(('size', 'drop_path'), [('t', 0.05), ('s', 0.3), ('b', 0.5)])
def test_the_published_supervised_recipe(size, drop_path):
  config = _assert_classification(
    f'supervised_hivit_{size}', epochs=300, warmup=20, start=1e-6, peak=1e-3, end=1e-5,
    drop_path=drop_path, layer_decay=None,
  )  # fmt: skip
  assert config.init is None


@pytest.mark.parametrize(
  ('size', 'epochs', 'peak', 'layer_decay', 'drop_path'),
  [
    ('b', 100, 2e-3, 0.85, 0.2),  # published
    ('t', 100, 2e-3, 0.85, 0.1),
    ('s', 100, 2e-3, 0.85, 0.1),
    ('l', 50, 4e-3, 0.84, 0.2),
  ],
)
def test_the_finetuning_recipes(size, epochs, peak, layer_decay, drop_path):
  config = _assert_classification(
    f'finetune_hivit_{size}', epochs=epochs, warmup=5, start=0, peak=peak, end=1e-6,
    drop_path=drop_path, layer_decay=layer_decay,
  )  # fmt: skip
  assert config.init == f'workdirs/mae_hivit_{size}'  # where main.py leaves the pretraining
  assert config.model.head_std == 2e-5


def test_the_baselines_are_finetuned_as_published():
  """ViT by table 9 of MAE, Swin by SimMIM's config of 800 epochs."""
  shared = {'warmup': 5, 'start': 0, 'end': 1e-6}
  b, large = (
    _assert_classification(f'finetune_vit_{size}', **shared, **own)
    for size, own in {
      'b': {'epochs': 100, 'peak': 2e-3, 'layer_decay': 0.65, 'drop_path': 0.1},
      'l': {'epochs': 50, 'peak': 4e-3, 'layer_decay': 0.75, 'drop_path': 0.2},
    }.items()
  )
  swin = _assert_classification(
    'finetune_swin_b', epochs=100, warmup=20, start=1e-6, peak=5e-3, end=1e-6, layer_decay=0.8,
    drop_path=0.1, batch=2048, clip=5.0,
  )  # fmt: skip
  assert [config.init for config in (b, large, swin)] == [
    'workdirs/mae_vit_b', 'workdirs/mae_vit_l', 'workdirs/simmim_swin_b',
  ]  # fmt: skip
  assert (b.model.head_std, swin.model.head_std) == (2e-5, None)


def test_the_linear_probe_is_that_of_mae():
  config = load('linear_hivit_b')
  assert (config.task, config.batch_size, config.epochs) == ('linear', 16384, 90)
  assert (config.optim.name, config.optim.momentum, config.optim.weight_decay) == ('lars', 0.9, 0)
  assert (config.model.drop_path_rate, config.model.head_batch_norm) == (0, True)
  off = {key: 0.0 for key in ('color_jitter', 'erase', 'mixup', 'cutmix', 'label_smoothing')}
  assert config.augment.to_dict() == AUGMENTATION | off | {'rand_augment': None}
  schedule = build.schedule(config)
  np.testing.assert_allclose(schedule(10.0), 6.4, rtol=1e-6)
  np.testing.assert_allclose(schedule(5.0), 3.2, rtol=1e-6)
  np.testing.assert_allclose(schedule(90.0), 0, atol=1e-6)


def test_300_epochs_are_the_default():
  for name in ('mae_hivit_t', 'mae_hivit_s', 'mae_hivit_b', 'mae_hivit_l'):
    assert load(name).to_dict() == load(name, '300').to_dict()
