"""A tidy terminal: short log lines, and a progress bar that they do not garble."""

import contextlib
import fcntl
import io
import logging
import os
import pathlib
import re
import struct
import subprocess
import sys
import termios
import warnings

import pytest

from hivit_jax.reporting.console import Progress, setup_logging

ROOT = pathlib.Path(__file__).parents[2]


@pytest.fixture
def clean_logging():
  """Puts the global state that `setup_logging` changes back."""
  root, ours = logging.getLogger(), logging.getLogger('hivit_jax')
  handlers, levels = root.handlers[:], (root.level, ours.level)
  yield
  logging.captureWarnings(False)
  root.handlers[:] = handlers
  root.setLevel(levels[0])
  ours.setLevel(levels[1])


class Terminal:
  """A pseudo-terminal and what a person would see on it."""

  def __init__(self):
    self._master, slave = os.openpty()
    self.resize(100)
    self.stream = open(slave, 'w')  # noqa: SIM115
    self._text = ''

  def resize(self, columns: int):
    fcntl.ioctl(self._master, termios.TIOCSWINSZ, struct.pack('HHHH', 24, columns, 0, 0))

  def screen(self) -> list[str]:
    self.stream.flush()
    os.set_blocking(self._master, False)
    text = ''
    while True:
      try:
        text += os.read(self._master, 1 << 16).decode()
      except BlockingIOError:
        break
    self._text += text
    lines, row, column = [''], 0, 0
    for part in re.findall(r'\x1b\[\w+|[\r\n]|[^\r\n\x1b]+', self._text):
      if part == '\r':
        column = 0
      elif part == '\n':
        row += 1
        lines += [''] * (row + 1 - len(lines))
      elif part == '\x1b[A':
        row -= 1
      else:
        assert '\x1b' not in part
        line = lines[row].ljust(column)
        lines[row] = line[:column] + part + line[column + len(part) :]
        column += len(part)
    return [line.rstrip() for line in lines]

  def writes(self) -> int:
    """How often the line was written so far."""
    return self._text.count('\r')

  def close(self):
    self.stream.close()
    os.close(self._master)


@pytest.fixture
def terminal(clean_logging):
  terminal = Terminal()
  yield terminal
  terminal.close()


def test_bar_shows_progress_metrics_and_time_to_go(terminal):
  now = [0.0]
  with Progress(200, 100, stream=terminal.stream, clock=lambda: now[0]) as progress:
    progress.update(110, {'loss': 0.61234567, 'images/s': 1234.5})
    (bar,) = terminal.screen()
    assert bar.startswith(' 55% ')
    assert bar.endswith(' 110/200, loss 0.6123, images/s 1234')
    now[0] = 100.0
    progress.update(120, {'loss': 0.5, 'images/s': 12.25})
  bar, below = terminal.screen()
  assert bar.startswith(' 60% ')
  assert bar.endswith(' 120/200, loss 0.5, images/s 12.25, ETA 0:13:20')
  assert below == ''


def test_log_messages_do_not_garble_the_bar(terminal):
  log = logging.getLogger('hivit_jax.somewhere')
  with contextlib.redirect_stderr(terminal.stream), warnings.catch_warnings():
    warnings.simplefilter('default')
    setup_logging()
    with Progress(10) as progress:
      progress.update(1, {'loss': 1.0})
      log.info('first')
      progress.update(2, {'loss': 2.0})
      warnings.warn('a warning that Python would print', stacklevel=1)
      progress.update(10, {'loss': 3.0})
    log.info('after')
  screen = terminal.screen()
  assert re.fullmatch(r'\d\d:\d\d:\d\d I first', screen[0])
  assert re.search(r' W .*UserWarning: a warning that Python would print', screen[1])
  (bar,) = (line for line in screen if '%' in line)
  assert bar.startswith('100% ')
  assert bar.endswith(' 10/10, loss 3, ETA 0:00:00')
  assert re.fullmatch(r'\d\d:\d\d:\d\d I after', screen[-2])
  assert screen[-1] == ''


def test_without_a_terminal_there_are_lines_at_intervals(caplog):
  caplog.set_level(logging.INFO, 'hivit_jax')
  now = [0.0]
  with Progress(1000, interval_seconds=10, stream=io.StringIO(), clock=lambda: now[0]) as progress:
    for step in range(100, 1001, 100):
      progress.update(step, {'loss': 1 / step, 'images/s': 5000.4})
      now[0] += 4
  assert [record.getMessage() for record in caplog.records] == [
    'step 100/1000 (10%) loss 0.01, images/s 5000',
    'step 400/1000 (40%) loss 0.0025, images/s 5000, ETA 0:00:24',
    'step 700/1000 (70%) loss 0.001429, images/s 5000, ETA 0:00:12',
    'step 1000/1000 (100%) loss 0.001, images/s 5000, ETA 0:00:00',
  ]


def test_updates_that_nobody_could_read_are_not_shown_but_the_last_is(terminal):
  now = [0.0]
  with Progress(5000, title='preparing', stream=terminal.stream, clock=lambda: now[0]) as progress:
    for done in range(1, 5001):
      now[0] = done / 10_000
      progress.update(done, {})
  lines = terminal.screen()
  assert lines[0].startswith('preparing: 100% ')
  assert ' 5000/5000, ETA 0:00:00' in lines[0]
  assert terminal.writes() < 100


def test_a_terminal_without_columns_gets_lines(terminal, caplog):
  caplog.set_level(logging.INFO, 'hivit_jax')
  terminal.resize(0)
  with Progress(10, stream=terminal.stream) as progress:
    progress.update(5, {'loss': 1.0})
  assert caplog.messages == ['step 5/10 (50%) loss 1']


def test_other_processes_show_no_progress(terminal, caplog):
  caplog.set_level(logging.INFO, 'hivit_jax')
  with Progress(10, stream=terminal.stream, primary=False) as progress:
    progress.update(10, {'loss': 1.0})
  assert terminal.screen() == ['']
  assert not caplog.records


@pytest.mark.usefixtures('clean_logging')
@pytest.mark.parametrize('primary', [True, False])
def test_log_lines_are_short_and_third_parties_quiet(capsys, primary):
  from absl import logging as absl_logging

  basic = logging.StreamHandler()  # as `logging.info()` without a handler adds
  basic.setFormatter(logging.Formatter(logging.BASIC_FORMAT))
  logging.getLogger().addHandler(basic)
  setup_logging(primary)
  setup_logging(primary)  # not twice
  logging.getLogger('hivit_jax.train').info('ours')
  logging.getLogger('hivit_jax.train').warning('ours too')
  logging.getLogger('jax').info('chatter')
  absl_logging.info('chatter of orbax')
  absl_logging.warning('theirs')
  lines = capsys.readouterr().err.splitlines()
  assert all(re.match(r'\d\d:\d\d:\d\d [IW] ', line) for line in lines)
  assert [line[9:] for line in lines] == ['I ours'] * primary + ['W ours too', 'W theirs']


def test_importing_it_is_cheap():
  script = """
import sys
from hivit_jax.reporting import console, metrics, run_info
heavy = {'jax', 'numpy', 'tensorboard', 'tqdm'} & set(sys.modules)
assert not heavy, heavy
"""
  subprocess.run([sys.executable, '-c', script], cwd=ROOT, check=True)
