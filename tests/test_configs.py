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
from ml_collections import config_dict

from configs import base
from hivit_jax import models, settings
from hivit_jax.errors import UserError
from hivit_jax.train import assemble, hints, sharding, synthetic, validate
from hivit_jax.train.run import train

ROOT = pathlib.Path(__file__).parents[1]
FILES = {file.stem for file in (ROOT / 'configs').glob('*.py')}
NAMES = sorted(FILES - {'base', 'recipes', 'variants'})
# Their task and their backbone are trained by others: it is enough that their steps can be traced.
TRACED = {
  *('ladder_1_three_stages', 'ladder_2_global', 'ladder_3_mlp_stem'),
  *('supervised_swin_t', 'supervised_swin_s', 'supervised_swin_b', 'supervised_vit_b'),
  *('segment_vit_b', 'segment_swin_b', 'detect_vit_b', 'detect_swin_b'),
}
TRAINED = [name for name in NAMES if name not in TRACED]

# Parameters of each config's model, all of them counted, the fixed position embedding too.
PARAMETERS = {
  'demo': 1_531_632,
  'mae_hivit_t': 39_544_480,
  'mae_hivit_s': 57_845_536,
  'mae_hivit_b': 87_041_152,
  'mae_hivit_l': 311_765_824,
  'continue_mae_hivit_b': 87_041_152,
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
  'detect_hivit_t': 40_243_664,
  'detect_hivit_s': 58_544_720,
  'detect_hivit_b': 87_370_608,
  'detect_vit_b': 110_214_832,
  'detect_swin_b': 108_455_592,
  # And the statistics of their BatchNorms.
  'segment_hivit_t': 129_862_792,
  'segment_hivit_s': 148_538_308,
  'segment_hivit_b': 179_726_156 + 25_088,
  'segment_vit_b': 163_286_828 + 20_480,
  'segment_swin_b': 121_300_772 + 12_800,
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
  """Collects the settings that are used: being checked, copied or recorded is not enough."""
  paths = {frozenset(config): ''}  # by what is in them: a run works on a copy
  for key in config:
    group = config.get_ref(key).get()
    if isinstance(group, ml_collections.ConfigDict):
      assert frozenset(group) not in paths
      paths[frozenset(group)] = f'{key}.'
  found: set[str] = set()
  recording = True
  getitem = ml_collections.ConfigDict.__getitem__

  def recorded_getitem(self, key):
    if recording and frozenset(self) in paths:
      found.add(f'{paths[frozenset(self)]}{key}')
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
    for name in ('to_dict', 'copy_and_resolve_references'):
      patch.setattr(
        ml_collections.ConfigDict, name, silent(getattr(ml_collections.ConfigDict, name))
      )
    frozen = config_dict.FrozenConfigDict
    patch.setattr(frozen, '__init__', silent(frozen.__init__))
    patch.setattr(validate, 'check', silent(validate.check))
    patch.setattr(hints, 'without_effect', silent(hints.without_effect))
    yield found


Run = collections.namedtuple('Run', 'workdir config reads')


def what_it_trains(config: ml_collections.ConfigDict) -> str:
  """Everything that a config says, with the model's settings in full instead of its name."""
  said = config.to_dict()
  model = {key: value for key, value in said['model'].items() if value is not None}
  name = model.pop('name')
  said['model'] = models.settings_of(name) | model
  return f'{models.MODELS[name][0]} {json.dumps(said, sort_keys=True, default=str)}'


@pytest.fixture(scope='module')
def debug_run(tmp_path_factory, data_dir):
  """`debug_run(name)`: trains `configs/<name>.py:debug` in this process.

  Configs that differ in nothing but the name of what is then the same model share a run.
  """
  monkeypatch = pytest.MonkeyPatch()
  root = logging.getLogger()
  handlers, level = root.handlers[:], root.level
  done: dict[str, Run] = {}

  def run(name: str) -> Run:
    config = load(name, 'debug')
    key = what_it_trains(config)
    if key not in done:
      config.data.data_dir = str(data_dir)
      workdir = tmp_path_factory.mktemp(name)
      with reads_of(config, monkeypatch) as reads:
        train(config, str(workdir))
      done[key] = Run(workdir, config, reads)
    return done[key]

  yield run
  monkeypatch.undo()
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


@pytest.mark.slow
@pytest.mark.parametrize('name', TRAINED)
def test_the_debug_variant_trains_two_steps(name, debug_run):
  run = debug_run(name)
  assert_two_steps(run.workdir)
  written = json.loads((run.workdir / 'config.json').read_text())['config']
  expected = json.loads(json.dumps(run.config.to_dict()))
  if run.config.task in ('classify', 'linear', 'segment', 'detect'):
    assert run.config.model.num_classes is None  # nobody has written into it
    expected['model']['num_classes'] = 16 if run.config.task in ('segment', 'detect') else 10
  assert written == expected


@pytest.mark.slow
@pytest.mark.parametrize('name', sorted(TRACED))
def test_a_step_of_the_debug_variant_can_be_traced(name):
  config, mesh = load(name, 'debug'), sharding.make_mesh()
  validate.check(config)
  training = assemble.training(config, mesh)
  batch = synthetic.abstract_batch(config, mesh)
  state, metrics = jax.eval_shape(training.train_step, training.abstract, batch)
  assert metrics['loss'].shape == ()
  shapes = lambda tree: jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), tree)  # noqa: E731
  assert shapes(state) == shapes(training.abstract)


@pytest.mark.slow
def test_every_setting_is_read_by_some_run(debug_run):
  read = set().union(*(debug_run(name).reads for name in TRAINED))
  assert keys(base.get_config()) - read == set()


def test_every_setting_has_a_comment():
  """On its line or the one above, or above its group where it speaks for the whole group."""
  lines = (ROOT / 'configs' / 'base.py').read_text().splitlines()
  commented, groups = set(), set()
  for above, line in itertools.pairwise(lines):
    assignment = re.match(r'  config\.([\w.]+) = ([^#]*)(#?)', line)
    if assignment:
      key, value, comment = assignment.groups()
      if 'ConfigDict()' in value and above.startswith('  # '):
        groups.add(key)
      if comment or above.startswith('  # ') or key.split('.')[0] in groups:
        commented.add(key)
  assert keys(base.get_config()) - commented == set()


def test_what_may_be_none_is_none_by_default():
  defaults = settings.dotted(base.get_config())
  assert {key for key, value in defaults.items() if value is None} == validate.OPTIONAL


@functools.cache
def count_parameters(model: str) -> int:
  """Of the model that a config's settings, as JSON, describe."""
  config = base.get_config()
  config.update(json.loads(model))
  state = nnx.state(nnx.eval_shape(assemble.model_creator(config)))
  return sum(leaf.size for leaf in jax.tree.leaves(state))


@pytest.mark.slow
@pytest.mark.parametrize('name', sorted(PARAMETERS))
def test_parameter_counts(name):
  config = load(name).to_dict()
  # What recipes for one model differ in.
  config['model'] |= {'drop_path_rate': 0.0, 'head_std': None}
  model = {key: config[key] for key in ('model', 'image_size', 'channels')}
  assert count_parameters(json.dumps(model, sort_keys=True)) == PARAMETERS[name]
