"""The benchmark of training steps, as a command."""

import json
import os
import pathlib
import subprocess
import sys

from PIL import Image

from hivit_jax.tools import compare
from tests.runs import error_of


def test_a_step_is_measured(runs):
  """A classifier's. The next test measures pretraining and a linear probe."""
  command = [sys.executable, '-m', 'hivit_jax.tools.benchmark', '--json', '--steps=1']
  config = '--config=configs/supervised_hivit_t.py:debug'
  done = runs.finish([*command, config, '--batch_size=2'])
  assert done.returncode == 0, done.stderr
  report = json.loads(done.stdout.splitlines()[-1])
  for key in ('compile_seconds', 'step_ms', 'gflop_per_image', 'matmul_gflops', 'step_memory_mb'):
    assert report[key] > 0, key
  assert 0 < report['host_ms_fastest'] <= report['host_ms_per_step']
  assert report['batch_size'] == 2


def test_steps_are_compared_in_turns(runs, tmp_path):
  command = [sys.executable, '-m', 'hivit_jax.tools.benchmark', '--steps=3', '--batch_size=2']
  names = 'mae_hivit_t:debug,linear_hivit_b:debug'
  done = runs.finish([*command, f'--compare={names}', f'--out={tmp_path / "new" / "out"}'])
  assert done.returncode == 0, done.stderr
  out = tmp_path / 'new' / 'out'
  assert (out / 'comparison.md').read_text() == done.stdout
  report = json.loads((out / 'comparison.json').read_text())
  first, second = report['rows']
  assert [first['config'], second['config']] == names.split(',')
  assert (first['ratio'], first['ratio_range']) == (1, [1, 1])
  low, high = second['ratio_range']
  assert 0 < low <= second['ratio'] <= high
  assert first['gflop_per_image'] != second['gflop_per_image']
  with Image.open(out / 'comparison.png') as picture:
    assert picture.width > picture.height > 300


def test_the_papers_comparison_is_of_published_configs():
  groups = compare.load('paper')
  sizes = {name: c.image_size for group in groups.values() for name, c in group.items()}
  assert sizes.pop('simmim_swin_b') == (192, 192)
  assert set(sizes.values()) == {(224, 224)}
  assert next(iter(groups['pretraining'])) == 'mae_hivit_b'  # the others are compared with it
  assert next(iter(compare.load('ladder').values())).keys() == {
    'supervised_swin_b', 'ladder_1_three_stages', 'ladder_2_global', 'ladder_3_mlp_stem',
    'supervised_hivit_b',
  }  # fmt: skip


def test_mistakes(forks):
  tool = 'hivit_jax/tools/benchmark.py'
  assert 'what to measure? Give' in error_of(forks(tool))
  assert 'did you mean "paper"' in error_of(forks(tool, '--compare=papr'))
  for config in ('evaluate', 'mae_hivit_t:debug, evaluate'):
    assert 'config.model.name is not set' in error_of(forks(tool, f'--compare={config}'))
  assert 'unknown variant ":x"' in error_of(forks(tool, '--compare=mae_hivit_t:x'))
  assert 'cannot write to --out=/proc/x' in error_of(
    forks(tool, '--compare=paper', '--out=/proc/x')
  )
  assert '--out needs --compare' in error_of(forks(tool, '--data', '--out=x'))
  assert '--beside needs --data' in error_of(forks(tool, '--compare=paper', '--beside=python'))
  assert '--minutes needs --report' in error_of(forks(tool, '--compare=paper', '--minutes=1'))
  assert 'cannot write to --report=/proc/no' in error_of(forks(tool, '--report=/proc/no'))


def test_a_report_on_a_machine_without_data_packages(tmp_path):
  for name in ('tensorflow_datasets', 'grain', 'array_record', 'clu'):
    (tmp_path / f'{name}.py').write_text('raise ModuleNotFoundError(__name__)')
  command = [sys.executable, '-m', 'hivit_jax.tools.benchmark', '--minutes=0']
  done = subprocess.run(
    [*command, f'--report={tmp_path / "report"}'],
    env=os.environ | {'PYTHONPATH': str(tmp_path)},
    cwd=pathlib.Path(__file__).parents[2],
    capture_output=True,
    text=True,
  )
  assert done.returncode == 0, done.stderr
  assert 'no time left' in (tmp_path / 'report' / 'report.md').read_text()
