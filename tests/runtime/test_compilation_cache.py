"""What is compiled once is found by the next run; and that this never stops one."""

import os
import pathlib
import subprocess
import sys

import pytest

from hivit_jax.runtime import compilation_cache
from tests import patience
from tests.runs import ROOT, assert_same_params, metrics

# Prints a result and how many programs were found.
_COMPILE = """
import jax
from hivit_jax.runtime import compilation_cache
from hivit_jax.reporting.console import setup_logging
events = []
jax.monitoring.register_event_listener(lambda event, **_: events.append(event))
setup_logging()
compilation_cache.turn_on()
print(jax.jit(lambda x: 3 * x, donate_argnums=())(2), sum('cache_hits' in e for e in events))
"""

# Runs a program that says what it compiles and what it finds.
_TOLD = """
import runpy, sys
import jax
jax.config.update('jax_log_compiles', True)
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name='__main__')
"""


def environment(caches: os.PathLike, **settings: str) -> dict[str, str]:
  """This process's, without JAX's settings of caches."""
  start = ('JAX_COMPILATION_CACHE', 'JAX_PERSISTENT_CACHE', 'JAX_ENABLE_COMPILATION_CACHE')
  inherited = {key: value for key, value in os.environ.items() if not key.startswith(start)}
  return inherited | {'XDG_CACHE_HOME': str(caches)} | settings


def compile_one(forks, caches: os.PathLike) -> tuple[int, str]:
  """Compiles a small program; returns how many were found, and the log."""
  ended = forks('-c', _COMPILE, XDG_CACHE_HOME=str(caches))
  assert ended.status == 0, ended.stderr
  result, found = ended.stdout.split()
  assert result == '6'
  return int(found), ended.stderr


def programs(caches: pathlib.Path) -> dict[str, bytes]:
  return {path.name: path.read_bytes() for path in caches.rglob('*-cache')}


def test_a_run_finds_what_another_has_compiled_and_ends_with_the_same_bits(forks, tmp_path):
  def run(name: str) -> str:
    less = ('--config.knn.every_epochs=0', '--config.pictures.every_epochs=0')  # to compile
    command = ('main.py', '--config=configs/demo.py:debug', f'--workdir={tmp_path / name}', *less)
    ended = forks('-c', _TOLD, *command, XDG_CACHE_HOME=str(tmp_path / 'caches'))
    assert ended.status == 0, ended.stderr
    return ended.stderr

  run('first')
  compiled = programs(tmp_path / 'caches')
  assert any(name.startswith('jit_step-') for name in compiled)
  log = run('second')
  assert "Persistent compilation cache hit for 'jit_step'" in log
  assert programs(tmp_path / 'caches') == compiled
  first, second = tmp_path / 'first', tmp_path / 'second'
  assert [row['step'] for row in metrics(first)] == [1, 2]
  assert metrics(first) == metrics(second)
  assert_same_params(first, second, 2)


def test_half_a_file_is_replaced_with_one_line_about_it(forks, tmp_path):
  assert compile_one(forks, tmp_path) == (0, '')
  whole = programs(tmp_path)
  for path in tmp_path.rglob('*-cache'):
    path.write_bytes(path.read_bytes()[:-10])  # as a kill or a full disk leaves it
  _, log = compile_one(forks, tmp_path)
  assert log.count('\n') == len(whole)
  assert f'could not be read from {tmp_path}/hivit_jax/xla/' in log
  assert programs(tmp_path).keys() == whole.keys()
  assert compile_one(forks, tmp_path) == (len(whole), '')


def test_without_a_place_for_it_a_run_goes_on_with_one_line(forks, tmp_path):
  found, log = compile_one(forks, '/dev/null')
  assert found == 0
  assert log.count('\n') == 1
  assert 'compiled programs are not kept for the next run: ' in log
  assert '/dev/null/hivit_jax' in log


def test_settings_of_jax_win(tmp_path):
  """In processes of their own: JAX reads them when it is imported."""

  def compile_one(**settings: str) -> None:
    child = [sys.executable, '-c', _COMPILE]
    inherited = environment(caches, **settings)
    subprocess.run(child, cwd=ROOT, env=inherited, check=True, timeout=patience.limit(120))

  caches, other = tmp_path / 'caches', tmp_path / 'other'
  settings = {'JAX_COMPILATION_CACHE_DIR': str(other)}
  compile_one(**settings, JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS='0')
  assert programs(other)
  compile_one(JAX_ENABLE_COMPILATION_CACHE='false')
  assert not caches.exists()


def test_what_was_not_used_for_longest_is_deleted(tmp_path, monkeypatch):
  monkeypatch.setattr(compilation_cache, '_SIZE', 250)
  for name, age in (('old', 3), ('older', 4), ('new', 1), ('newer', 0)):
    path = tmp_path / f'of-{name}' / f'{name}-cache'
    path.parent.mkdir()
    path.write_bytes(bytes(100))
    os.utime(path, (10**9 - age, 10**9 - age))
  os.utime(tmp_path / 'of-older' / 'older-cache', (10**9 + 1, 10**9 - 4))  # but read since
  compilation_cache._make_room(tmp_path)
  assert sorted(programs(tmp_path)) == ['newer-cache', 'older-cache']


@pytest.mark.parametrize('differing', [{'flags': 'fpu avx2'}, {'model name': 'EPYC 2'}])
def test_programs_for_one_kind_of_cpu_are_not_given_to_another(tmp_path, differing):
  def name(clock: str, **told: str) -> str:
    lines = {'processor': '0', 'model name': 'EPYC', 'cpu MHz': clock, 'flags': 'fpu avx2 avx512f'}
    text = ''.join(f'{key}\t: {value}\n' for key, value in (lines | told).items())
    (tmp_path / 'cpuinfo').write_text(f'{text}\nprocessor : 1\n')
    return compilation_cache._cpu(tmp_path / 'cpuinfo')

  assert name('2400.0') == name('2500.0')
  assert name('2400.0') != name('2400.0', **differing)
