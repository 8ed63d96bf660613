"""The report about a machine."""

import json

import jax
import pytest
from PIL import Image

from hivit_jax.tools import report, report_page, timing
from hivit_jax.tools.report import Entry
from hivit_jax.tools.timing import TrainingStep
from hivit_jax.train import sharding

TINY = Entry('tiny', 'mae_hivit_t:debug', profiled=True)


@pytest.fixture(autouse=True)
def small(monkeypatch):
  """What steps are compared with, so small that it takes no time."""
  monkeypatch.setattr(timing, '_MATMUL_SIDE', {'cpu': 128})
  monkeypatch.setattr(report, '_COPIED', 2**20)


@pytest.mark.slow
def test_steps_are_measured_and_what_cannot_be_is_named(tmp_path):
  entries = (
    TINY,
    Entry('for a GPU', 'mae_hivit_t:debug', {'model.attention': 'cudnn'}, nvidia=True),
    Entry('no such heads', 'mae_hivit_t:debug', {'model.num_heads': 5}),
  )
  lines = []
  found = report.measure(entries, batch_size=2, rounds=2, say=lines.append)
  (row,) = found['rows']
  assert (row['name'], row['batch_size']) == ('tiny', 2)
  for key in ('step_ms', 'images_per_second', 'matmul_share', 'memory_gb', 'host_ms'):
    assert row[key] > 0, key
  low, high = row['step_ms_range']
  assert low <= row['step_ms'] <= high
  assert found['missing']['for a GPU'] == 'for NVIDIA GPUs only'
  assert 'num_heads=5' in found['missing']['no such heads']
  assert any(line.startswith('compiled tiny') for line in lines)

  kernels = found['kernels']['tiny']
  assert kernels[0]['milliseconds'] >= kernels[-1]['milliseconds'] > 0
  assert kernels[0]['calls'] >= 1

  report_page.write(found, tmp_path, 'the command')
  assert json.loads((tmp_path / 'report.json').read_text()) == json.loads(json.dumps(found))
  page = (tmp_path / 'report.md').read_text()
  for text in ('the command', '| tiny |', kernels[0]['name'][:40], '- for a GPU: for NVIDIA'):
    assert text in page
  with Image.open(tmp_path / 'report.png') as picture:
    assert picture.width > picture.height > 100


@pytest.mark.slow
def test_steps_are_compiled_side_by_side():
  entries = (TINY, Entry('Swin', 'simmim_swin_b:debug'), Entry('none', 'no_such_config'))
  lines = []
  first, second, third = report._compile(entries, 2, lines.append)
  assert (first.config.model.name, second.config.model.name) == (
    'mae_hivit_tiny',
    'simmim_swin_base',
  )
  assert first.seconds() > 0 < second.seconds()
  assert third.startswith('UserError: ')
  assert len(lines) == 2


def test_a_step_that_does_not_run_is_named(monkeypatch):
  class Step(TrainingStep):
    def __init__(self, config, *, batch_size):
      config.batch_size = batch_size
      self.config, self.mesh, self.dtype = config, sharding.make_mesh(), 'float32'
      self.compile_seconds = self.memory = 1

    def start(self):
      raise RuntimeError('RESOURCE_EXHAUSTED: out of memory')

  monkeypatch.setattr(report, 'TrainingStep', Step)
  found = report.measure((TINY,), batch_size=1, rounds=1)
  assert found['missing'] == {'tiny': 'RuntimeError: RESOURCE_EXHAUSTED: out of memory'}


def test_without_time_nothing_is_measured():
  found = report.measure((TINY,), batch_size=2, rounds=1, minutes=0)
  assert not found['rows']
  assert found['missing'] == {'tiny': 'no time left'}
  assert found['machine']['device'].endswith(jax.devices()[0].device_kind)


@pytest.mark.parametrize(('limit', 'expected'), [(100, 8), (799, 64), (1e9, 128), (0.5, 1)])
def test_the_largest_power_of_two_that_fits(monkeypatch, limit, expected):
  class Step(TrainingStep):  # 10 bytes an image, and 20 more
    def __init__(self, config, *, batch_size):
      self.batch, self.memory = batch_size, 20 + 10 * batch_size

  monkeypatch.setattr(report, 'TrainingStep', Step)
  monkeypatch.setattr(report, 'LARGEST_BATCH', 128)
  monkeypatch.setattr(report, '_FIRST_BATCH', 32)
  assert report._largest(None, limit).batch == expected


def test_entries_are_published_configs():
  names = [entry.name for entry in report.ENTRIES]
  assert len(set(names)) == len(names)
  assert report.ENTRIES[0].config == 'mae_hivit_b'
