"""The command that prepares data sets, as a process: killed, continued, mistaken."""

import contextlib
import os
import pty
import shlex
import signal
import subprocess
import sys
import termios
import time
from pathlib import Path

import pytest

from hivit_jax.data.sources.base import open_source
from hivit_jax.errors import UserError
from tests import patience
from tests.data.imagenet_tars import write_tars
from tests.runs import error_of

ROOT = Path(__file__).parents[2]
COMMAND = [sys.executable, '-W', 'error', '-m', 'hivit_jax.tools.prepare']


def prepare(*arguments: str) -> subprocess.CompletedProcess:
  return subprocess.run(
    [*COMMAND, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=patience.limit(120)
  )


def run_in_terminal(command: list[str]) -> tuple[int, str]:
  """Runs a command with standard error on a terminal; returns its status and what it showed."""
  ours, theirs = pty.openpty()
  termios.tcsetwinsize(theirs, (24, 100))
  process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=theirs)
  os.close(theirs)
  shown = b''
  with contextlib.suppress(OSError):  # how a terminal says that the other side is closed
    while chunk := os.read(ours, 4096):
      shown += chunk
  os.close(ours)
  return process.wait(timeout=patience.limit(60)), shown.decode()


def imagenet_arguments(tars, data_dir) -> list[str]:
  return [
    'imagenet2012',
    f'--train_tar={tars.train_tar}',
    f'--val_tar={tars.val_tar}',
    f'--data_dir={data_dir}',
    '--allow_other_counts',
    '--examples_per_shard=2',
  ]


def test_killed_in_the_middle_the_same_command_goes_on_to_the_same_result(tmp_path):
  tars = write_tars(tmp_path, classes=4, per_class=120)
  reference = prepare(*imagenet_arguments(tars, tmp_path / 'a'))
  assert reference.returncode == 0, reference.stderr

  def shards(folder):
    finished = [p for p in folder.glob('*.array_record-*') if not p.name.endswith('unfinished')]
    return {path.name: path.stat().st_ino for path in finished}

  for attempt in range(5):  # on a busy machine it may be through before the signal reaches it
    data_dir = tmp_path / f'b{attempt}'
    arguments = imagenet_arguments(tars, data_dir)
    partial = data_dir / 'imagenet2012' / 'incomplete.5.1.0'
    final = data_dir / 'imagenet2012' / '5.1.0'
    process = subprocess.Popen([*COMMAND, *arguments], cwd=ROOT)
    while len(shards(partial)) < 5 and process.poll() is None:
      time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    if process.wait() == -signal.SIGKILL:
      break
  written = shards(partial)
  assert 5 <= len(written) < 243  # of 240 + 3: it was killed in the middle
  assert not final.exists()
  with pytest.raises(UserError, match=r'imagenet2012 is not prepared \(only started\)'):
    open_source('imagenet2012', 'train', str(data_dir))

  status, terminal = run_in_terminal([*COMMAND, *arguments])
  assert status == 0, terminal
  assert 'preparing imagenet2012: ' in terminal  # the bar
  assert written.items() <= shards(final).items()  # the same files: they were not written again
  assert not partial.exists()
  expected = {p.name: p.read_bytes() for p in (tmp_path / 'a/imagenet2012/5.1.0').iterdir()}
  assert {p.name: p.read_bytes() for p in final.iterdir()} == expected
  source = open_source('imagenet2012', 'train', str(data_dir))
  images = {source[i]['image']: source[i]['label'] for i in range(len(source))}
  assert images == {image: label for label, image in tars.train.values()}

  again = prepare(*arguments)
  assert again.returncode == 0
  assert 'was prepared before' in again.stdout
  assert 'train: 480 images, validation: 5 images' in again.stdout


def test_the_command_that_the_error_names_prepares_the_set(tmp_path):
  tars = write_tars(tmp_path)
  with pytest.raises(UserError) as error:
    open_source('imagenet2012', 'validation', str(tmp_path / 'data'))
  words = shlex.split(str(error.value).split('To prepare it: ')[1].split(' (the files')[0])
  assert words[:3] == ['python', '-m', 'hivit_jax.tools.prepare']
  done = subprocess.run(
    [sys.executable, *words[1:], '--allow_other_counts'],
    cwd=tars.train_tar.parent,
    env=os.environ | {'PYTHONPATH': str(ROOT)},
    capture_output=True,
    text=True,
    timeout=patience.limit(60),
  )
  assert done.returncode == 0, done.stderr
  assert len(open_source('imagenet2012', 'validation', str(tmp_path / 'data'))) == 5


def test_embedded_sets_are_prepared_by_the_same_command(tmp_path):
  done = prepare('digits', f'--data_dir={tmp_path}')
  assert done.returncode == 0, done.stderr
  assert done.stdout.startswith(f'digits is prepared in {tmp_path}/digits/1.0.0 (train: ')


@pytest.mark.parametrize(
  ('arguments', 'message'),
  [
    ([], 'name one of: imagenet2012, ade20k, coco, photo_tiles, photo_scenes, digits'),
    (['digit'], 'did you mean "digits"?'),
    (['digits', '--val_tar=x.tar'], '--val_tar is for imagenet2012 only'),
    (['ade20k', '--val_tar=x.tar'], '--val_tar is for imagenet2012 only, not for ade20k'),
    (['digits', '--source_dir=x'], '--source_dir is for imagenet2012, ade20k, coco only'),
    (['ade20k'], 'ade20k needs either --archive=ADEChallengeData2016.zip or --source_dir'),
    (['coco', '--val_zip=x.zip'], 'coco needs --train_zip=train2017.zip and/or'),
    (['imagenet2012'], 'imagenet2012 needs --train_tar='),
    (['imagenet2012', '--train_tar=/no/such.tar'], '/no/such.tar does not exist'),
    (['imagenet2012', '--train_tr=x.tar'], 'train_tar'),
    (['imagenet2012', '--val_tar=x.tar', '--examples_per_shard=0'], 'must be at least 1'),
  ],
)
def test_mistakes_end_with_one_line_and_status_2(forks, tmp_path, arguments, message):
  command = ('-m', 'hivit_jax.tools.prepare', *arguments)
  assert message in error_of(forks(*command, f'--data_dir={tmp_path}'))


def test_data_of_tfds_in_another_format_is_left_alone(forks, tmp_path):
  folder = tmp_path / 'imagenet2012' / '5.1.0'
  folder.mkdir(parents=True)
  (folder / 'dataset_info.json').write_text('{"fileFormat": "tfrecord", "name": "imagenet2012"}')
  arguments = ('imagenet2012', '--val_tar=x.tar', f'--data_dir={tmp_path}')
  error = error_of(forks('-m', 'hivit_jax.tools.prepare', *arguments))
  assert f'{folder} holds imagenet2012 as tfrecord; give another data_dir' in error
  assert os.listdir(folder) == ['dataset_info.json']
