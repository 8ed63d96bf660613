"""Runs of two processes: as one, until one of them ends."""

import re
import shutil
import signal

import pytest

from hivit_jax.runtime import distributed
from tests.runs import error_of, last_step, metrics, on_devices
from tests.test_runs import folder_of_images

HALF, ALL = 10, 20
SETTINGS = {
  'mesh__fsdp': 2,
  'log_every_steps': 1,
  'checkpoint__every_epochs': 2.5,
  'checkpoint__keep_last': 99,
}
BARE = {'max_steps': 10**6, 'knn__every_epochs': 0, 'pictures__every_epochs': 0}  # soon compiled
MPI = {'SIZE': '2', 'RANK': '0', 'LOCAL_RANK': '0'}
END = 60  # seconds within which a job ends of which a process has ended


@pytest.fixture(scope='module')
def alone(runs, tmp_path_factory):
  """Workdir of one process on four devices, which kept the checkpoint in the middle."""
  workdir = tmp_path_factory.mktemp('alone') / 'run'
  command = runs.command(workdir, max_steps=ALL, **SETTINGS)
  done = runs.finish(command, on_devices(4))
  assert done.returncode == 0, done.stderr
  assert 'float32 on 4 x cpu' in done.stderr
  return workdir


def assert_same_metrics(actual, expected):
  """In the rows of all steps: losses to 1e-6."""
  ours, theirs = ({row['step']: row for row in metrics(workdir)} for workdir in (actual, expected))
  for step in range(ALL + 1):
    both = ours[step].keys() & theirs[step].keys()
    for key in both:
      tolerance = 1e-6 if key == 'train/loss' else 1e-5
      assert ours[step][key] == pytest.approx(theirs[step][key], rel=tolerance), (step, key)
    assert 'train/loss' in both or step == 0


def keep_first_half(workdir):
  for checkpoint in (workdir / 'checkpoints').iterdir():
    if checkpoint.name != str(HALF):
      shutil.rmtree(checkpoint)


def test_two_processes_train_as_one_and_end_together_when_one_is_killed(runs, alone, tmp_path):
  workdir = tmp_path / 'run'
  with runs.job(runs.command(workdir, max_steps=10**6, **SETTINGS), found_by='environment') as job:
    for process in job:
      process.wait_until(lambda: last_step(workdir) >= ALL, f'step {ALL}')
    job[1].send(signal.SIGKILL)
    assert job[0].wait(END) == 143
    first, second = (process.output() for process in job)
  assert 'float32 on 4 x cpu' in first
  last = first.splitlines()[-1]
  assert re.match(r'process 0 of 2 stops: process 1 on \S+ ended without a message', last), first
  assert last.endswith('continues from the last checkpoint')
  assert 'Traceback' not in first
  assert 'loss' not in second  # only process 0 tells how it goes
  assert_same_metrics(workdir, alone)
  pictures = sorted(path.name for path in (workdir / 'reconstructions').iterdir())
  assert pictures[:2] == ['step_00000000.png', 'step_00000016.png']
  assert len(list((workdir / 'tensorboard').iterdir())) == 1

  # What two processes have saved, one goes on with.
  keep_first_half(workdir)
  done = runs.train(workdir, max_steps=ALL, **SETTINGS | {'mesh__fsdp': 1})
  assert done.returncode == 0, done.stderr
  assert f'resuming at step {HALF} of {ALL}' in done.stderr
  assert 'float32 on 1 x cpu' in done.stderr
  assert_same_metrics(workdir, alone)


_SLOW = """
import sys, time
from hivit_jax.train import integrity
write = integrity.write_sums
def slow(path):
  time.sleep(8)  # longer than the patience with a process that fails
  write(path)
integrity.write_sums = slow
sys.argv = sys.argv[1:]
import runpy
runpy.run_path(sys.argv[0], run_name='__main__')
"""


def test_two_processes_continue_what_one_saved_and_stop_at_one_step(runs, alone, tmp_path):
  """Neither ends before the checkpoint is complete: process 0 takes its time with the sums."""
  workdir = shutil.copytree(alone, tmp_path / 'run')
  keep_first_half(workdir)
  settings = SETTINGS | {'max_steps': 10**6, 'checkpoint__every_epochs': 0}
  python, *arguments = runs.command(workdir, **settings)
  with runs.job([python, '-c', _SLOW, *arguments], found_by='slurm') as job:
    job[0].wait_for(f'resuming at step {HALF} of {10**6}')
    job[0].wait_until(lambda: last_step(workdir) > ALL, f'more than {ALL} steps')
    job[1].send(signal.SIGTERM)
    assert [process.wait(END) for process in job] == [143, 143]
    ends = [process.output().splitlines()[-1] for process in job]
  told, by_signal = (
    re.fullmatch(rf'(.*): stopped at step (\d+), saved {workdir}/checkpoints/(\d+); .*', end)
    for end in ends
  )
  assert (told[1], by_signal[1]) == ('a signal to another process', 'SIGTERM')
  assert told[2] == told[3] == by_signal[2] == by_signal[3]
  assert {path.name for path in (workdir / 'checkpoints').iterdir()} == {str(HALF), told[2]}
  assert_same_metrics(workdir, alone)


def test_of_three_processes_two_end_with_one_line_each(runs, tmp_path):
  command = runs.command(tmp_path / 'run', batch_size=12, evaluation__batch_size=12, **BARE)
  with runs.job(command, command, command, devices=1) as job:
    job[0].wait_for('compiling the training step')
    job[1].send(signal.SIGKILL)
    ends = [process.wait(END) for process in job]
    logs = [process.output() for process in job]
  assert ends == [143, -signal.SIGKILL, 143], logs
  name = r'process 1 on \S+ ended without a message'
  for index in (0, 2):
    assert re.match(f'process {index} of 3 stops: {name}', logs[index].splitlines()[-1]), logs


def test_a_signal_to_all_processes_stops_them_at_one_step(runs, tmp_path):
  workdir = tmp_path / 'run'
  with runs.job(runs.command(workdir, checkpoint__every_epochs=0, **BARE), devices=1) as job:
    job[0].wait_until(lambda: last_step(workdir) >= 3, 'step 3')
    for process in job:
      process.send(signal.SIGTERM)
    assert [process.wait(END) for process in job] == [143, 143]
    ends = [process.output().splitlines()[-1] for process in job]
  (step,) = (path.name for path in (workdir / 'checkpoints').iterdir())
  for end in ends:
    assert f'SIGTERM: stopped at step {step}, saved {workdir}/checkpoints/{step}; ' in end


def test_a_process_that_fails_tells_the_others_why(runs, tmp_path):
  """Here the second one's images are broken."""
  commands = []
  for name in ('good', 'bad'):
    data = folder_of_images(tmp_path / name, 64)
    commands.append(runs.command(tmp_path / 'run', max_steps=10**6, **data))
  for path in (tmp_path / 'bad' / 'train').rglob('*.jpg'):
    path.write_bytes(b'no image')
  with runs.job(*commands, found_by='flags') as job:
    assert [process.wait(END) for process in job] == [2, 2]
    told, failed = (process.output().splitlines()[-1] for process in job)
  assert failed.startswith('error: ')
  assert 'not an image' in failed
  assert re.match(r'process 0 of 2 stops: process 1 on \S+ failed: ', told)
  assert told.split('failed: ')[1].startswith(failed.removeprefix('error: ')[:80])
  assert 'continues' not in told


def test_a_workdir_that_not_all_processes_share_is_refused(runs, tmp_path):
  commands = [runs.command(tmp_path / name / 'run', max_steps=4) for name in 'ab']
  with runs.job(*commands, found_by='mpi5') as job:
    assert [process.wait(END) for process in job] == [2, 2]
    for process in job:
      last = process.output().splitlines()[-1]
      assert re.match(r'error: --workdir=\S+ is not the same directory for process 1 as for', last)
  assert not list(tmp_path.rglob('config.json'))
  assert not list(tmp_path.rglob('.shared-*'))


@pytest.mark.parametrize(
  ('flags', 'environment', 'message'),
  [
    (['--num_processes=2'], {}, '--num_processes=2: coordinator_address should be defined. All of'),
    (['--process_id=1'], {'JAX_NUM_PROCESSES': 'two'}, 'JAX_NUM_PROCESSES=two: expected a number'),
    (
      ['--num_processes=2', '--process_id=2', '--coordinator_address=localhost:1'],
      {},
      'process_id and num_processes must be nonnegative, with process_id < num_processes',
    ),
  ],
)
def test_what_does_not_describe_a_job_is_refused(forks, tmp_path, flags, environment, message):
  config = '--config=configs/demo.py:debug'
  ended = forks('main.py', config, f'--workdir={tmp_path}', *flags, **environment)
  assert message in error_of(ended)


def test_open_mpi_5_needs_to_be_told_where_process_0_is(forks, tmp_path):
  started = {f'OMPI_COMM_WORLD_{key}': value for key, value in MPI.items()}
  ended = forks('main.py', '--config=configs/demo.py:debug', f'--workdir={tmp_path}', **started)
  assert error_of(ended).startswith('Open MPI has started 2 processes, but does not say where')


def test_one_process_looks_for_no_others(forks, tmp_path):
  """Where the environment belongs to something else."""
  elsewhere = {'JAX_COORDINATOR_ADDRESS': '192.0.2.1:1', 'JAX_PROCESS_ID': '1'}
  flags = ('--num_processes=1', '--config.max_steps=0')
  ended = forks('main.py', '--config=configs/demo.py:debug', *flags, **elsewhere)
  assert error_of(ended).startswith('config.max_steps=0: ')


def test_gpus_of_slurm_tasks(monkeypatch):
  """JAX takes the one with the task's number on its node."""
  cases = {
    ('1', '0,1,2,3'): [0, 1, 2, 3],
    ('1(x4)', '0,1'): [0, 1],
    ('8(x2)', '0,1,2,3'): None,
    ('1', ''): None,
    ('', '0,1'): None,
  }
  cases |= {('8(x2)', '5'): [0], ('2', 'GPU-1'): [0], ('', '5'): None}
  for (tasks, visible), expected in cases.items():
    monkeypatch.setenv('SLURM_STEP_TASKS_PER_NODE', tasks)
    monkeypatch.setenv('CUDA_VISIBLE_DEVICES', visible)
    assert distributed.local_devices() == expected
