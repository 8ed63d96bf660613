"""Whole runs of `python main.py`: what they leave, and what happens when they are disturbed."""

import contextlib
import json
import os
import pty
import random
import re
import shlex
import shutil
import signal
import subprocess
import sys
import termios
import time

import numpy as np
import pytest
from PIL import Image

from tests import patience
from tests.runs import (
  BEFORE_LAST,
  ROOT,
  STEPS,
  TIMING,
  assert_same_params,
  content,
  folder_of_images,
  last_step,
  metrics,
  on_devices,
  warnings_of,
)


def copy(finished, tmp_path):
  """A workdir of one's own in which the finished run lies."""
  return shutil.copytree(finished.workdir, tmp_path / 'copy')


def checkpoints(workdir) -> list[str]:
  return sorted(path.name for path in (workdir / 'checkpoints').iterdir())


# What a run leaves


def test_a_run_leaves_metrics_pictures_checkpoints_and_how_it_was_started(finished):
  workdir = finished.workdir
  assert sorted(path.name for path in workdir.iterdir()) == [
    'checkpoints', 'config.json', 'lock', 'metrics.jsonl', 'reconstructions', 'tensorboard',
  ]  # fmt: skip
  rows = [json.loads(line) for line in (workdir / 'metrics.jsonl').read_text().splitlines()]
  steps = [row['step'] for row in rows]
  assert steps == sorted({s for s in range(STEPS + 1) if not (s % 3 and s % 8 and s % 10)})
  trained = [row for row in rows if row['step']]
  for row in trained:
    assert row.keys() >= {'train/loss', 'train/learning_rate', 'train/epoch', *TIMING}
    assert row['train/images_per_second'] > 0
    assert 0 <= row['train/data_wait_fraction'] <= 1
    assert row['train/epoch'] == row['step'] / 4
    assert row['train/host_memory_mb'] > 100
    # Parameters and two averages of them, and now and then a batch or what an evaluation keeps.
    assert 0.9 < row['train/device_memory_mb'] < 3
  assert trained[-1]['train/loss'] < trained[0]['train/loss']
  # Warmup from 0 over four steps: step s is made with the rate at (s - 1) / 4 epochs.
  assert trained[0]['train/learning_rate'] == pytest.approx(1e-3 * 2 / 4)
  assert trained[1]['train/learning_rate'] == pytest.approx(1e-3, rel=1e-5)
  evaluated = {row['step']: row['eval/knn_top1'] for row in rows if 'eval/knn_top1' in row}
  assert list(evaluated) == [0, 10, 20, 30, 40]
  assert all(0 <= accuracy <= 1 for accuracy in evaluated.values())
  pictures = sorted((workdir / 'reconstructions').iterdir())
  assert [path.name for path in pictures] == [f'step_{s:08d}.png' for s in (0, 16, 32, 40)]
  assert all(np.asarray(Image.open(path)).std() > 10 for path in pictures)
  assert checkpoints(workdir) == [str(BEFORE_LAST), str(STEPS)]
  assert len(list((workdir / 'tensorboard').iterdir())) == 1
  info = json.loads((workdir / 'config.json').read_text())
  assert info['config']['batch_size'] == 16
  assert info['config']['optim']['lr'] == 1e-3
  (start,) = info['runs']
  assert start['versions']['jax'].startswith('0.')
  assert '--config=configs/demo.py:debug' in start['command']
  assert start.keys() >= {'git', 'devices', 'python', 'started'}


def test_a_run_shows_its_parameters_its_progress_and_what_to_do_next(finished):
  log = finished.log
  assert not warnings_of(log), log
  assert re.search(r'\| patch_embed/proj/kernel +\| \(4, 4, 3, 8\) +\| float32 \| 384 ', log)
  assert re.search(r'^Total: [\d,]+ -- [\d,]+ bytes$', log, re.MULTILINE)
  progress = rf'step {STEPS}/{STEPS} \(100%\) loss [\d.]+, images/s \d+.*, ETA 0:00:00'
  assert re.search(progress, log)
  assert re.search(r'step 40: eval/knn_top1 0\.\d+', log)
  end = log[log.index('finished: ') :]
  workdir = finished.workdir
  assert f'finished: checkpoint {workdir}/checkpoints/{STEPS}\n' in end
  assert f'reconstructions: {workdir}/reconstructions/step_00000040.png\n' in end
  assert f'tensorboard --logdir={workdir}/tensorboard\n' in end


def test_the_command_named_at_the_end_works_with_a_picture_of_ones_own(runs, finished, tmp_path):
  words = shlex.split(re.search(r'next, try your own pictures: (.*)', finished.log)[1])
  assert words[0] == os.path.basename(sys.executable)
  photograph = tmp_path / 'my photograph.jpg'
  Image.effect_mandelbrot((320, 200), (-2, -1.25, 0.5, 1.25), 50).save(photograph)
  workdir = copy(finished, tmp_path)
  names = {'PICTURE.jpg': str(photograph), str(finished.workdir): str(workdir)}
  for old, new in names.items():
    words = [word.replace(old, new) for word in words]
  done = runs.finish([sys.executable, *words[1:]])
  assert done.returncode == 0, done.stderr
  assert done.stdout == f'wrote {workdir}/reconstruction.png\n'
  with Image.open(workdir / 'reconstruction.png') as picture:
    assert picture.width > 4 * 32


# The same command again


def test_the_same_command_again_says_that_it_is_finished_and_changes_nothing(runs, finished):
  before = content(finished.workdir)
  done = runs.train(finished.workdir)
  assert done.returncode == 0
  assert f'this run is finished: {finished.workdir}/checkpoints/{STEPS}' in done.stderr
  assert content(finished.workdir) == before


def test_more_steps_continue_a_finished_run(longer, finished):
  workdir, log = longer
  assert warnings_of(log) == ['changed since this run was started: max_steps: 40 -> 44']
  assert f'resuming at step {STEPS} of {STEPS + 4}' in log
  rows = metrics(workdir)
  assert rows[: len(metrics(finished.workdir))] == metrics(finished.workdir)
  assert [row['step'] for row in rows[-3:]] == [40, 42, 44]
  assert checkpoints(workdir) == ['40', '44']
  info = json.loads((workdir / 'config.json').read_text())
  assert info['config']['max_steps'] == STEPS + 4
  assert [run['changed'] for run in info['runs']] == [{}, {'max_steps': [40, 44]}]


def test_on_other_devices_a_run_goes_on_with_the_same_numbers(runs, longer, finished, tmp_path):
  workdir = copy(finished, tmp_path)
  done = runs.finish(runs.command(workdir, max_steps=STEPS + 4), on_devices(2))
  assert done.returncode == 0, done.stderr
  assert 'float32 on 2 x cpu' in done.stderr
  for ours, expected in zip(metrics(workdir), metrics(longer.workdir), strict=True):
    assert ours == pytest.approx(expected, rel=1e-4)


def test_other_settings_are_told_with_their_old_and_new_values(runs, finished, tmp_path):
  workdir = copy(finished, tmp_path)
  done = runs.train(workdir, max_steps=STEPS + 2, seed=1, optim__clip_norm=1.0, knn__every_epochs=0)
  assert done.returncode == 0, done.stderr
  *changes, order = warnings_of(done.stderr)
  assert sorted(changes) == [
    f'changed since this run was started: {change}'
    for change in (
      'knn.every_epochs: 2.5 -> 0.0',
      'max_steps: 40 -> 42',
      'optim.clip_norm: None -> 1.0',
      'seed: 0 -> 1',
    )
  ]
  assert order.startswith('THE ORDER OF IMAGES CHANGES from here on, because of a new seed')


def test_a_model_that_does_not_fit_the_checkpoint_is_refused(runs, finished):
  before = content(finished.workdir)
  done = runs.train(finished.workdir, model__embed_dim=64)
  assert done.returncode == 2
  assert done.stderr.count('\n') == 1
  newest = finished.workdir / 'checkpoints' / str(STEPS)
  assert done.stderr.startswith(f'error: the checkpoint {newest} does')
  assert 'model.embed_dim: 32 -> 64; to undo that: --config.model.embed_dim=32\n' in done.stderr
  assert 'another --workdir' in done.stderr
  assert content(finished.workdir) == before


def test_the_flags_that_an_error_names_can_be_copied(runs, finished):
  """Every setting that differs, with its old value."""
  changed = {'model__embed_dim': 64, 'model__depths': '1,1,1', 'optim__clip_norm': 1.0, 'seed': 1}
  error = runs.train(finished.workdir, **changed).stderr
  flags = shlex.split(error.split('; to undo that: ')[1])
  assert sorted(flags) == [
    '--config.model.depths=1,1,2',
    '--config.model.embed_dim=32',
    '--config.optim.clip_norm=None',
    '--config.seed=0',
  ]
  done = runs.finish([*runs.command(finished.workdir), *flags])
  assert done.returncode == 0, done.stderr
  assert 'this run is finished' in done.stderr
  assert f'To train longer: --config.max_steps={2 * STEPS}; to start over' in done.stderr


# Disturbed runs


def test_killed_seven_times_a_run_ends_with_the_same_bits(runs, forks, finished, tmp_path):
  workdir = tmp_path / 'run'
  saving = lambda: any((workdir / 'checkpoints').glob('*.writing*'))  # noqa: E731
  rng = random.Random()
  # Those with a step behind them are the dearest.
  moments = 2 * ['starting', 'compiling', 'saving'] + ['training']
  rng.shuffle(moments)
  found, target = [], 0
  for moment in moments:
    with runs.start(runs.command(workdir)) as process:
      if moment == 'starting':
        time.sleep(rng.random() * 2)
      elif moment == 'compiling':
        process.wait_for('compiling the training step')
        time.sleep(rng.random() * 0.2)
      else:
        target += rng.randint(1, 5)
        process.wait_for('compiled in')  # what the kill before left has been cleared away
        process.wait_until(lambda: last_step(workdir) >= target, f'step {target}')  # noqa: B023
        if moment == 'saving':
          stop_while(process, saving, rng)
        else:
          time.sleep(rng.random() * 0.05)
      process.send(signal.SIGKILL)
      assert process.wait() == -signal.SIGKILL
    assert moment != 'saving' or saving()
    found.append((moment, last_step(workdir), saving()))
  done = forks(*runs.command(workdir)[1:])
  assert done.status == 0, done.stderr
  assert_same_params(workdir, finished.workdir)
  assert metrics(workdir) == metrics(finished.workdir), f'killed at {found}'
  ours, theirs = (content(w / 'reconstructions') for w in (workdir, finished.workdir))
  assert ours == theirs


def stop_while(process, condition, rng) -> None:
  """Stops a process with SIGSTOP at a random moment at which the condition holds."""
  while True:
    process.wait_until(condition, 'a moment to be stopped')
    time.sleep(rng.random() * 0.02)
    process.stop()
    if condition():
      return
    process.send(signal.SIGCONT)


def test_sigterm_saves_and_the_continued_run_ends_with_the_same_bits(runs, finished, tmp_path):
  workdir = tmp_path / 'run'
  with runs.start(runs.command(workdir)) as process:
    process.wait_until(lambda: last_step(workdir) >= 5, 'step 5')
    process.send(signal.SIGTERM)
    assert process.wait() == 143
    step = stopped_at(process.output(), 'SIGTERM', workdir)
  done = runs.train(workdir)
  assert done.returncode == 0, done.stderr
  assert f'resuming at step {step} of {STEPS}' in done.stderr
  assert_same_params(workdir, finished.workdir)
  # The stop ends a row of metrics early, so the next one is a mean of fewer steps. Others agree.
  expected = metrics(finished.workdir)
  missing = [row['step'] for row in expected if row not in metrics(workdir)]
  assert missing in ([], [next(row['step'] for row in expected if row['step'] >= step)])


def stopped_at(log: str, name: str, workdir) -> int:
  """The step at which a signal stopped the run, whose last line says so."""
  last = log.splitlines()[-1]
  message = f'{name}: stopped at step (\\d+), saved (.*); the same command continues from there'
  match = re.fullmatch(message, last)
  assert match, log
  assert match[2] == f'{workdir}/checkpoints/{match[1]}'
  assert match[1] in checkpoints(workdir)
  return int(match[1])


def test_a_signal_while_compiling_is_heard_at_once_and_obeyed_after(runs, finished, tmp_path):
  workdir = copy(finished, tmp_path)
  command = runs.command(workdir, max_steps=10**6)
  with runs.start(command, {'JAX_ENABLE_COMPILATION_CACHE': 'false'}) as process:
    process.wait_for('compiling the training step')
    process.send(signal.SIGINT)
    process.wait_for('SIGINT: stopping after the current step')
    assert 'compiled in' not in process.output()
    assert process.wait() == 143
    assert stopped_at(process.output(), 'SIGINT', workdir) == STEPS + 1


def test_a_second_signal_ends_a_run_at_once_even_while_compiling(runs, finished, tmp_path):
  workdir = copy(finished, tmp_path)
  command = runs.command(workdir, max_steps=10**6)
  with runs.start(command, {'JAX_ENABLE_COMPILATION_CACHE': 'false'}) as process:
    process.wait_for('compiling the training step')
    process.send(signal.SIGTERM)
    process.wait_for('SIGTERM: stopping after the current step')
    time.sleep(1.1)  # within a second it counts as the same signal, passed on by a wrapper
    process.send(signal.SIGINT)
    assert process.wait(5) == 130
    assert 'compiled in' not in process.output()
    assert process.output().endswith('SIGINT again: stopped at once\n')
  assert checkpoints(workdir)[-1] == str(STEPS)


def test_a_signal_before_training_begins_ends_a_run_with_one_line(runs, tmp_path):
  workdir = tmp_path / 'run'
  workdir.mkdir()
  os.mkfifo(workdir / 'config.json')  # what it waits for when the signal comes
  with runs.start(runs.command(workdir)) as process:
    process.wait_until(lambda: (workdir / 'lock').exists(), 'lock')  # taken just before
    process.send(signal.SIGTERM)
    assert process.wait() == 143
    last = process.output().splitlines()[-1]
    assert last == 'SIGTERM: stopped before training began; the same command starts it again'
    assert 'Traceback' not in process.output()


def test_a_signal_is_honoured_while_data_does_not_come(runs, tmp_path):
  data = folder_of_images(tmp_path / 'data', 63)
  os.mkfifo(tmp_path / 'data/train/a/hangs.jpg')  # reading it waits for ever, as a dead disk does
  workdir = tmp_path / 'run'
  with runs.start(runs.command(workdir, **data)) as process:
    process.wait_for('compiled in')
    time.sleep(3)  # the first epoch's four steps take no time
    process.send(signal.SIGTERM)
    assert process.wait(20) == 143
    assert stopped_at(process.output(), 'SIGTERM', workdir) < 4


def test_ctrl_c_in_a_terminal_stops_a_run_with_worker_processes(runs, finished, tmp_path):
  workdir = copy(finished, tmp_path)
  command = runs.command(workdir, max_steps=10**6, data__num_workers=1)
  ours, theirs = pty.openpty()
  termios.tcsetwinsize(theirs, (24, 120))
  # In a session of its own, whose terminal this is: then ^C goes to the workers, too.
  session = 'import fcntl, os, sys, termios; os.setsid(); fcntl.ioctl(2, termios.TIOCSCTTY, 0); '
  process = subprocess.Popen(
    [sys.executable, '-c', session + 'os.execv(sys.argv[1], sys.argv[1:])', *command],
    cwd=ROOT,
    env=runs.environment,
    stdout=subprocess.DEVNULL,
    stderr=theirs,
  )
  os.close(theirs)
  shown = ''
  with contextlib.suppress(OSError):  # how a terminal says that the other side is closed
    while chunk := os.read(ours, 4096):
      asked = 'images/s' in shown
      shown += chunk.decode(errors='replace')
      if 'images/s' in shown and not asked:
        os.write(ours, b'\x03')
  os.close(ours)
  assert process.wait(timeout=patience.limit(60)) == 143, shown
  assert re.search(r'\d+/1000000, loss [\d.]+, images/s \d+', shown)
  lines = shown.splitlines()
  assert stopped_at(lines[-1], 'SIGINT', workdir) > STEPS
  assert 'Traceback' not in shown
  assert all('resource_tracker' not in line for line in lines)


def test_a_damaged_checkpoint_is_told_and_passed_over(runs, finished, tmp_path):
  workdir = copy(finished, tmp_path)
  newest = workdir / 'checkpoints' / str(STEPS)
  largest = max((p for p in newest.rglob('*') if p.is_file()), key=lambda p: p.stat().st_size)
  damaged = bytearray(largest.read_bytes())
  damaged[len(damaged) // 2] ^= 1
  largest.write_bytes(damaged)
  done = runs.train(workdir)
  assert done.returncode == 0, done.stderr
  told = warnings_of(done.stderr)
  assert told[0].startswith(f'DAMAGED checkpoint at step {STEPS}, {newest}: ')
  assert told[1] == f'falling back to the checkpoint of step {BEFORE_LAST}'
  assert_same_params(workdir, finished.workdir)
  assert metrics(workdir) == metrics(finished.workdir)


def test_a_loss_that_is_not_finite_stops_a_run_and_spoils_nothing(runs, finished, tmp_path):
  workdir = copy(finished, tmp_path)
  less = {'max_steps': STEPS + 4, 'knn__every_epochs': 0, 'pictures__every_epochs': 0}
  done = runs.train(workdir, optim__lr=1e30, **less)
  assert done.returncode == 2
  last = done.stderr.splitlines()[-1]
  assert last.startswith(f'error: no longer finite at step {STEPS + 1}: loss 0.')
  assert f'the last good checkpoint is {workdir}/checkpoints/{STEPS}.' in last
  assert '--config.optim.clip_norm=1.0' in last
  assert 'Traceback' not in done.stderr
  assert checkpoints(workdir) == checkpoints(finished.workdir)
  done = runs.train(workdir, optim__clip_norm=1.0, **less)
  assert done.returncode == 0, done.stderr
  assert f'resuming at step {STEPS} of {STEPS + 4}' in done.stderr
  steps = [row['step'] for row in metrics(workdir)]
  assert steps == sorted(set(steps))


def test_broken_images_are_replaced_counted_and_told_at_the_end(runs, tmp_path):
  data = folder_of_images(tmp_path / 'data', 64)
  for name in ('train/a/0.jpg', 'train/b/5.jpg'):
    (tmp_path / 'data' / name).write_bytes(b'no image')
  workdir = tmp_path / 'run'
  done = runs.train(workdir, max_steps=8, data__max_broken_fraction=0.1, **data)
  assert done.returncode == 0, done.stderr
  *named, summary = warnings_of(done.stderr)
  assert len(named) == 2
  assert all('not an image' in line for line in named)
  assert summary == '2 broken training images were replaced; each is named above'
  assert metrics(workdir)[-1]['train/broken_images'] == 2


def test_a_broken_image_of_an_evaluation_is_named_once_a_run(runs, tmp_path):
  data = folder_of_images(tmp_path / 'data', 64) | {'knn__every_epochs': 0.5}
  broken = tmp_path / 'data/val/a/0.jpg'
  broken.write_bytes(b'no image')
  workdir = tmp_path / 'run'
  done = runs.train(workdir, max_steps=8, **data)
  assert done.returncode == 0, done.stderr
  assert sum('eval/knn_top1' in row for row in metrics(workdir)) == 5
  (line,) = warnings_of(done.stderr)
  assert line.startswith(f'Broken example, left out: {broken} (not an image')


def test_images_without_classes_are_pretrained_on_and_nothing_else(runs, tmp_path):
  data = folder_of_images(tmp_path / 'data', 32)
  for split in ('train', 'val'):
    for image in (tmp_path / 'data' / split).glob('*/*.jpg'):
      image.rename(tmp_path / 'data' / split / image.name)
    for folder in 'ab':
      (tmp_path / 'data' / split / folder).rmdir()
  done = runs.train(tmp_path / 'run', max_steps=3, **data)
  assert done.returncode == 0, done.stderr
  assert metrics(tmp_path / 'run')[-1]['step'] == 3
  workdir = tmp_path / 'other'
  for settings, message in (
    ({'knn__every_epochs': 1}, 'compares with; switch it off: --config.knn.every_epochs=0'),
    ({'task': 'classify', 'model__name': 'hivit_tiny'}, 'and config.task="classify" needs classes'),
  ):  # fmt: skip
    error = runs.train(workdir, **data | settings).stderr.splitlines()[-1]
    assert error.startswith(f'error: folder:{tmp_path}/data (train) has no class folders')
    assert message in error
