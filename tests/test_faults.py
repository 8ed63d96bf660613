"""What docs/guide/reliability.md promises of whole runs, with real processes, files and disks."""

import os
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from hivit_jax.data.order import epoch_order
from hivit_jax.data.sources.folder import FolderSource
from hivit_jax.train.checkpoint import load_metadata
from tests import soak
from tests.runs import (
  SETTINGS,
  STEPS,
  assert_same_params,
  content,
  error_of,
  folder_of_images,
  last_step,
  metrics,
  warnings_of,
)


def test_a_second_run_in_a_workdir_is_refused_until_the_first_one_ends(
  runs, forks, finished, tmp_path
):
  workdir = shutil.copytree(finished.workdir, tmp_path / 'run')
  command = runs.command(workdir, max_steps=10**6, data__num_workers=1)
  with runs.start(command) as first:
    first.wait_for('compiled in')
    # All stand still, so that what changes is of the second run's doing.
    stopped = [first.pid, *children(first.pid)]
    for pid in stopped:
      os.kill(pid, signal.SIGSTOP)
    try:
      before = content(workdir)
      error = error_of(forks(*runs.command(workdir)[1:]))
      holder = f'process {first.pid} on {socket.gethostname()} since 20'
      assert error.startswith(f'{workdir} is in use by another run, {holder}')
      assert error.endswith('; wait until it ends, stop it, or choose another --workdir')
      assert content(workdir) == before
      # The kernel gives the lock back, though the data worker is still there.
      first.send(signal.SIGKILL)
      first.wait()
      assert any('spawn_main' in command_line(pid) for pid in stopped[1:])
      with runs.start(runs.command(workdir, max_steps=10**6)) as second:
        second.wait_for('resuming at step')
        assert re.match(rf'process {second.pid} on ', (workdir / 'lock').read_text())
    finally:
      for pid in stopped[1:]:
        os.kill(pid, signal.SIGKILL)


def children(pid: int) -> list[int]:
  threads = Path(f'/proc/{pid}/task').glob('*/children')
  return [int(child) for children in threads for child in children.read_text().split()]


def command_line(pid: int) -> str:
  return Path(f'/proc/{pid}/cmdline').read_text()


class Disk:
  """A small file system; without the right to mount one, a limit on the size of files."""

  def __init__(self, path: Path):
    path.mkdir()
    self._path, self._filler = path, path / 'filler'
    mount = ['mount', '-t', 'tmpfs', '-o', 'size=16m', 'tmpfs', path]
    self._mounted = subprocess.run(mount, capture_output=True).returncode == 0

  def __enter__(self) -> 'Disk':
    return self

  def __exit__(self, *exc_info) -> None:
    if self._mounted:
      subprocess.run(['umount', '--lazy', self._path], check=True)

  def fill(self, process, left: int) -> None:
    """Leaves so many bytes to a running process."""
    if self._mounted:
      self._filler.write_bytes(bytes(max(0, shutil.disk_usage(self._path).free - left)))
    else:
      room = max(left, 1 << 13)  # what it says is in a file, too
      resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (room, room))

  def make_room(self) -> None:
    self._filler.unlink(missing_ok=True)


def test_a_run_that_fills_the_disk_keeps_its_checkpoints_and_goes_on_when_there_is_room(
  runs, forks, finished, longer, tmp_path
):
  with Disk(tmp_path / 'disk') as disk:
    workdir = shutil.copytree(finished.workdir, tmp_path / 'disk/run')
    before = content(workdir / 'checkpoints')
    command = runs.command(workdir, max_steps=STEPS + 4)
    with runs.start(command) as process:
      disk.fill(process, left=300_000)  # a checkpoint takes 1.2 MB
      assert process.wait() == 2
      log = process.output()
    last = log.splitlines()[-1]
    assert last.startswith(
      f'error: could not save the checkpoint {workdir}/checkpoints/{STEPS + 4}: '
    )
    assert 'No space left on device' in last or 'File too large' in last
    assert f'; {workdir}/checkpoints/{STEPS} is kept; make room there (df -h) or choose' in last
    assert 'Traceback' not in log
    assert content(workdir / 'checkpoints').items() >= before.items()
    disk.make_room()
    done = forks(*command[1:])
    assert done.status == 0, done.stderr
    assert f'resuming at step {STEPS} of {STEPS + 4}' in done.stderr
    assert_same_params(workdir, longer.workdir, STEPS + 4)
    assert metrics(workdir) == metrics(longer.workdir)


def test_a_disk_without_room_for_metrics_ends_a_run_with_one_line(runs, finished, tmp_path):
  with Disk(tmp_path / 'disk') as disk:
    workdir = shutil.copytree(finished.workdir, tmp_path / 'disk/run')
    before = content(workdir / 'checkpoints')
    command = runs.command(workdir, max_steps=10**6, checkpoint__every_epochs=0)
    with runs.start(command) as process:
      process.wait_for('compiled in')
      disk.fill(process, left=0)
      assert process.wait() == 2
      log = process.output()
    last = log.splitlines()[-1]
    assert re.match(f'error: cannot write to {workdir}: (No space left on|File too large)', last)
    assert last.endswith('; make room (df -h) and start the same command again')
    assert 'Traceback' not in log
    assert content(workdir / 'checkpoints') == before


# Data that disappear


def test_a_file_that_disappears_is_told_and_replaced_as_a_broken_one_would_be(
  runs, forks, tmp_path
):
  root = tmp_path / 'data'
  data = folder_of_images(root, 64) | {'max_steps': 4, 'data__num_threads': 1}
  source = FolderSource(str(root), 'train')
  order = epoch_order(len(source), seed=0, epoch=0)
  door, victim = (Path(source.example_name(order[16 * step])) for step in (2, 3))
  image = door.read_bytes()
  door.unlink()
  os.mkfifo(door)  # the one thread that reads waits here until we write: before the victim
  workdir = tmp_path / 'run'
  with runs.start(runs.command(workdir, **data)) as process:
    process.wait_for('compiled in')
    victim.unlink()
    door.write_bytes(image)
    assert process.wait() == 0
    told = warnings_of(process.output())
  assert told[0].startswith(
    f'Broken example, replaced by another: {victim} (cannot be read: [Errno 2]'
  )
  assert told[1:] == ['1 broken training images were replaced; each is named above']
  assert metrics(workdir)[-1]['train/broken_images'] == 1
  # The same from the beginning, with a file that never was an image.
  door.unlink()
  door.write_bytes(image)
  victim.write_text('no image')
  other = tmp_path / 'other'
  assert forks(*runs.command(other, **data)[1:]).status == 0
  assert_same_params(workdir, other, 4)
  assert metrics(workdir) == metrics(other)


def test_when_all_files_disappear_a_run_stops_with_their_names_and_goes_on_when_they_are_back(
  runs, tmp_path
):
  root, workdir = tmp_path / 'data', tmp_path / 'run'
  command = runs.command(workdir, **folder_of_images(root, 64) | {'max_steps': 10**6})
  with runs.start(command) as process:
    process.wait_until(lambda: last_step(workdir) > 8, 'the first checkpoint begun')
    (root / 'train').rename(root / 'away')
    assert process.wait() == 2
    log = process.output()
  last = log.splitlines()[-1]
  error = (
    f'error: 100 examples of folder:{root} (train), drawn one after the other, are all broken: '
  )
  assert last.startswith(error)
  assert len(re.findall(rf'{root}/train/[ab]/\d+.jpg \(cannot be read: ', last)) == 20
  assert last.endswith(', and 80 more.')
  assert 'Traceback' not in log
  saved = load_metadata(workdir)['step']
  assert saved >= 8
  (root / 'away').rename(root / 'train')
  with runs.start(command) as process:
    process.wait_for(f'resuming at step {saved} of')


def test_a_deleted_shard_is_read_on_while_it_is_open_and_missed_before_the_next_start(
  runs, forks, finished, longer, tmp_path
):
  workdir = shutil.copytree(finished.workdir, tmp_path / 'run')
  prepared = shutil.copytree(Path(runs.environment['TFDS_DATA_DIR']), tmp_path / 'data')
  data = {'data__data_dir': prepared, 'max_steps': STEPS + 4}
  with runs.start(runs.command(workdir, **data)) as process:
    process.wait_for('compiling the training step')  # so the first batch is there
    (shard,) = prepared.glob('digits/*/*-train*')
    shard.unlink()
    assert process.wait() == 0
  assert_same_params(workdir, longer.workdir, STEPS + 4)
  before = content(workdir)
  error = error_of(forks(*runs.command(workdir, **data | {'max_steps': STEPS + 8})[1:]))
  assert f"1 of 1 files of split 'train[:64]' are missing, the first is {shard}" in error
  assert 'copy them again' in error
  assert content(workdir) == before


# Numbers


def test_a_nan_stops_a_run_at_its_step_and_without_it_the_run_ends_with_the_same_bits(
  runs, forks, finished, longer, tmp_path
):
  workdir = shutil.copytree(finished.workdir, tmp_path / 'run')
  flags = runs.command(workdir, max_steps=STEPS + 4)[2:]
  ended = forks('tests/nan_at.py', str(STEPS + 3), *flags)
  assert ended.status == 2, ended.stderr
  last = ended.stderr.splitlines()[-1]
  assert last.startswith(f'error: no longer finite at step {STEPS + 3}: loss nan, grad_norm nan')
  assert f'; the last good checkpoint is {workdir}/checkpoints/{STEPS}. The same comm' in last
  assert '--config.optim.clip_norm=1.0' in last
  assert 'Traceback' not in ended.stderr
  assert load_metadata(workdir)['step'] == STEPS
  assert metrics(workdir) == metrics(longer.workdir)[:-1]  # but for the row of the last two steps
  done = forks('main.py', *flags)
  assert done.status == 0, done.stderr
  assert f'resuming at step {STEPS} of' in done.stderr
  assert_same_params(workdir, longer.workdir, STEPS + 4)
  assert metrics(workdir) == metrics(longer.workdir)


# The long run


@pytest.mark.parametrize(
  ('metric', 'slope', 'bad'),
  [
    ('train/images_per_second', -0.2, True),
    ('train/images_per_second', -0.05, False),
    ('train/host_memory_mb', 0.1, True),
    ('train/host_memory_mb', -0.1, False),
    ('train/device_memory_mb', 0.1, True),
    ('train/device_memory_mb', 0.02, False),
  ],
)
def test_the_soak_finds_growing_memory_and_a_slow_down(metric, slope, bad):
  rng = np.random.default_rng(0)
  rows = {
    step: {m: 100 + 3 * rng.standard_normal() for m in soak.BOUNDS} for step in range(5, 2001, 5)
  }
  for step, row in rows.items():
    row[metric] *= 1 + slope * step / 2000
    if step < 200:  # start-up does not count
      row[metric] *= 3
  sound, lines = soak.verdict(rows)
  assert sound is not bad
  assert [metric in line for line in lines if line.startswith('BAD')] == [True] * bad


def test_the_soak_trains_looks_and_draws(runs, finished, tmp_path):
  workdir = shutil.copytree(finished.workdir, tmp_path / 'run')
  rare = {'knn.every_epochs': 0, 'pictures.every_epochs': 0}
  flags = [f'--config.{k}={v}' for k, v in (SETTINGS | rare).items() if k != 'max_steps']
  command = [sys.executable, '-m', 'tests.soak', f'--workdir={workdir}', f'--steps={STEPS + 4}']
  done = runs.finish([*command, '--config=configs/demo.py:debug', *flags])
  *lines, wrote = done.stdout.splitlines()
  assert [line.split()[1] for line in lines] == list(soak.BOUNDS), done.stderr
  assert done.returncode == any(line.startswith('BAD') for line in lines)
  assert f'step {STEPS + 4}/{STEPS + 4} (100%)' in done.stderr
  assert wrote == f'wrote {workdir}/soak.png'
  with Image.open(workdir / 'soak.png') as picture:
    assert len(np.unique(np.asarray(picture).reshape(-1, 4), axis=0)) > 50
