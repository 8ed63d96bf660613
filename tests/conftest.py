"""Fixtures that several test files share."""

import gc
import inspect
import os
import pathlib
import shutil
import subprocess
from collections.abc import Callable, Iterator
from typing import NamedTuple

import filelock
import jax
import pytest

from hivit_jax.data.sources.base import open_source
from hivit_jax.runtime import compilation_cache
from tests import slowest
from tests.runs import QUICK, ROOT, STEPS, Forks, Runs

# Compiles to slower code in half the time, here and in the processes that tests start: nearly every
# program runs once. `helpers.optimized` and `runs.OPTIMIZED` are for the others.
jax.config.update('jax_disable_most_optimizations', True)
os.environ['JAX_DISABLE_MOST_OPTIMIZATIONS'] = '1'
os.environ['XLA_FLAGS'] = f'{os.environ.get("XLA_FLAGS", "")} {QUICK}'.strip()
# Programs compiled here, or by processes that tests start, are kept for all of them and for the
# next run.
os.environ['XDG_CACHE_HOME'] = str(ROOT / '.pytest_cache')
compilation_cache.turn_on()


def pytest_collection_finish() -> None:
  """Lets Python look for garbage rarely: tracing makes many objects, and nearly all are needed."""
  gc.freeze()
  gc.set_threshold(50_000, 20, 100)


class Finished(NamedTuple):
  """A run that has ended by itself: never write to its workdir, copy it."""

  workdir: pathlib.Path
  log: str


_TRAINED = {'finished', 'longer'}


@pytest.hookimpl(tryfirst=True)  # before `-m` selects
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
  """Marks as slow the tests that start training runs, need one that has ended, or took long."""
  took_long = slowest.listed()
  for item in items:
    asked = inspect.signature(item.function).parameters
    if 'runs' in asked or _TRAINED & set(item.fixturenames) or item.nodeid in took_long:
      item.add_marker(pytest.mark.slow)


@pytest.fixture(scope='session')
def once(
  tmp_path_factory, worker_id
) -> Callable[[str, Callable[[pathlib.Path], None]], pathlib.Path]:
  """`once(name, make)`: a directory that `make(directory)` fills, once for all workers."""
  common = tmp_path_factory.getbasetemp()
  if worker_id != 'master':
    common = common.parent

  def get(name: str, make: Callable[[pathlib.Path], None]) -> pathlib.Path:
    directory, made = common / name, common / f'{name}.made'
    with filelock.FileLock(common / f'{name}.lock'):
      if not made.exists():
        directory.mkdir(exist_ok=True)
        make(directory)
        made.touch()
    return directory

  return get


@pytest.fixture(scope='session')
def data_dir(once) -> pathlib.Path:
  """The embedded data sets: never write to it."""

  def prepare(directory: pathlib.Path) -> None:
    for name in ('photo_tiles', 'photo_scenes', 'digits'):
      open_source(name, 'train', str(directory))

  return once('data', prepare)


@pytest.fixture(scope='session')
def runs(tmp_path_factory, data_dir) -> Iterator[Runs]:
  with Runs(tmp_path_factory.mktemp('runs'), data_dir) as runs:
    yield runs


@pytest.fixture(scope='session')
def forks(runs) -> Forks:
  return runs.forks


@pytest.fixture(scope='session')
def finished(runs, once) -> Finished:
  return _trained(once, 'finished', lambda workdir: runs.train(workdir))


@pytest.fixture(scope='session')
def longer(runs, finished, once) -> Finished:
  """The finished run, continued by four steps."""

  def train(workdir: pathlib.Path) -> subprocess.CompletedProcess:
    shutil.copytree(finished.workdir, workdir)
    return runs.train(workdir, max_steps=STEPS + 4)

  return _trained(once, 'longer', train)


def _trained(once, name: str, train: Callable[[pathlib.Path], subprocess.CompletedProcess]):
  def make(directory: pathlib.Path) -> None:
    done = train(directory / 'run')
    assert done.returncode == 0, done.stderr
    (directory / 'log').write_text(done.stderr, 'utf-8')

  directory = once(name, make)
  return Finished(directory / 'run', (directory / 'log').read_text('utf-8'))
