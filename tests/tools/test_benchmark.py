"""The benchmark of training steps, as a command."""

import json
import sys

import pytest


@pytest.mark.parametrize('config', ['mae_hivit_t', 'finetune_hivit_t', 'linear_hivit_b'])
def test_every_kind_of_step_is_measured(runs, config):
  command = [sys.executable, '-m', 'hivit_jax.tools.benchmark', '--json', '--steps=1']
  done = runs.finish([*command, f'--config=configs/{config}.py:debug', '--batch_size=2'])
  assert done.returncode == 0, done.stderr
  report = json.loads(done.stdout.splitlines()[-1])
  for key in ('compile_seconds', 'step_ms', 'gflop_per_image', 'matmul_gflops', 'step_memory_mb'):
    assert report[key] > 0, key
  assert 0 < report['host_ms_per_step'] < 1000
  assert 0 < report['matmul_share'] < 1
  assert report['batch_size'] == 2
