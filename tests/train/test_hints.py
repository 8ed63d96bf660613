"""Flags that messages name, and settings that nothing reads."""

import shlex
import sys

import pytest

from configs import (
  base,
  demo,
  finetune_hivit_b,
  linear_hivit_b,
  mae_hivit_b,
  segment_hivit_b,
  simmim_swin_b,
)
from hivit_jax import settings
from hivit_jax.train import hints
from tests.runs import warnings_of
from tests.test_configs import NAMES, load, variants


def test_defaults_are_those_of_the_configs():
  config = base.get_config()
  for defaults, _ in hints._READERS:
    assert {key: settings.get(config, key) for key in defaults} == defaults


@pytest.mark.parametrize('name', NAMES)
def test_no_config_has_a_setting_without_effect(name):
  for variant in (None, *variants(name)):
    assert hints.without_effect(load(name, variant)) == [], variant


@pytest.mark.parametrize(
  ('module', 'setting', 'value', 'why'),
  [
    (mae_hivit_b, 'augment.mixup', 0.8, 'task=mae'),
    (mae_hivit_b, 'augment.label_smoothing', 0.1, 'task=mae'),
    (mae_hivit_b, 'evaluation.every_epochs', 2.0, 'task=mae'),
    (mae_hivit_b, 'optim.momentum', 0.5, 'optim.name=adamw'),
    (finetune_hivit_b, 'pictures.every_epochs', 1.0, 'task=classify'),
    (finetune_hivit_b, 'augment.color_jitter', 0.4, 'augment.rand_augment=rand-m9-mstd0.5-inc1'),
    (linear_hivit_b, 'optim.b1', 0.8, 'optim.name=lars'),
    (linear_hivit_b, 'augment.switch_probability', 0.1, 'used only with both augment.mixup and'),
    (demo, 'init_ema', True, 'init=None'),
    (mae_hivit_b, 'augment.mix_group', 64, 'no augment.mixup or augment.cutmix'),
    (mae_hivit_b, 'optim.milestones', (5.0,), 'optim.schedule=cosine'),
    (mae_hivit_b, 'optim.power', 0.9, 'optim.schedule=cosine'),
    (simmim_swin_b, 'optim.warmup_prefix', False, 'optim.schedule=step'),
    (mae_hivit_b, 'optim.layer_decay_of', 'peak', 'optim.layer_decay=None'),
    (mae_hivit_b, 'segment.mean_over', 'labelled', 'task=mae'),
  ],
)
def test_a_setting_that_nothing_reads_is_named_with_the_reason(module, setting, value, why):
  config = module.get_config()
  config.update_from_flattened_dict({setting: value})
  (line,) = hints.without_effect(config)
  assert line.startswith(f'{setting}={value} ({why}')


def test_a_rate_per_batch_beside_a_fixed_one_is_named_if_it_was_given():
  config = demo.get_config()
  assert config.optim.lr == 1e-3
  assert hints.without_effect(config) == []
  given = {'optim.base_lr', 'optim.base_end_lr'}
  assert hints.without_effect(config, given) == ['optim.base_lr=0.0001 (optim.lr=0.001)']


def test_what_is_read_is_not_named():
  config = finetune_hivit_b.get_config()
  config.augment.update(mixup=0.2, cutmix=0.5, switch_probability=0.1, erase=0.1)
  config.optim.update(b1=0.8, eps=1e-6)
  config.evaluation.every_epochs = 2.0
  config.init_ema = True
  assert hints.without_effect(config) == []


def test_the_ways_to_finite_numbers_start_from_what_there_is():
  config = demo.get_config()
  assert shlex.split(hints.for_finite_numbers(config).replace(', ', ' ')) == [
    '--config.optim.clip_norm=1.0', '--config.optim.lr=0.0005', '--config.optim.warmup_epochs=2',
  ]  # fmt: skip
  config.optim.update(lr=None, clip_norm=4.0, warmup_epochs=15.0)
  config.model.dtype = 'bfloat16'
  assert shlex.split(hints.for_finite_numbers(config).replace(', ', ' ')) == [
    '--config.optim.clip_norm=2.0', '--config.optim.base_lr=5e-05', '--config.model.dtype=float32',
  ]  # fmt: skip


def test_the_ways_to_less_memory_are_those_that_the_task_allows():
  config = segment_hivit_b.get_config()
  assert hints.for_memory(config) == (
    '--config.model.remat=True, --config.batch_size=16, --config.evaluation.batch_size=8, more '
    'devices'
  )
  config = mae_hivit_b.get_config()
  config.accumulate_steps = 2
  assert hints.for_memory(config, batches=()) == (
    '--config.accumulate_steps=4, --config.model.remat=True, more devices'
  )


def test_the_way_to_more_data_uses_cores_that_there_are(monkeypatch):
  config = base.get_config()
  monkeypatch.setattr(hints, 'usable_cores', lambda: 96)
  monkeypatch.setattr(hints.jax, 'local_device_count', lambda: 1)
  assert hints.for_data(config) == (
    '16 threads load; --config.data.num_workers=12 uses more of 96 cores'
  )
  config.data.num_workers = 12
  assert hints.for_data(config).startswith('all 96 cores load already; ')
  config.data.update(num_threads=2, num_workers=None)
  assert '--config.data.num_threads=None' in hints.for_data(config)


def test_a_run_warns_once_of_all_settings_without_effect(runs, tmp_path):
  changed = {'augment__mixup': 0.5, 'optim__momentum': 0.5, 'max_steps': 1}
  done = runs.train(tmp_path / 'run', **changed, knn__every_epochs=0, pictures__every_epochs=0)
  assert done.returncode == 0, done.stderr
  assert warnings_of(done.stderr) == [
    'settings without effect in this run: augment.mixup=0.5 (task=mae), optim.momentum=0.5 '
    '(optim.name=adamw)'
  ]


def test_a_linear_probe_of_a_random_model_is_told(runs, tmp_path):
  config = '--config=configs/linear_hivit_b.py:debug'
  flags = ('--config.max_steps=1', '--config.evaluation.every_epochs=0')
  done = runs.finish([sys.executable, 'main.py', config, f'--workdir={tmp_path}/run', *flags])
  assert done.returncode == 0, done.stderr
  (line,) = warnings_of(done.stderr)
  assert line == (
    'a linear probe of a random model, because config.init is not set; to probe a pretrained one: '
    '--config.init=WORKDIR'
  )
