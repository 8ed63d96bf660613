"""The command that plans a training step, for devices of each kind."""

import importlib.util
import json
import math
import sys

import pytest

from tests.runs import OPTIMIZED


def test_a_batch_that_does_not_divide(runs):
  command = [sys.executable, '-m', 'hivit_jax.tools.plan', '--config=configs/mae_hivit_t.py:debug']
  done = runs.finish([*command, '--topology=cpu:8', '--config.batch_size=12'])
  assert done.returncode == 2
  assert done.stderr == (
    'error: config.batch_size=12 is not divisible by 8 devices; try --config.batch_size=8 or '
    '--config.batch_size=16\n'
  )


# --- GPUs


@pytest.mark.skipif(
  not any(map(importlib.util.find_spec, ('jax_cuda12_plugin', 'jax_cuda13_plugin'))),
  reason='needs the CUDA compiler of JAX',
)
def test_plans_for_gpus(runs):
  command = [sys.executable, '-m', 'hivit_jax.tools.plan', '--config=configs/mae_hivit_t.py:debug']

  def finish(*arguments):
    done = runs.finish([*command, *arguments], OPTIMIZED)
    assert (done.returncode, done.stderr) == (0, '')
    return json.loads(done.stdout)

  reports = {
    name: finish('--topology=h200:2', '--json', f'--config.model.attention={name}')
    for name in ('xla', 'cudnn')
  }
  for name, report in reports.items():
    assert report['fits']
    assert (report['attention'], report['dtype']) == (name, 'bfloat16')
    assert [row['kind'] for row in report['collectives']] == ['all-reduce']
    assert report['estimate']['memory'] > 0
  xla, cudnn = (report['memory_traffic'] for report in reports.values())
  assert 0 < cudnn < xla
  xla, cudnn = (report['matmul_flops'] for report in reports.values())
  assert cudnn == pytest.approx(xla, rel=0.05)  # odd lengths are made even


# --- TPUs


@pytest.mark.skipif(not importlib.util.find_spec('libtpu'), reason='needs the TPU compiler, libtpu')
def test_plans_for_tpus(runs):
  command = [sys.executable, '-m', 'hivit_jax.tools.plan', '--config=configs/mae_hivit_t.py:debug']

  def finish(*arguments):
    done = runs.finish([*command, *arguments], OPTIMIZED)
    assert (done.returncode, done.stderr) == (0, '')
    return done.stdout

  report = json.loads(finish('--topology=v5e:2x2', '--config.mesh.fsdp=2', '--json'))
  assert report['fits']
  assert report['dtype'] == 'bfloat16'
  assert report['mesh'] == {'data': 2, 'fsdp': 2}
  kinds = {row['kind']: row for row in report['collectives']}
  assert kinds['all-gather']['bytes'] == pytest.approx(report['memory']['parameters'], rel=0.1)
  assert kinds['reduce-scatter']['devices'] == 2
  estimate = report['estimate']
  assert 0 < estimate['overlapped'] < estimate['serial']
  assert math.isclose(estimate['overlapped'], estimate[estimate['limiter']])
  assert '1 x TPU v4' in finish('--topology=v4:1x1x1')
  large = finish('--topology=v5e:1x1', '--batch_size=1000000')
  assert 'NO: RESOURCE_EXHAUSTED' in large
  wrong = runs.finish([*command, '--topology=v5e:3x3'])
  assert wrong.returncode == 2
  assert wrong.stderr.startswith('error: --topology=v5e:3x3: libtpu does not accept it: ')
  assert len(wrong.stderr.splitlines()) == 1
