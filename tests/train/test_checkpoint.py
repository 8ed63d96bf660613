"""What the checkpoints promise: nothing lost, nothing altered, nothing unclear."""

import asyncio
import errno
import logging
import os
import pathlib
import resource
import shutil
import signal
import subprocess
import sys
import textwrap
import threading

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from hivit_jax.errors import UserError
from hivit_jax.train import checkpoint, manifest, storage
from hivit_jax.train.checkpoint import Checkpoints, load_metadata, load_params
from tests import patience

ROOT = pathlib.Path(__file__).parents[2]


def make_state(seed: int = 0, width: int = 8):
  """A training state as optax makes it: namedtuples, empty states, masked nodes, None."""
  keys = jax.random.split(jax.random.key(seed), 4)
  params = {
    'patch_embed': {'kernel': jax.random.normal(keys[0], (64, width))},
    'blocks': {
      0: {'scale': jnp.asarray([jnp.nan, -0.0, jnp.inf, 1e-42, 1.0], jnp.float32)},
      1: {'kernel': jax.random.normal(keys[1], (3, 5), jnp.bfloat16)},
    },
    'mask': jax.random.bits(keys[2], (7,), jnp.uint8),
  }
  params['flags'] = jax.random.bernoulli(keys[3], 0.5, (6,))
  decay = {'patch_embed': True, 'blocks': True, 'mask': False, 'flags': False}
  tx = optax.chain(
    optax.clip_by_global_norm(1.0), optax.masked(optax.scale_by_adam(), decay), optax.scale(1e-3)
  )
  return {
    'params': params,
    'opt_state': tx.init(params),
    'ema': None,
    'step': jnp.asarray(seed, jnp.int32),
  }


def abstract(state):
  return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)


def host(state):
  """A copy that no later step can reach."""
  return jax.tree.map(lambda x: np.array(x, copy=True), state)


def assert_same(got, expected):
  assert jax.tree.structure(got) == jax.tree.structure(expected)
  for (path, a), b in zip(
    jax.tree_util.tree_leaves_with_path(got), jax.tree.leaves(expected), strict=True
  ):
    a, b = np.asarray(a), np.asarray(b)
    assert (a.dtype, a.shape) == (b.dtype, b.shape), path
    assert a.tobytes() == b.tobytes(), path


def save_steps(directory, *steps, **options):
  with Checkpoints(directory, **{'keep_last': 10, **options}) as checkpoints:
    for step in steps:
      assert checkpoints.save(step, make_state(step), {'epoch': step / 10})


def names(directory):
  return sorted(path.name for path in directory.iterdir())


def run(script: str, *args, **env) -> subprocess.CompletedProcess:
  return subprocess.run(
    [sys.executable, '-c', textwrap.dedent(script), *map(str, args)],
    cwd=ROOT,
    env={**os.environ, **env},
    capture_output=True,
    text=True,
    timeout=patience.limit(120),
  )


def test_state_comes_back_bit_for_bit_with_its_containers(tmp_path):
  state = make_state(3)
  with Checkpoints(tmp_path) as checkpoints:
    checkpoints.save(3, state, {'model': 'hivit_tiny', 'epoch': 0.1 + 0.2, 'size': [1, 2]})
  with Checkpoints(tmp_path) as checkpoints:
    step, restored, metadata = checkpoints.restore(abstract(state))
  assert step == 3
  assert_same(restored, state)
  assert isinstance(restored['opt_state'][1].inner_state, optax.ScaleByAdamState)
  assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(restored))
  assert metadata == {'model': 'hivit_tiny', 'epoch': 0.1 + 0.2, 'size': [1, 2]}


def test_no_checkpoint_restores_to_none(tmp_path):
  with Checkpoints(tmp_path / 'new') as checkpoints:
    assert checkpoints.latest_step() is None
    assert checkpoints.steps() == []
    assert checkpoints.restore(abstract(make_state())) is None


def test_a_donating_step_cannot_spoil_a_save_under_way(tmp_path):
  next_state = jax.jit(lambda s: jax.tree.map(lambda x: x + 1, s), donate_argnums=0)
  state = {'w': jnp.arange(1 << 20, dtype=jnp.float32), 'n': jnp.zeros((), jnp.int32)}
  state = jax.block_until_ready(next_state(state))
  probe = next_state({'w': jnp.ones(9), 'n': jnp.ones(())})
  donated = probe['w']
  next_state(probe)
  assert donated.is_deleted()  # donation is real on this backend
  expected = {}
  with Checkpoints(tmp_path, keep_last=9) as checkpoints:
    for step in range(4):
      expected[step] = host(state)
      checkpoints.save(step, state, {})
      for _ in range(3):
        state = next_state(state)
      jax.block_until_ready(state)
    checkpoints.wait()
    for step, values in expected.items():
      restored = checkpoints.restore(abstract(state), step).state
      assert_same(restored, values)
      state = jax.block_until_ready(next_state(restored))  # a restored state can be donated too
      assert_same(state, jax.tree.map(lambda x: x + 1, values))


class Held:
  """A save that ends when the test says so."""

  def __init__(self, monkeypatch):
    self.release = threading.Event()
    real = storage.save

    def save(*args):
      response = real(*args)
      hold = self.release

      class Response:
        def result(self):
          assert hold.wait(30)
          return response.result()

      return Response()

    monkeypatch.setattr(storage, 'save', save)


def test_save_returns_early_and_the_next_one_waits(tmp_path, monkeypatch):
  held = Held(monkeypatch)
  with Checkpoints(tmp_path) as checkpoints:
    checkpoints.save(1, make_state(1), {})
    assert not checkpoints._pending[1].done()
    second = threading.Thread(target=checkpoints.save, args=(2, make_state(2), {}))
    second.start()
    second.join(0.2)
    assert second.is_alive()
    held.release.set()
    second.join(30)
    assert not second.is_alive()
  assert checkpoints.steps() == [1, 2]


def test_a_blocking_save_is_complete_when_it_returns(tmp_path):
  with Checkpoints(tmp_path) as checkpoints:
    checkpoints.save(1, make_state(1), {}, wait=True)
    assert checkpoints._pending is None
    assert checkpoints.steps() == [1]


def test_keeps_the_last_ones_and_every_mth(tmp_path):
  save_steps(tmp_path, *range(10, 80, 10), keep_last=2, keep_every_steps=30)
  assert names(tmp_path) == ['30', '60', '70']
  save_steps(tmp_path / 'one', 1, 2, 3, keep_last=1)
  assert names(tmp_path / 'one') == ['3']


def test_nothing_is_deleted_before_the_new_checkpoint_is_complete(tmp_path, monkeypatch):
  save_steps(tmp_path, 1)
  held = Held(monkeypatch)
  with Checkpoints(tmp_path, keep_last=1) as checkpoints:
    checkpoints.restore(abstract(make_state()))
    checkpoints.save(2, make_state(2), {})
    assert checkpoints.steps() == [1]
    held.release.set()
    checkpoints.wait()
    assert checkpoints.steps() == [2]


def test_saving_after_going_back_never_deletes_what_was_just_saved(tmp_path):
  save_steps(tmp_path, 10, 20)
  with Checkpoints(tmp_path, keep_last=1) as checkpoints:
    checkpoints.restore(abstract(make_state()), step=10)
    checkpoints.save(15, make_state(15), {}, wait=True)
    assert checkpoints.steps() == [15, 20]


def test_the_same_step_is_saved_once(tmp_path):
  state = make_state(5)
  with Checkpoints(tmp_path) as checkpoints:
    assert checkpoints.save(5, state, {'n': 1})
    assert not checkpoints.save(5, state, {'n': 2})
  with Checkpoints(tmp_path) as checkpoints:  # a finished run, started again
    checkpoints.restore(abstract(state))
    assert not checkpoints.save(5, state, {'n': 3})
  assert load_metadata(tmp_path) == {'n': 1}


def test_another_runs_checkpoint_is_not_taken_for_this_ones(tmp_path):
  save_steps(tmp_path, 5)
  with (
    Checkpoints(tmp_path) as checkpoints,
    pytest.raises(UserError, match=r'another --workdir.*rm -r'),
  ):
    checkpoints.save(5, make_state(6), {})
  assert load_metadata(tmp_path) == {'epoch': 0.5}


def test_plain_orbax_reads_the_checkpoint(tmp_path):
  from orbax.checkpoint import v1 as ocp

  save_steps(tmp_path, 4)
  state = make_state(4)
  plain = ocp.load(tmp_path / '4', ocp.metadata(tmp_path / '4').metadata)
  assert_same(plain['params']['blocks']['1']['kernel'], state['params']['blocks'][1]['kernel'])
  mu = plain['opt_state']['1']['inner_state']['mu']['patch_embed']['kernel']
  assert_same(mu, state['opt_state'][1].inner_state.mu['patch_embed']['kernel'])
  assert ocp.metadata(tmp_path / '4').custom_metadata['metadata'] == {'epoch': 0.4}


def test_saving_and_restoring_is_silent(tmp_path, capfd, caplog):
  save_steps(tmp_path, 1, 2, keep_last=1)
  with Checkpoints(tmp_path) as checkpoints:
    checkpoints.restore(abstract(make_state()))
  load_params(tmp_path)
  assert capfd.readouterr() == ('', '')
  assert [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING] == []


# Tools


@pytest.mark.parametrize('tail', ['', 'checkpoints', 'checkpoints/2'])
def test_tools_take_the_workdir_its_checkpoints_or_one_of_them(tmp_path, tail):
  save_steps(tmp_path / 'checkpoints', 1, 2)
  assert load_metadata(tmp_path / tail) == {'epoch': 0.2}
  step, params, metadata = load_params(str(tmp_path / tail))
  assert (step, metadata) == (2, {'epoch': 0.2})
  assert_same(params, host(make_state(2)['params']))
  assert all(isinstance(leaf, np.ndarray) for leaf in jax.tree.leaves(params))


def test_tools_can_name_a_step(tmp_path):
  save_steps(tmp_path / 'checkpoints', 1, 2)
  assert load_metadata(tmp_path, step=1) == {'epoch': 0.1}
  assert load_params(tmp_path, step=1).step == 1
  assert load_params(tmp_path / 'checkpoints/1').step == 1
  with pytest.raises(UserError, match=r'no checkpoint of step 7; it has \[1, 2\]'):
    load_params(tmp_path, step=7)


def test_params_are_read_onto_an_abstract_tree_that_must_fit(tmp_path):
  save_steps(tmp_path, 1)
  params = make_state(1)['params']
  assert_same(load_params(tmp_path, abstract(params)).state, params)
  other = abstract(params) | {'head': jax.ShapeDtypeStruct((2,), jnp.float32)}
  with pytest.raises(
    UserError, match=r'params/head is missing in the checkpoint, float32 \(2,\) in the model'
  ):
    load_params(tmp_path, other)
  assert load_params(tmp_path, key='step').state == 1
  with pytest.raises(UserError, match=r"no 'model'; it has: .*params"):
    load_params(tmp_path, key='model')


def test_tools_say_where_they_looked(tmp_path):
  with pytest.raises(UserError, match=r'missing does not exist.*--workdir'):
    load_params(tmp_path / 'missing')
  with pytest.raises(UserError, match=f'no checkpoint in {tmp_path}'):
    load_metadata(tmp_path)


def test_reading_metadata_needs_no_orbax(tmp_path):
  save_steps(tmp_path, 1)
  script = """
    import sys
    from hivit_jax.train.checkpoint import load_metadata
    print(load_metadata(sys.argv[1]))
    assert not any(name.startswith(('orbax', 'tensorstore')) for name in sys.modules)
  """
  result = run(script, tmp_path)
  assert result.stdout == "{'epoch': 0.1}\n", result.stderr


# The wrong checkpoint


def variants():
  state = make_state(1)
  params = state['params']
  kernel = 'params/patch_embed/kernel'
  shape = dict(state, params=params | {'patch_embed': {'kernel': jnp.zeros((64, 9))}})
  yield (
    'shape',
    shape,
    rf'{kernel} is float32 \(64, 8\) in the checkpoint, float32 \(64, 9\) in the model',
  )
  bfloat16 = {'patch_embed': {'kernel': jnp.zeros((64, 8), jnp.bfloat16)}}
  dtype = dict(state, params=params | bfloat16)
  yield (
    'dtype',
    dtype,
    rf'{kernel} is float32 \(64, 8\) in the checkpoint, bfloat16 \(64, 8\) in the model',
  )
  more = dict(state, params=params | {'head': jnp.zeros(2)})
  yield 'more', more, r'params/head is missing in the checkpoint, float32 \(2,\) in the model'
  less = dict(state, params={k: v for k, v in params.items() if k != 'mask'})
  yield 'less', less, r'params/mask is uint8 \(7,\) in the checkpoint, missing in the model'
  sgd = dict(state, opt_state=optax.sgd(0.1, momentum=0.9).init(params))
  yield 'optimizer', sgd, r'opt_state/0/trace/\S+ is missing in the checkpoint.*and \d+ more'


@pytest.mark.parametrize(('other', 'message'), [pytest.param(*v[1:], id=v[0]) for v in variants()])
def test_another_models_checkpoint_is_refused_not_bent(tmp_path, caplog, other, message):
  save_steps(tmp_path, 1, 2)
  with (
    Checkpoints(tmp_path) as checkpoints,
    pytest.raises(UserError, match=message + r'.*config that wrote it.*--workdir'),
  ):
    checkpoints.restore(abstract(other))
  assert not caplog.records  # it is a mistake, not damage: nothing skipped, nothing moved
  assert sorted(p.name for p in tmp_path.iterdir()) == ['1', '2']


# Damage


def flip(file: pathlib.Path, at: int):
  content = bytearray(file.read_bytes())
  content[at] ^= 0x10
  file.write_bytes(content)


DAMAGE = {
  'flip_first': lambda file: flip(file, 0),
  'flip_middle': lambda file: flip(file, file.stat().st_size // 2),
  'flip_last': lambda file: flip(file, -1),
  'truncate': lambda file: os.truncate(file, file.stat().st_size // 2),
  'empty': lambda file: os.truncate(file, 0),
  'remove': lambda file: file.unlink(),
  'garbage': lambda file: file.write_bytes(b'\xff\x00garbage' * (1 + file.stat().st_size // 9)),
}


@pytest.mark.parametrize('kind', DAMAGE)
def test_damage_to_any_file_is_seen_and_the_one_before_is_used(tmp_path, caplog, kind):
  save_steps(tmp_path / 'good', 1, 2)
  expected = host(make_state(1))
  files = [
    file.relative_to(tmp_path / 'good')
    for file in sorted((tmp_path / 'good/2').rglob('*'))
    if file.is_file() and (file.stat().st_size or kind == 'remove')
  ]
  assert len(files) > 5
  for file in files:
    shutil.rmtree(tmp_path / 'bad', ignore_errors=True)
    shutil.copytree(tmp_path / 'good', tmp_path / 'bad')
    DAMAGE[kind](tmp_path / 'bad' / file)
    caplog.clear()
    with Checkpoints(tmp_path / 'bad') as checkpoints:
      step, state, metadata = checkpoints.restore(abstract(make_state()))
    assert (step, metadata) == (1, {'epoch': 0.1})
    assert_same(state, expected)
    first = caplog.records[0].getMessage()
    assert first.startswith(f'DAMAGED checkpoint at step 2, {tmp_path}/bad/2: ')
    assert file.name in first
    assert 'falling back to the checkpoint of step 1' in caplog.text


def test_every_flipped_bit_of_the_arrays_is_seen(tmp_path):
  save_steps(tmp_path, 1)
  data = max((tmp_path / '1').rglob('d/*'), key=lambda file: file.stat().st_size)
  original = data.read_bytes()
  kernel = np.asarray(make_state(1)['params']['patch_embed']['kernel']).tobytes()
  start = original.index(kernel)  # Orbax itself loads a change here without a word
  for position in range(start, start + len(kernel), 37):
    flip(data, position)
    with pytest.raises(UserError, match=f'{data.name} was altered'):
      load_params(tmp_path)
    data.write_bytes(original)
  load_params(tmp_path)


def test_the_sums_can_be_checked_by_hand(tmp_path):
  save_steps(tmp_path, 1)
  subprocess.run(['sha256sum', '-c', 'SHA256SUMS'], cwd=tmp_path / '1', check=True)


def test_training_goes_on_after_damage(tmp_path, caplog):
  save_steps(tmp_path, 1, 2, 3)
  for step in (2, 3):
    (tmp_path / f'{step}/_CHECKPOINT_METADATA').write_bytes(b'{}')
  with Checkpoints(tmp_path, keep_last=2) as checkpoints:
    assert checkpoints.restore(abstract(make_state())).step == 1
    assert sorted(p.name for p in tmp_path.iterdir()) == ['1', '2.damaged', '3.damaged']
    assert checkpoints.save(2, make_state(2), {})
    checkpoints.wait()
    assert checkpoints.steps() == [1, 2]
    assert_same(checkpoints.restore(abstract(make_state())).state, make_state(2))
  assert 'falling back to the checkpoint of step 1' in caplog.text


def test_without_a_usable_checkpoint_nothing_is_touched(tmp_path):
  save_steps(tmp_path, 1, 2)
  flip(tmp_path / '1/SHA256SUMS', 3)
  (tmp_path / '2/state/manifest.ocdbt').unlink()
  with (
    Checkpoints(tmp_path) as checkpoints,
    pytest.raises(UserError, match=r'no usable checkpoint.*step 2: .*step 1: .*rm -r') as error,
  ):
    checkpoints.restore(abstract(make_state()))
  assert '\n' not in str(error.value)
  assert checkpoints.steps() == [1, 2]


def test_a_named_step_has_no_substitute(tmp_path):
  save_steps(tmp_path, 1, 2)
  (tmp_path / '2/_CHECKPOINT_METADATA').unlink()
  with (
    Checkpoints(tmp_path) as checkpoints,
    pytest.raises(UserError, match=r'METADATA is missing.*other checkpoints there: \[1\]'),
  ):
    checkpoints.restore(abstract(make_state()), step=2)


def test_tools_change_nothing_in_a_run_that_may_be_going_on(tmp_path):
  save_steps(tmp_path, 1, 2)
  (tmp_path / '2/_CHECKPOINT_METADATA').unlink()
  (tmp_path / '3.writing.orbax-checkpoint-tmp').mkdir()
  assert load_params(tmp_path).step == 1
  assert load_metadata(tmp_path) == {'epoch': 0.1}
  assert names(tmp_path) == ['1', '2', '3.writing.orbax-checkpoint-tmp']
  with pytest.raises(UserError, match='does not exist'):
    load_params(tmp_path / 'new')
  assert not (tmp_path / 'new').exists()


# Other formats


def test_another_format_is_not_called_damage(tmp_path, monkeypatch):
  monkeypatch.setattr(manifest, 'FORMAT', 3)
  save_steps(tmp_path, 1)
  monkeypatch.undo()
  with pytest.raises(UserError, match=r'format 3.*reads up to 2'):
    load_metadata(tmp_path)


def test_training_does_not_continue_the_first_format_but_its_weights_are_read(
  tmp_path, monkeypatch, caplog
):
  """There, the moments of all biases and scales were one array."""
  params = {
    'fc': {'kernel': jnp.ones((3, 2)), 'bias': jnp.zeros(2)},
    'norm': {'scale': jnp.ones(3)},
  }
  old = {'matrices': {'fc': {'kernel': jnp.ones((3, 2))}}, 'vectors': jnp.zeros(5)}
  state = {'step': jnp.asarray(7), 'params': params, 'ema': params}
  monkeypatch.setattr(manifest, 'FORMAT', 1)
  with Checkpoints(tmp_path) as checkpoints:
    checkpoints.save(7, state | {'opt_state': [{'mu': old, 'nu': old}]}, {'epoch': 0.5})
  monkeypatch.undo()
  new = state | {'opt_state': [{'mu': params, 'nu': params}]}
  with (
    Checkpoints(tmp_path) as checkpoints,
    pytest.raises(
      UserError,
      match=rf'^{tmp_path}/7 is from an earlier version .*--config\.init={tmp_path}/7 and another',
    ) as error,
  ):
    checkpoints.restore(abstract(new))
  assert '\n' not in str(error.value)
  assert not caplog.records
  assert names(tmp_path) == ['7']
  for key in ('params', 'ema'):
    assert_same(load_params(tmp_path, key=key).state, host(params))
  assert load_metadata(tmp_path) == {'epoch': 0.5}


# Interrupted and failing saves


KILLED = """
  import os, pathlib, signal, sys, time
  import jax, jax.numpy as jnp
  from hivit_jax.train.checkpoint import Checkpoints
  directory, delay = pathlib.Path(sys.argv[1]), float(sys.argv[2])
  state = lambda seed: {'w': seed + jnp.arange(16 << 20, dtype=jnp.float32)}
  checkpoints = Checkpoints(directory)
  if checkpoints.latest_step() is None:
    checkpoints.save(1, state(1), {}, wait=True)
  second = state(2)
  checkpoints.save(2, second, {})
  while not list(directory.glob('2.writing*')):
    pass
  time.sleep(delay)
  os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.slow
def test_kill_during_a_save_leaves_the_one_before(tmp_path):
  expected = 1 + np.arange(16 << 20, dtype=np.float32)
  for delay in (0, 0.02):
    result = run(KILLED, tmp_path, delay)
    assert result.returncode == -signal.SIGKILL, result.stderr
    assert list(tmp_path.glob('2.writing*'))  # it was killed on the way
    assert load_params(tmp_path, key='w').step == 1
  with Checkpoints(tmp_path) as checkpoints:
    assert [p.name for p in tmp_path.iterdir()] == ['1']
    restored = checkpoints.restore({'w': jax.ShapeDtypeStruct(expected.shape, expected.dtype)})
    assert np.array_equal(restored.state['w'], expected)
    assert checkpoints.save(2, restored.state, {})


@pytest.fixture
def small_files():
  """No file may grow past 64 KiB: a write fails as it does on a full disk, without being root."""
  soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)

  def limit(on: bool):
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16 if on else soft, hard))

  yield limit
  limit(False)


def big_state(seed):
  return {'w': jax.random.normal(jax.random.key(seed), (1 << 16,))}


@pytest.mark.parametrize('surfaces_in', ['save', 'wait', 'close'])
def test_a_failed_write_surfaces_and_keeps_the_old_checkpoint(tmp_path, small_files, surfaces_in):
  checkpoints = Checkpoints(tmp_path, keep_last=1)
  checkpoints.save(1, big_state(1), {}, wait=True)
  small_files(True)
  checkpoints.save(2, big_state(2), {})
  act = {
    'save': lambda: checkpoints.save(3, big_state(3), {}),
    'wait': checkpoints.wait,
    'close': checkpoints.close,
  }
  with pytest.raises(
    UserError, match=r'could not save .*/2: .*too large.*/1 is kept; make room'
  ) as error:
    act[surfaces_in]()
  assert '\n' not in str(error.value)
  assert len(str(error.value)) < 700
  small_files(False)
  assert [p.name for p in tmp_path.iterdir()] == ['1']  # nor is the partial one left on the disk
  if surfaces_in != 'close':
    assert checkpoints.save(2, big_state(2), {})  # when there is room again
    checkpoints.close()
    assert_same(load_params(tmp_path, key='w').state, np.asarray(big_state(2)['w']))


def test_a_full_disk_is_named_as_such(tmp_path):
  mount = tmp_path / 'disk'
  mount.mkdir()
  if subprocess.run(
    ['mount', '-t', 'tmpfs', '-o', 'size=1m', 'tmpfs', mount], capture_output=True
  ).returncode:
    pytest.skip('needs the right to mount a tmpfs')
  try:
    with Checkpoints(mount, keep_last=3) as checkpoints:
      for step in (1, 2):
        checkpoints.save(step, big_state(step), {}, wait=True)
      full = {'w': jnp.ones(1 << 18)}
      with pytest.raises(UserError, match=r'No space left on device; .*/2 is kept; make room'):
        checkpoints.save(3, full, {}, wait=True)
      assert load_params(mount, key='w').step == 2
  finally:
    subprocess.run(['umount', mount], check=True)


@pytest.mark.slow
def test_nothing_is_left_of_a_save_that_failed_while_other_threads_went_on(tmp_path, monkeypatch):
  """As Orbax's do: they create anew what was removed."""
  with Checkpoints(tmp_path) as checkpoints:
    checkpoints.save(1, big_state(1), {}, wait=True)
    leftover = tmp_path / '2.writing.orbax-checkpoint-tmp'
    clock, late = [0.0], [0.2, 0.4, 0.9]

    def sleep(seconds):
      clock[0] += seconds
      if late and clock[0] >= late[0]:
        late.pop(0)
        leftover.mkdir()
        (leftover / 'data').write_text('')

    def save(*_):
      monkeypatch.setattr(checkpoint.time, 'monotonic', lambda: clock[0])
      monkeypatch.setattr(checkpoint.time, 'sleep', sleep)
      raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(storage, 'save', save)
    with pytest.raises(UserError, match=r'No space left on device; .*/1 is kept'):
      checkpoints.save(2, big_state(2), {})
    monkeypatch.undo()
  assert not late
  assert [path.name for path in tmp_path.iterdir()] == ['1']


def test_writes_that_end_after_a_failed_save_print_no_trace(capsys, monkeypatch):
  monkeypatch.setattr(sys, 'excepthook', sys.__excepthook__)
  storage._orbax.__wrapped__()

  def report(function):
    """As TensorStore's threads do with an error of a callback."""
    try:
      function()
    except RuntimeError as error:
      sys.excepthook(type(error), error, error.__traceback__.tb_next.tb_next)

  loop = asyncio.new_event_loop()
  loop.close()
  report(lambda: loop.call_soon_threadsafe(print))
  assert capsys.readouterr().err == ''

  def fail():
    raise RuntimeError('Event loop is closed')

  report(fail)
  assert 'RuntimeError: Event loop is closed' in capsys.readouterr().err


def test_an_unwritable_directory_is_refused_at_once(tmp_path):
  (tmp_path / 'file').write_text('')
  with pytest.raises(UserError, match=r'cannot write checkpoints to .*another --workdir'):
    Checkpoints(tmp_path / 'file' / 'checkpoints')


def test_a_directory_that_vanishes_is_reported(tmp_path):
  directory = tmp_path / 'checkpoints'
  checkpoints = Checkpoints(directory)
  checkpoints.save(1, big_state(1), {}, wait=True)
  shutil.rmtree(directory)
  directory.write_text('in the way')
  with pytest.raises(UserError, match=r'checkpoints/2: .*Not a directory.*there is no earlier one'):
    checkpoints.save(2, big_state(2), {}, wait=True)
  checkpoints.close()


def test_a_failed_save_does_not_hide_the_error_that_ends_the_run(tmp_path, small_files, caplog):
  with pytest.raises(ZeroDivisionError), Checkpoints(tmp_path) as checkpoints:  # noqa: PT012
    small_files(True)
    checkpoints.save(1, big_state(1), {})
    _ = 1 / 0
  messages = [r.getMessage() for r in caplog.records if r.levelname == 'ERROR']
  assert len(messages) == 1  # and Orbax's own, with traces, are not added
  assert messages[0].startswith(f'could not save the checkpoint {tmp_path}/1')


@pytest.mark.parametrize(
  ('state', 'metadata', 'error', 'message'),
  [
    ({'a': {'b': np.ones(2)}}, {}, TypeError, 'a/b: expected a jax.Array, got ndarray'),
    ({'a': [jnp.ones((0, 3))]}, {}, ValueError, r'a/0: .*without elements, \(0, 3\)'),
    ({'a': jnp.ones(2)}, {'x': {1, 2}}, TypeError, 'set'),
    ({'a': jnp.ones(2)}, {'x': float('nan')}, ValueError, 'JSON'),
    ({0: jnp.ones(2), '0': jnp.ones(2)}, {}, (TypeError, ValueError), None),
    ({'a': {'b': jnp.ones(2)}, 'a.b': jnp.ones(2)}, {}, ValueError, r"distinct.*\['a.b'\]"),
    ({}, {}, ValueError, 'needs leaves'),
  ],
)
def test_what_cannot_be_stored_is_refused_before_writing(tmp_path, state, metadata, error, message):
  with Checkpoints(tmp_path) as checkpoints, pytest.raises(error, match=message):
    checkpoints.save(1, state, metadata)
  assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize('options', [{'keep_last': 0}, {'keep_every_steps': 0}])
def test_options_are_checked(tmp_path, options):
  with pytest.raises(UserError, match=f'{next(iter(options))} must be at least 1'):
    Checkpoints(tmp_path, **options)


# Meshes


MESH = """
  import sys
  import jax, numpy as np
  from jax.sharding import NamedSharding, PartitionSpec as P
  from hivit_jax.train.checkpoint import Checkpoints
  directory = sys.argv[1]
  def place(shape, spec):
    return NamedSharding(jax.make_mesh(shape, ('data', 'fsdp')), P(*spec))
  four = place((2, 2), ('fsdp', 'data'))
  w = jax.random.normal(jax.random.key(0), (8, 12))
  state = {'w': jax.device_put(w, four), 'n': jax.device_put(w[0], place((4, 1), ()))}
  with Checkpoints(directory) as checkpoints:
    checkpoints.save(1, state, {})
    checkpoints.wait()
    for sharding in (place((4, 1), ('data',)), place((2, 1), (None, 'data')), place((1, 1), ())):
      abstract = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), state['w'])
      replicated = jax.ShapeDtypeStruct((12,), np.float32, sharding=NamedSharding(
        sharding.mesh, P()))
      got = checkpoints.restore({'w': abstract, 'n': replicated}).state
      assert got['w'].sharding == sharding
      assert np.array_equal(got['w'], w) and np.array_equal(got['n'], w[0])
  print('done')
"""


@pytest.mark.slow
def test_a_state_moves_between_meshes(tmp_path):
  result = run(MESH, tmp_path, XLA_FLAGS='--xla_force_host_platform_device_count=4')
  assert result.stdout == 'done\n', result.stderr
  with Checkpoints(tmp_path) as checkpoints:  # saved on four devices, restored on one
    shapes = {'w': (8, 12), 'n': (12,)}
    abstract_state = {k: jax.ShapeDtypeStruct(v, jnp.float32) for k, v in shapes.items()}
    restored = checkpoints.restore(abstract_state).state
  w = jax.random.normal(jax.random.key(0), (8, 12))
  assert_same(restored, {'w': w, 'n': w[0]})
  assert_same(load_params(tmp_path, key='w').state, np.asarray(w))
