"""What docs/reliability.md promises of whole runs, with real processes, files and disks."""

import os
import re
import shutil
import signal
import socket
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests import soak
from tests.runs import SETTINGS, STEPS, content, error_of


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
  flags = [f'--config.{key}={value}' for key, value in SETTINGS.items() if key != 'max_steps']
  command = [sys.executable, '-m', 'tests.soak', f'--workdir={workdir}', f'--steps={STEPS + 4}']
  done = runs.finish([*command, '--config=configs/demo.py:debug', *flags])
  *lines, wrote = done.stdout.splitlines()
  assert [line.split()[1] for line in lines] == list(soak.BOUNDS), done.stderr
  assert done.returncode == any(line.startswith('BAD') for line in lines)
  assert f'step {STEPS + 4}/{STEPS + 4} (100%)' in done.stderr
  assert wrote == f'wrote {workdir}/soak.png'
  with Image.open(workdir / 'soak.png') as picture:
    assert len(np.unique(np.asarray(picture).reshape(-1, 4), axis=0)) > 50
