"""Fixtures that several test files share."""

import inspect
import os
import pathlib
import shutil
from collections.abc import Iterator
from typing import NamedTuple

import jax
import pytest

from tests import slowest
from tests.runs import QUICK, STEPS, Forks, Runs

# Compiles to slower code in half the time, here and in the processes that tests start: nearly every
# program runs once. `helpers.optimized` and `runs.OPTIMIZED` are for the others.
jax.config.update('jax_disable_most_optimizations', True)
os.environ['JAX_DISABLE_MOST_OPTIMIZATIONS'] = '1'
os.environ['XLA_FLAGS'] = f'{os.environ.get("XLA_FLAGS", "")} {QUICK}'.strip()


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
def data_dir(tmp_path_factory) -> pathlib.Path:
  """Where the embedded data sets are prepared on first use, once for all: never write to it."""
  return tmp_path_factory.mktemp('data')


@pytest.fixture(scope='session')
def runs(tmp_path_factory, data_dir) -> Iterator[Runs]:
  with Runs(tmp_path_factory.mktemp('runs'), data_dir) as runs:
    yield runs


@pytest.fixture(scope='session')
def forks(runs) -> Forks:
  return runs.forks


@pytest.fixture(scope='session')
def finished(runs, tmp_path_factory) -> Finished:
  workdir = tmp_path_factory.mktemp('finished') / 'run'
  done = runs.train(workdir)
  assert done.returncode == 0, done.stderr
  return Finished(workdir, done.stderr)


@pytest.fixture(scope='session')
def longer(runs, finished, tmp_path_factory) -> Finished:
  """The finished run, continued by four steps."""
  workdir = shutil.copytree(finished.workdir, tmp_path_factory.mktemp('longer') / 'run')
  done = runs.train(workdir, max_steps=STEPS + 4)
  assert done.returncode == 0, done.stderr
  return Finished(workdir, done.stderr)
