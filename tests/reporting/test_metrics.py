"""What a run's traces promise: one valid line a step, whatever interrupts, and a tidy terminal."""

import contextlib
import fcntl
import io
import json
import logging as std_logging
import os
import pathlib
import re
import resource
import shutil
import struct
import subprocess
import sys
import termios
import warnings

import jax.numpy as jnp
import numpy as np
import pytest

from hivit_jax.errors import UserError
from hivit_jax.reporting import metrics
from hivit_jax.reporting.metrics import (
  ABSENT,
  MetricWriter,
  Progress,
  config_changes,
  write_run_info,
)

ROOT = pathlib.Path(__file__).parents[2]


def strict(line: str):
  """JSON as the standard has it, without Python's NaN."""

  def refuse(constant):
    raise AssertionError(constant)

  return json.loads(line, parse_constant=refuse)


def rows(workdir):
  return [strict(line) for line in (workdir / 'metrics.jsonl').read_text().splitlines()]


def write_steps(workdir, steps, value=0.5, **options):
  with MetricWriter(workdir, **options) as writer:
    for step in steps:
      writer.write(step, {'train/loss': value})


# metrics.jsonl


def test_one_json_object_a_line_with_the_step_first(tmp_path):
  with MetricWriter(tmp_path) as writer:
    writer.write(10, {'train/loss': 0.25, 'train/seen': 640})
    writer.write(20, {'train/loss': jnp.float32(0.5), 'train/seen': np.int64(1280)})
    assert len(rows(tmp_path)) == 2  # in the file without being closed
  text = (tmp_path / 'metrics.jsonl').read_text()
  assert text == (
    '{"step": 10, "train/loss": 0.25, "train/seen": 640}\n'
    '{"step": 20, "train/loss": 0.5, "train/seen": 1280}\n'
  )


def test_metrics_of_one_step_share_a_line(tmp_path):
  with MetricWriter(tmp_path) as writer:
    writer.write(10, {'train/loss': 0.25})
    writer.write(10, {'eval/knn_top1': 0.5})
    writer.write(20, {'train/loss': 0.125})
    writer.write(20, {'train/loss': 0.1})  # shorter than what it replaces
  assert rows(tmp_path) == [
    {'step': 10, 'train/loss': 0.25, 'eval/knn_top1': 0.5},
    {'step': 20, 'train/loss': 0.1},
  ]


def test_a_row_that_the_disk_has_no_room_for_is_an_error_and_no_half_row_stays(tmp_path):
  write_steps(tmp_path, [1])
  soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
  with MetricWriter(tmp_path, start_step=1) as writer:
    size = (tmp_path / 'metrics.jsonl').stat().st_size
    try:
      resource.setrlimit(resource.RLIMIT_FSIZE, (size + 10, hard))
      with pytest.raises(OSError, match='File too large'):
        writer.write(2, {'train/loss': 0.5})
    finally:
      resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
  write_steps(tmp_path, [2], start_step=1)
  assert [row['step'] for row in rows(tmp_path)] == [1, 2]


def test_nan_and_infinity_stay_valid_json(tmp_path):
  with MetricWriter(tmp_path) as writer:
    writer.write(1, {'a': float('nan'), 'b': jnp.float32(jnp.inf), 'c': -np.inf, 'd': 1.0})
  assert rows(tmp_path) == [{'step': 1, 'a': None, 'b': None, 'c': None, 'd': 1.0}]


def test_a_resumed_run_has_every_step_once(tmp_path):
  write_steps(tmp_path, [10, 20, 30, 40], value=1.0)
  with MetricWriter(tmp_path, start_step=20) as writer:
    assert [row['step'] for row in rows(tmp_path)] == [10, 20]
    writer.write(20, {'eval/knn_top1': 0.5})  # still the line of step 20
    writer.write(30, {'train/loss': 2.0})
  assert rows(tmp_path) == [
    {'step': 10, 'train/loss': 1.0},
    {'step': 20, 'train/loss': 1.0, 'eval/knn_top1': 0.5},
    {'step': 30, 'train/loss': 2.0},
  ]
  assert sorted(p.name for p in tmp_path.iterdir()) == ['metrics.jsonl', 'tensorboard']


@pytest.mark.parametrize('torn', ['{"step": 30, "trai', '\0\0\0\0\n', '7\n', '{"loss": 1}\n'])
def test_a_torn_line_is_repaired(tmp_path, torn):
  write_steps(tmp_path, [10, 20])
  with open(tmp_path / 'metrics.jsonl', 'a') as file:
    file.write(torn)
  write_steps(tmp_path, [30], start_step=20)
  assert [row['step'] for row in rows(tmp_path)] == [10, 20, 30]


def test_a_cut_between_line_and_newline_loses_nothing(tmp_path):
  write_steps(tmp_path, [10, 20])
  file = tmp_path / 'metrics.jsonl'
  os.truncate(file, file.stat().st_size - 1)
  write_steps(tmp_path, [30], start_step=20)
  assert [row['step'] for row in rows(tmp_path)] == [10, 20, 30]


def test_lines_survive_kill_minus_nine(tmp_path):
  script = """
import os, signal, sys
from hivit_jax.reporting.metrics import MetricWriter
writer = MetricWriter(sys.argv[1])
for step in range(1, 4):
  writer.write(step, {'train/loss': step / 8})
os.kill(os.getpid(), signal.SIGKILL)
"""
  subprocess.run([sys.executable, '-c', script, tmp_path], cwd=ROOT, check=False)
  assert [row['train/loss'] for row in rows(tmp_path)] == [0.125, 0.25, 0.375]
  assert [(s, v) for s, _, v in scalars(tmp_path)] == [(1, 0.125), (2, 0.25), (3, 0.375)]


def test_other_processes_write_nothing(tmp_path):
  with MetricWriter(tmp_path / 'new', primary=False) as writer:
    writer.write(1, {'a': 1.0})
    writer.write_image(1, 'picture', np.zeros((2, 2, 3), np.uint8))
  assert write_run_info(tmp_path / 'new', {'a': 1}, primary=False) == {}
  assert not (tmp_path / 'new').exists()


@pytest.mark.parametrize('use', [MetricWriter, lambda workdir: write_run_info(workdir, {})])
def test_an_unwritable_workdir_is_named(tmp_path, use):
  (tmp_path / 'file').write_text('')
  with pytest.raises(UserError, match=r'cannot write .*file.*another --workdir'):
    use(tmp_path / 'file' / 'run')


# TensorBoard


def crc32c(data: bytes) -> int:
  crc = 0xFFFFFFFF
  for byte in data:
    crc ^= byte
    for _ in range(8):
      crc = crc >> 1 ^ (0x82F63B78 if crc & 1 else 0)
  return crc ^ 0xFFFFFFFF


def masked(data: bytes) -> int:
  crc = crc32c(data)
  return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF


def events(workdir):
  """Reads the event files by the TFRecord format: length, its CRC, data, its CRC."""
  from tensorboardX.proto import event_pb2

  for path in sorted((workdir / 'tensorboard').iterdir()):
    content = path.read_bytes()
    while content:
      (length,) = struct.unpack('<Q', content[:8])
      data = content[12 : 12 + length]
      assert struct.unpack('<I', content[8:12]) == (masked(content[:8]),)
      assert struct.unpack('<I', content[12 + length : 16 + length]) == (masked(data),)
      yield event_pb2.Event.FromString(data)
      content = content[16 + length :]


def scalars(workdir):
  return [
    (event.step, value.tag, value.simple_value)
    for event in events(workdir)
    for value in event.summary.value
    if value.HasField('simple_value')
  ]


def test_tensorboard_gets_the_scalars(tmp_path):
  with MetricWriter(tmp_path) as writer:
    writer.write(10, {'train/loss': 0.25})
    writer.write(20, {'train/loss': float('nan'), 'eval/knn_top1': jnp.float32(0.5)})
    written = scalars(tmp_path)  # flushed without being closed
  assert written[0] == (10, 'train/loss', 0.25)
  assert written[1][:2] == (20, 'train/loss')
  assert np.isnan(written[1][2])
  assert written[2:] == [(20, 'eval/knn_top1', 0.5)]


def test_tensorboard_forgets_what_comes_after_the_resumed_step(tmp_path):
  write_steps(tmp_path, [10, 20, 30])
  write_steps(tmp_path, [30], start_step=20)
  starts = [e.step for e in events(tmp_path) if e.HasField('session_log')]
  assert starts == [1, 21]  # from this step on, earlier events are discarded
  assert len(list((tmp_path / 'tensorboard').iterdir())) == 2  # even if both began in one second


def test_tensorboard_gets_the_pictures(tmp_path):
  from PIL import Image

  picture = np.random.default_rng(0).integers(0, 256, (5, 7, 3), np.uint8)
  with MetricWriter(tmp_path) as writer:
    writer.write_image(3, 'reconstructions', picture)
  (event,) = (e for e in events(tmp_path) if e.summary.value)
  (value,) = event.summary.value
  assert (event.step, value.tag) == (3, 'reconstructions')
  assert np.array_equal(Image.open(io.BytesIO(value.image.encoded_image_string)), picture)


@pytest.mark.parametrize(
  'image', [np.zeros((4, 4, 3), np.float32), np.zeros((4, 4), np.uint8), np.zeros((3, 4, 5), 'u1')]
)
def test_pictures_must_be_uint8_hwc(tmp_path, image):
  with (
    MetricWriter(tmp_path) as writer,
    pytest.raises(ValueError, match=r'p: expected \(H, W, C\)'),
  ):
    writer.write_image(1, 'p', image)


# The terminal


@pytest.fixture
def clean_logging():
  """Puts the global state that `setup_logging` changes back."""
  root, ours = std_logging.getLogger(), std_logging.getLogger('hivit_jax')
  handlers, levels = root.handlers[:], (root.level, ours.level)
  yield
  std_logging.captureWarnings(False)
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
  log = std_logging.getLogger('hivit_jax.somewhere')
  with contextlib.redirect_stderr(terminal.stream), warnings.catch_warnings():
    warnings.simplefilter('default')
    metrics.setup_logging()
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
  caplog.set_level(std_logging.INFO, 'hivit_jax')
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


def test_a_terminal_without_columns_gets_lines(terminal, caplog):
  caplog.set_level(std_logging.INFO, 'hivit_jax')
  terminal.resize(0)
  with Progress(10, stream=terminal.stream) as progress:
    progress.update(5, {'loss': 1.0})
  assert caplog.messages == ['step 5/10 (50%) loss 1']


def test_other_processes_show_no_progress(terminal, caplog):
  caplog.set_level(std_logging.INFO, 'hivit_jax')
  with Progress(10, stream=terminal.stream, primary=False) as progress:
    progress.update(10, {'loss': 1.0})
  assert terminal.screen() == ['']
  assert not caplog.records


@pytest.mark.usefixtures('clean_logging')
@pytest.mark.parametrize('primary', [True, False])
def test_log_lines_are_short_and_third_parties_quiet(capsys, primary):
  import absl.logging

  metrics.setup_logging(primary)
  metrics.setup_logging(primary)  # not twice
  std_logging.getLogger('hivit_jax.train').info('ours')
  std_logging.getLogger('hivit_jax.train').warning('ours too')
  std_logging.getLogger('jax').info('chatter')
  absl.logging.info('chatter of orbax')
  absl.logging.warning('theirs')
  lines = capsys.readouterr().err.splitlines()
  assert all(re.match(r'\d\d:\d\d:\d\d [IW] ', line) for line in lines)
  assert [line[9:] for line in lines] == ['I ours'] * primary + ['W ours too', 'W theirs']


# config.json


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


@pytest.mark.parametrize('content', ['', '{"config": {', '[]', '{"config": {"a": 1}}', '\0' * 9])
def test_an_unreadable_config_json_does_not_stop_the_run(tmp_path, caplog, content):
  (tmp_path / 'config.json').write_text(content)
  assert write_run_info(tmp_path, CONFIG) == {}
  assert 'config.json is not what this program writes' in caplog.text
  assert len(strict((tmp_path / 'config.json').read_text())['runs']) == 1


@pytest.mark.skipif(shutil.which('git') is None, reason='needs git')
def test_the_commit_is_that_of_the_checkout_the_code_is_part_of(tmp_path, monkeypatch):
  for name in [name for name in os.environ if name.startswith('GIT_')]:
    monkeypatch.delenv(name)
  file, stray = tmp_path / 'code.py', tmp_path / 'stray.py'
  file.write_text('1')
  assert metrics._git_state(file) is None
  git = ['git', '-C', str(tmp_path), '-c', 'user.name=n', '-c', 'user.email=e@x']
  for arguments in (['init', '-q'], ['add', 'code.py'], ['commit', '-q', '-m', 'one']):
    subprocess.run([*git, *arguments], check=True)
  state = metrics._git_state(file)
  assert re.fullmatch(r'[0-9a-f]{40}', state['commit'])
  assert state['dirty'] is False
  file.write_text('2')
  assert metrics._git_state(file) == state | {'dirty': True}
  stray.write_text('')
  assert metrics._git_state(stray) is None


def test_importing_it_is_cheap():
  script = """
import sys
import hivit_jax.reporting.metrics
heavy = {'jax', 'numpy', 'tensorboardX', 'tqdm'} & set(sys.modules)
assert not heavy, heavy
"""
  subprocess.run([sys.executable, '-c', script], cwd=ROOT, check=True)
