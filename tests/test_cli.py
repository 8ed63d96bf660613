"""Mistakes on the command line of `main.py`: one line that says what is wrong and what to do."""

import functools
import os
import pathlib
import resource
import subprocess
import sys
import venv

import pytest

from hivit_jax import cli
from tests import patience
from tests.runs import ROOT, Ended, content, error_of

DEBUG = '--config=configs/demo.py:debug'


@pytest.fixture(scope='module')
def main(forks):
  """`main(*arguments, **environment)` of main.py in a process that has its imports done."""
  return functools.partial(forks, 'main.py')


@pytest.fixture(scope='module')
def untouched(finished):
  """A workdir with a finished run in it, which must be as it was when all mistakes were made."""
  before = content(finished.workdir)
  yield finished.workdir
  assert content(finished.workdir) == before


def test_the_settings_on_a_command_line_are_known():
  command = (
    'main.py --config=configs/demo.py:debug --mode=evaluate --config.optim.lr=1 --workdir=w '
    '--config.data.mean[0]=0.5 --noconfig.augment.flip --config.init None -config.seed 3'
  )
  given = {'optim.lr', 'data.mean', 'augment.flip', 'init', 'seed'}
  assert cli.given_settings(command.split()) == given


# Values that cannot be: (flags, what the line has to say)
VALUES = [
  ('typo=1', '--config.typo: config has no setting "typo"; it has: accumulate_steps, augment'),
  ('batchsize=1', 'no setting "batchsize" (did you mean "batch_size"?); it has: '),
  ('optim.warmup_epoch=5', 'has no setting "warmup_epoch" (did you mean "optim.warmup_epochs"?)'),
  ('lr=1', 'config has no setting "lr" (did you mean "optim.lr"?)'),
  ('optin.lr=1', 'config has no setting "optin" (did you mean "optim.lr"?)'),
  ('optim.lr.peak=1', '--config.optim.lr.peak: config.optim.lr is a value, not a section'),
  ('optim=1', '--config.optim=1: this is a section; set --config.optim.b1'),
  ('optim.lr=high', '--config.optim.lr=high: expected float'),
  ('batch_size=many', '--config.batch_size=many: expected int such as 16'),
  ('batch_size=1.5', '--config.batch_size=1.5: expected int such as 16'),
  ('augment.flip=perhaps', '--config.augment.flip=perhaps: expected bool such as True'),
  ('task=sort', 'config.task="sort" is unknown; there are: mae, simmim, classify, linear'),
  ('model.name=mae_hivit_bas', 'did you mean "mae_hivit_base"?'),
  ('model.name=hivit_base', 'config.task="mae" needs; try --config.model.name=mae_hivit_base'),
  ('model.dtype=float16', 'config.model.dtype="float16" is not one of auto, float32, bfloat16'),
  ('model.embed_dim=33', 'config.model.embed_dim must be a multiple of 4, got 33'),
  ('model.num_heads=0', 'config.model.num_heads=0: expected at least 1'),
  ('model.num_heads=5', 'config.model.num_heads=5 does not divide 32 channels'),
  ('model.depths=1,2', 'config.model.depths=(1, 2): expected depths of the stages'),
  ('model.depths=1,1,0', 'the last at least 1'),
  ('model.drop_path_rate=1', 'config.model.drop_path_rate=1.0: expected 0 or more, and less than'),
  ('model.mask_ratio=0', 'config.model.mask_ratio=0.0: expected more than 0 and less than 1'),
  ('model.mask_ratio=1', 'config.model.mask_ratio=1.0: expected more than 0 and less than 1'),
  ('model.mask_ratio=nan', 'config.model.mask_ratio=nan: expected more than 0 and less than 1'),
  ('model.mask_ratio=0.9', 'config.model.mask_ratio 0.9 keeps 0 of 4 units'),
  ('image_size=100', 'sides must be multiples of 16 pixels; try --config.image_size=96,96'),
  ('image_size=100,64', 'sides must be multiples of 16 pixels; try --config.image_size=96,64'),
  ('image_size=0', 'config.image_size=(0,): expected a side or (height, width)'),
  ('image_size=32,32,32', 'expected a side or (height, width)'),
  ('image_size=large', 'expected a side or (height, width)'),
  ('image_size=1048576,1048576', 'config.image_size=1048576,1048576 take 158329.7 GB on each of'),
  ('model.embed_dim=400000', 'the training state takes '),
  ('channels=65', 'config.channels=65: expected a number from 1 to 64'),
  ('channels=2', 'config.data.mean: 3 numbers for config.channels=2; python -m hivit_jax.tools.'),
  ('epochs=-1', 'config.epochs=-1.0: expected more than 0'),
  ('epochs=inf', 'config.epochs=inf: expected more than 0'),
  ('max_steps=0', 'config.max_steps=0: expected at least 1'),
  ('batch_size=0', 'config.batch_size=0: expected at least 1'),
  ('batch_size=-16', 'config.batch_size=-16: expected at least 1'),
  ('accumulate_steps=0', 'config.accumulate_steps=0: expected at least 1'),
  ('accumulate_steps=3', 'config.batch_size=16 is not divisible by 1 devices x 3 accumulation '
   'steps; try --config.batch_size=15 or --config.batch_size=18'),
  ('mesh.data=2', 'config.mesh.data=2, config.mesh.fsdp=1: there are 1 devices; --config.mesh'),
  ('seed=None', 'config.seed=None: this setting always has a value'),
  ('seed=-1', 'config.seed=-1: expected 0 or more'),
  ('log_every_steps=0', 'config.log_every_steps=0: expected at least 1'),
  ('checkpoint.keep_last=0', 'config.checkpoint.keep_last=0: expected at least 1'),
  ('checkpoint.every_epochs=-1', 'config.checkpoint.every_epochs=-1.0: expected 0 or more'),
  ('knn.k=0', 'config.knn.k=0: expected at least 1'),
  ('knn.temperature=0', 'config.knn.temperature=0.0: expected more than 0'),
  ('evaluation.batch_size=0', 'config.evaluation.batch_size=0: expected at least 1'),
  ('knn.every_epochs=-1', 'config.knn.every_epochs=-1.0: expected 0 or more'),
  ('pictures.count=0', 'config.pictures.count=0: expected at least 1'),
  ('optim.b2=1', 'config.optim.b2=1.0: expected 0 or more, and less than 1'),
  ('optim.clip_norm=0', 'config.optim.clip_norm=0.0: expected more than 0'),
  ('data.mean=0.5,0.5', 'config.data.mean: 2 numbers for config.channels=3; if all channels have'),
  ('data.mean=(0.5,)', 'if all channels have the same: --config.data.mean=0.5,0.5,0.5'),
  ('data.std=0.,0.,0.', 'config.data.std=(0.0, 0.0, 0.0): expected one number per channel'),
  ('augment.crop_scale=0.5,0.2', 'config.augment.crop_scale=(0.5, 0.2): expected two shares'),
  ('augment.crop_ratio=wide', "config.augment.crop_ratio=('wide',): expected two ratios"),
  ('data.max_broken_fraction=2', 'config.data.max_broken_fraction=2.0: expected from 0 to 1'),
  ('data.num_workers=-1', 'config.data.num_workers=-1: expected 0 or more'),
  ('data.name=nosuchset', "unknown data set 'nosuchset'"),
  ('data.name=folder:/no/such', '/no/such is not a folder; expected <root>/<split>/<class>'),
  ('data.name=imagenet2012', 'To prepare it: python -m hivit_jax.tools.prepare imagenet2012'),
  ('data.train_split=tran', "config.data.train_split: digits has no split 'tran'; it has"),
  ('data.train_split=train[:0]', "the split 'train[:0]' selects no examples"),
  ('data.eval_split=test[5:5]', "config.data.eval_split: digits: the split 'test[5:5]' selects"),
]  # fmt: skip


@pytest.mark.parametrize(('setting', 'message'), VALUES, ids=[setting for setting, _ in VALUES])
def test_a_setting_that_cannot_be_is_one_line_and_leaves_the_workdir_alone(
  main, untouched, setting, message
):
  assert message in error_of(main(DEBUG, f'--workdir={untouched}', f'--config.{setting}'))


def test_a_batch_that_does_not_divide_among_the_devices(main, tmp_path):
  three = {'XLA_FLAGS': '--xla_force_host_platform_device_count=3'}
  error = error_of(main(DEBUG, f'--workdir={tmp_path}/w', **three))
  assert error == (
    'config.batch_size=16 is not divisible by 3 devices; try --config.batch_size=15 or '
    '--config.batch_size=18'
  )
  flags = ('--config.batch_size=18', '--config.evaluation.batch_size=20')
  error = error_of(main(DEBUG, f'--workdir={tmp_path}/w', *flags, **three))
  assert error == (
    'config.evaluation.batch_size=20 is not divisible by 3 devices; try '
    '--config.evaluation.batch_size=18 or --config.evaluation.batch_size=21'
  )
  assert not (tmp_path / 'w').exists()


def test_data_that_tfds_prepared_as_tfrecord(main, tmp_path):
  folder = tmp_path / 'imagenet2012' / '5.1.0'
  folder.mkdir(parents=True)
  (folder / 'dataset_info.json').write_text('{"fileFormat": "tfrecord", "name": "imagenet2012"}')
  flags = ('--config.data.name=imagenet2012', f'--config.data.data_dir={tmp_path}')
  error = error_of(main(DEBUG, f'--workdir={tmp_path}/w', *flags))
  assert f'imagenet2012 in {folder} is stored as tfrecord' in error
  assert 'python -m hivit_jax.tools.prepare imagenet2012' in error


@pytest.mark.parametrize('below', ['', 'deeper'])
def test_a_workdir_that_is_a_file(main, tmp_path, below):
  (tmp_path / 'file').write_text('mine')
  error = error_of(main(DEBUG, f'--workdir={tmp_path / "file" / below}'))
  assert 'Not a directory; choose another --workdir' in error
  assert (tmp_path / 'file').read_text() == 'mine'


def test_a_workdir_that_cannot_be_written_to(main):
  assert 'choose another --workdir' in error_of(main(DEBUG, '--workdir=/proc/run'))


@pytest.mark.parametrize('mode', ['train', 'evaluate'])
def test_a_workdir_in_a_bucket_of_no_known_kind(main, mode):
  done = main(DEBUG, f'--mode={mode}', '--workdir=az://bucket/run')
  assert done.status == 2
  last = done.stderr.splitlines()[-1]
  assert last.startswith('error: az://bucket/run: buckets are gs://BUCKET/PATH and s3://BUCKET/P')
  assert not (ROOT / 'az:').exists()


def test_the_default_workdir_is_named_after_config_and_variant(forks, tmp_path):
  # Two variants in one directory would be one run that changes its mind.
  (tmp_path / 'workdirs').write_text('in the way')
  (tmp_path / 'main.py').write_text((ROOT / 'main.py').read_text())
  os.symlink(ROOT / 'configs', tmp_path / 'configs')
  there = f'import os, runpy, sys; os.chdir({str(tmp_path)!r}); sys.argv = sys.argv[1:]; '
  ended = forks('-c', f'{there}runpy.run_path("main.py", run_name="__main__")', 'main.py', DEBUG)
  assert f'{tmp_path}/workdirs/demo_debug: Not a directory' in error_of(ended)


# The config file


def test_no_config(main):
  assert error_of(main()) == 'which config? For a first run: --config=configs/demo.py'


def test_two_configs(main):
  error = error_of(main(DEBUG, '--config.seed=1', '--config', 'configs/demo.py:digits'))
  assert error == f'two configs, {DEBUG} and --config=configs/demo.py:digits: give one of them'


def test_arguments_that_are_no_flags(main):
  assert 'unexpected argument "batch_size=4"' in error_of(main(DEBUG, 'batch_size=4'))
  assert "Unknown command line flag 'workdi'. Did you mean: workdir" in error_of(
    main(DEBUG, '--workdi=x')
  )


@pytest.mark.parametrize(
  ('config', 'message'),
  [
    ('configs/nope.py', '--config=configs/nope.py: there is no file configs/nope.py'),
    ('configs', 'there is no file configs'),
    ('pyproject.toml', 'pyproject.toml is not a Python file'),
    ('main.py', '--config=main.py: main.py, line'),
    ('hivit_jax/errors.py', 'hivit_jax/errors.py has no function get_config()'),
    ('configs/demo.py:debg', 'unknown variant ":debg"; known: finetune, scratch, finetune_all, '),
    ('configs/mae_hivit_b.py:1200', 'unknown variant ":1200"; known: 300, 800, 1600'),
    ('configs/base.py:debug', 'configs/base.py has no variants; leave out ":debug"'),
  ],
)
@pytest.mark.parametrize('form', ['--config={}', '-config {}'])
def test_a_config_that_is_not_there(main, tmp_path, config, message, form):
  flags = form.format(config).split(' ')
  assert message in error_of(main(*flags, f'--workdir={tmp_path}/w'))
  assert not (tmp_path / 'w').exists()


def test_a_setting_is_unset_by_none(forks, tmp_path):
  program = tmp_path / 'show.py'
  program.write_text(
    'from ml_collections import config_flags\n'
    'from hivit_jax import cli\n'
    "config = config_flags.DEFINE_config_file('config')\n"
    'cli.run(lambda _: print(config.value.optim.lr, config.value.max_steps, config.value.seed))\n'
  )
  demo = '--config=configs/demo.py'
  assert forks(str(program), demo).stdout == '0.001 None 0\n'
  flags = ('--config.optim.lr=None', '--config.seed=3', '--config.max_steps=None')
  assert forks(str(program), demo, *flags).stdout == 'None None 3\n'


BASE = 'from configs import base\n\n\ndef get_config():\n  config = base.get_config()\n'


@pytest.mark.parametrize(
  ('text', 'message'),
  [
    ('x = 1\ndef get_config(:\n', 'mine.py, line 2: SyntaxError: invalid syntax'),
    ('import nosuch\n', "mine.py, line 1: ModuleNotFoundError: No module named 'nosuch'"),
    ('def get_config():\n  return 1 / 0\n', 'mine.py, line 2: ZeroDivisionError'),
    ('def get_config():\n  return {}\n', 'get_config() in {} returned dict, not a ConfigDict'),
    (BASE + '  config.bach_size = 4\n  return config\n', 'line 6: AttributeError: Key "bach_size"'),
    (BASE + '  config.bach_size = 4\n  return config\n', 'Did you mean "batch_size"'),
    (BASE + '  config.epochs = "x"\n  return config\n', 'mine.py, line 6: TypeError: '),
    (BASE, 'returned NoneType, not a ConfigDict'),
  ],
)
@pytest.mark.parametrize('override', [(), ('--config.seed=1',)])
def test_a_mistake_in_a_config_file_is_told_with_its_line(main, tmp_path, text, message, override):
  file = tmp_path / 'mine.py'
  file.write_text(text)
  error = error_of(main(f'--config={file}', f'--workdir={tmp_path}/w', *override))
  assert message.replace('{}', str(file)) in error
  assert error.startswith(f'--config={file}: ')
  assert 'Other fields' not in error


# The process


def test_help_is_quick_and_names_the_flags():
  before = resource.getrusage(resource.RUSAGE_CHILDREN)
  command = [sys.executable, '-X', 'importtime', 'main.py', '--help']
  done = subprocess.run(
    command, cwd=ROOT, capture_output=True, text=True, timeout=patience.limit(60)
  )
  after = resource.getrusage(resource.RUSAGE_CHILDREN)
  assert done.returncode == 0
  assert '--config' in done.stdout
  assert '--workdir' in done.stdout
  assert after.ru_utime - before.ru_utime < 1  # of CPU
  imported = {line.split('|')[-1].strip().split('.')[0] for line in done.stderr.splitlines()}
  assert 'absl' in imported
  assert not imported & {'jax', 'jaxlib', 'flax', 'tensorflow_datasets'}


@pytest.fixture(scope='module')
def bare(tmp_path_factory):
  """A Python without any package."""
  folder = tmp_path_factory.mktemp('bare')
  venv.create(folder, symlinks=True, with_pip=False)
  return str(folder / 'bin' / 'python')


@pytest.mark.parametrize('program', [['main.py'], ['-m', 'hivit_jax.tools.predict']], ids=str)
def test_python_without_the_requirements(bare, program):
  done = subprocess.run(
    [bare, *program], cwd=ROOT, capture_output=True, text=True, timeout=patience.limit(60)
  )
  error = error_of(Ended(done.returncode, done.stderr))
  assert 'packages that hivit_jax needs are not installed (jax, flax, optax, ...): ' in error
  assert error.endswith(f': {bare} -m pip install -r requirements.txt')


def test_a_platform_that_is_not_there(tmp_path):
  done = subprocess.run(
    [sys.executable, 'main.py', DEBUG, f'--workdir={tmp_path}/w'],
    cwd=ROOT,
    env=os.environ | {'JAX_PLATFORMS': 'nosuch'},
    capture_output=True,
    text=True,
    timeout=patience.limit(120),
  )
  error = error_of(Ended(done.returncode, done.stderr))
  assert error.startswith('JAX_PLATFORMS=nosuch: JAX finds no such device')
  assert error.endswith('; to use the CPU: JAX_PLATFORMS=cpu')
  assert not (tmp_path / 'w').exists()


@pytest.mark.parametrize(
  ('xla_flags', 'message'),
  [
    ('--xla_nosuch=1', 'Unknown flag in XLA_FLAGS: --xla_nosuch=1; correct it'),
    ('--xla_force_host_platform_device_count=two', "Couldn't interpret value two for flag xla_fo"),
    ('nosuch.txt', 'Could not open file "nosuch.txt"'),
  ],
)
def test_xla_flags_that_would_end_the_process(main, xla_flags, message):
  error = error_of(main(DEBUG, XLA_FLAGS=xla_flags))
  assert error.startswith(f'XLA_FLAGS="{xla_flags}": {message}')
  assert error.endswith('or start without: env -u XLA_FLAGS')


def test_what_an_output_cannot_encode_is_escaped(forks, tmp_path):
  program = tmp_path / 'show.py'
  program.write_text(
    "from hivit_jax import cli\ncli.run(lambda _: print('Eisv\u00f6gel'))\n", 'utf-8'
  )
  done = subprocess.run(
    [sys.executable, program],
    env=os.environ | {'PYTHONPATH': str(ROOT), 'PYTHONIOENCODING': 'ascii'},
    capture_output=True,
    timeout=patience.limit(60),
  )
  assert done.stdout == b'Eisv\\xf6gel\n', done.stderr


def test_a_workdir_whose_name_cannot_be_written(tmp_path):
  ascii_names = {'LC_ALL': 'C', 'PYTHONUTF8': '0', 'PYTHONCOERCECLOCALE': '0'}
  done = subprocess.run(
    [sys.executable, 'main.py', DEBUG, f'--workdir={tmp_path}/l\u00e4uft'.encode()],
    cwd=ROOT,
    env=os.environ | ascii_names,
    capture_output=True,
    text=True,
    timeout=patience.limit(60),
  )
  assert 'file names are ascii here; start with PYTHONUTF8=1' in error_of(
    Ended(done.returncode, done.stderr)
  )
  assert list(tmp_path.iterdir()) == []


def test_a_process_of_its_own_ends_in_the_same_way(tmp_path):
  done = subprocess.run(
    [sys.executable, 'main.py', DEBUG, '--config.typo=1', f'--workdir={tmp_path}/w'],
    cwd=ROOT,
    capture_output=True,
    text=True,
    timeout=patience.limit(60),
  )
  assert error_of(Ended(done.returncode, done.stderr)).startswith('--config.typo: config has no')
  assert done.stdout == ''
  assert not pathlib.Path(tmp_path / 'w').exists()
