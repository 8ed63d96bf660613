"""How a run came about is in `config.json`, and a change of its config is told."""

import os
import re
import shutil
import subprocess
import sys

import pytest

from hivit_jax.errors import UserError
from hivit_jax.reporting import run_info
from hivit_jax.reporting.run_info import ABSENT, config_changes, write_run_info
from tests.reporting.test_metrics import strict

CONFIG = {'model': 'hivit_tiny', 'optim': {'lr': 1e-3, 'betas': (0.9, 0.95)}, 'data': {}}


def test_config_json_says_how_the_run_came_about(tmp_path, monkeypatch):
  monkeypatch.setattr(sys, 'argv', ['main.py', '--workdir=/a b'])
  assert write_run_info(tmp_path / 'run', CONFIG) == {}
  info = strict((tmp_path / 'run/config.json').read_text())
  assert info['config'] == CONFIG | {'optim': {'lr': 1e-3, 'betas': [0.9, 0.95]}}
  (run,) = info['runs']
  assert run['command'].endswith("main.py '--workdir=/a b'")
  assert run['python'] == '.'.join(map(str, sys.version_info[:3]))
  assert re.match(r'\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d[+-]', run['started'])
  assert {'jax', 'jaxlib', 'flax', 'optax', 'orbax-checkpoint', 'grain', 'numpy', 'pillow'} <= {
    name for name, version in run['versions'].items() if version
  }
  assert run['devices'] == {'kind': 'cpu', 'count': run['devices']['count'], 'processes': 1}


def test_a_resumed_run_is_added_and_changes_are_told(tmp_path):
  write_run_info(tmp_path, CONFIG)
  assert config_changes(tmp_path, CONFIG) == {}  # the tuple that became a list is no change
  changed = {'model': 'hivit_tiny', 'optim': {'lr': 2e-3, 'betas': (0.9, 0.95)}, 'seed': 1}
  expected = {'optim.lr': (1e-3, 2e-3), 'seed': (ABSENT, 1), 'data': ({}, ABSENT)}
  assert config_changes(tmp_path, changed) == expected
  assert write_run_info(tmp_path, changed) == expected
  assert write_run_info(tmp_path, changed) == {}
  info = strict((tmp_path / 'config.json').read_text())
  assert info['config']['seed'] == 1
  assert [list(run['changed']) for run in info['runs']] == [[], list(expected), []]
  assert [p.name for p in tmp_path.iterdir()] == ['config.json']


def test_an_unwritable_workdir_is_named(tmp_path):
  (tmp_path / 'file').write_text('')
  with pytest.raises(UserError, match=r'cannot write .*file.*another --workdir'):
    write_run_info(tmp_path / 'file' / 'run', {})


@pytest.mark.parametrize('content', ['', '{"config": {', '[]', '{"config": {"a": 1}}', '\0' * 9])
def test_an_unreadable_config_json_does_not_stop_the_run(tmp_path, caplog, content):
  (tmp_path / 'config.json').write_text(content)
  assert write_run_info(tmp_path, CONFIG) == {}
  assert 'config.json was not written by this program' in caplog.text
  assert len(strict((tmp_path / 'config.json').read_text())['runs']) == 1


@pytest.mark.skipif(shutil.which('git') is None, reason='needs git')
def test_the_commit_is_that_of_the_checkout_the_code_is_part_of(tmp_path, monkeypatch):
  for name in [name for name in os.environ if name.startswith('GIT_')]:
    monkeypatch.delenv(name)
  file, stray = tmp_path / 'code.py', tmp_path / 'stray.py'
  file.write_text('1')
  assert run_info._git_state(file) is None
  git = ['git', '-C', str(tmp_path), '-c', 'user.name=n', '-c', 'user.email=e@x']
  for arguments in (['init', '-q'], ['add', 'code.py'], ['commit', '-q', '-m', 'one']):
    subprocess.run([*git, *arguments], check=True)
  state = run_info._git_state(file)
  assert re.fullmatch(r'[0-9a-f]{40}', state['commit'])
  assert state['dirty'] is False
  file.write_text('2')
  assert run_info._git_state(file) == state | {'dirty': True}
  stray.write_text('')
  assert run_info._git_state(stray) is None
