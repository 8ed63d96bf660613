"""Workdirs in buckets: checkpoints, files and tools, against real servers on this machine."""

import contextlib
import pathlib
import re
import signal
import socket
import sys
import threading

import numpy as np
import pytest

from hivit_jax.buckets.bucket import Bucket
from hivit_jax.errors import UserError
from hivit_jax.interop import files
from hivit_jax.train import manifest, places, weights
from hivit_jax.train.checkpoint import Checkpoints, load_metadata, load_params
from tests.buckets.servers import serve
from tests.runs import STEPS, assert_same_params, content, error_of, metrics, on_devices
from tests.train.test_checkpoint import abstract, assert_same, make_state


@pytest.fixture
def address(server, request):
  server.before = None
  return server.address(re.sub(r'\W', '_', request.node.name))


@contextlib.contextmanager
def opened(address, **options):
  with contextlib.ExitStack() as stack:
    place = places.of(address)
    place.open(stack)
    yield stack.enter_context(
      Checkpoints(place.directory / 'checkpoints', place=place, **{'keep_last': 9, **options})
    )


def save_steps(address, *steps, **options):
  with opened(address, **options) as checkpoints:
    for step in steps:
      checkpoints.save(step, make_state(step), {'epoch': step / 10})


def objects(address):
  return Bucket(address).sizes('checkpoints/')


def test_a_state_comes_back_bit_for_bit_and_old_ones_are_removed(address):
  save_steps(address, 1, 2, 3, 4, keep_last=1, keep_every_steps=2)
  steps = {name.split('/')[1] for name in objects(address)}
  assert steps == {'2', '4'}
  assert 'checkpoints/4/SHA256SUMS' in objects(address)
  state = make_state(4)
  with opened(address) as checkpoints:
    assert checkpoints.steps() == [2, 4]
    assert checkpoints.path(4) == f'{address}/checkpoints/4'
    step, restored, metadata = checkpoints.restore(abstract(state))
    assert_same(restored, state)
    assert (step, metadata) == (4, {'epoch': 0.4})
    assert_same(checkpoints.restore(abstract(state), 2).state, make_state(2))
    local = checkpoints.directory
    assert not any('/state/' in name for name in content(local))  # arrays do not stay
  assert not local.parent.parent.exists()


def test_without_its_last_object_there_is_no_checkpoint(address, monkeypatch):
  save_steps(address, 1)
  write = Bucket.write

  def fail(bucket, name, *args, **kwargs):
    if name.endswith('SHA256SUMS'):
      raise UserError('gone')
    return write(bucket, name, *args, **kwargs)

  with opened(address) as checkpoints:
    checkpoints.restore(abstract(make_state()))
    monkeypatch.setattr(Bucket, 'write', fail)
    checkpoints.save(2, make_state(2), {})
    with pytest.raises(UserError) as told:
      checkpoints.wait()
    monkeypatch.undo()
    here = f'{address}/checkpoints'
    assert str(told.value) == f'could not save the checkpoint {here}/2: gone; {here}/1 is kept'
    assert checkpoints.steps() == [1]
  assert any(name.startswith('checkpoints/2/') for name in objects(address))
  assert load_metadata(address) == {'epoch': 0.1}
  with opened(address) as checkpoints:
    assert not any(name.startswith('checkpoints/2/') for name in objects(address))
    assert checkpoints.restore(abstract(make_state())).step == 1
    checkpoints.save(2, make_state(2), {})
  expected = make_state(2)['params']
  assert_same(load_params(address, abstract(expected)).state, expected)


def test_a_damaged_object_is_told_and_the_one_before_is_used(address, caplog):
  save_steps(address, 1, 2)
  place = Bucket(address)
  name = max((n for n in objects(address) if '/2/state/' in n), key=objects(address).get)
  data = bytearray(place.read(name).content)
  data[len(data) // 2] ^= 1
  place.write(name, bytes(data))
  before = objects(address)
  assert load_params(address).step == 1  # a tool changes nothing
  assert objects(address) == before
  with pytest.raises(UserError, match=rf'{address}/checkpoints .*was altered'):
    load_params(f'{address}/checkpoints/2')
  with opened(address) as checkpoints:
    assert checkpoints.restore(abstract(make_state())).step == 1
    assert checkpoints.steps() == [1]
    checkpoints.save(2, make_state(2), {})
  assert f'set the damaged checkpoint {address}/checkpoints/2 aside' in caplog.text
  assert_same(load_params(address).state['mask'], np.asarray(make_state(2)['params']['mask']))


def test_files_of_the_run_are_copied_and_found_again(address):
  with opened(address) as checkpoints:
    run = checkpoints.directory.parent
    (run / 'metrics.jsonl').write_text('{"step": 1}\n')
    (run / 'pictures').mkdir()
    (run / 'pictures' / 'a.png').write_bytes(b'picture')
    (run / 'pictures' / 'b.tmp').write_bytes(b'half')
    checkpoints.save(1, make_state(1), {}, wait=True)
    assert Bucket(address).read('metrics.jsonl').content == b'{"step": 1}\n'  # before the run ends
    (run / 'metrics.jsonl').write_text('{"step": 1}\n{"step": 2}\n')
  names = {name for name in Bucket(address).sizes() if not name.startswith('checkpoints/')}
  assert names == {'lock', 'metrics.jsonl', 'pictures/a.png'}
  with opened(address) as checkpoints:
    run = checkpoints.directory.parent
    assert content(run)['metrics.jsonl'] == b'{"step": 1}\n{"step": 2}\n'
    assert not (run / 'pictures').exists()


def test_files_can_be_copied_before_there_is_a_checkpoint(address):
  with contextlib.ExitStack() as stack:
    place = places.of(address)
    place.open(stack)
    (place.directory / 'trackers.json').write_text('{}')
    place.push()
    assert Bucket(address).read('trackers.json').content == b'{}'


def test_who_has_lost_the_lock_writes_nothing_more(address):
  def run():
    with opened(address) as checkpoints:
      checkpoints.save(1, make_state(1), {}, wait=True)
      Bucket(address).write('lock', b'{"id": "x", "by": "process 1 on another"}')
      (checkpoints.directory.parent / 'metrics.jsonl').write_text('ours')
      checkpoints.save(2, make_state(2), {}, wait=True)

  with pytest.raises(UserError, match='was taken over by another run, process 1 on another'):
    run()
  assert {name.split('/')[1] for name in objects(address)} == {'1'}
  assert Bucket(address).read('metrics.jsonl') is None
  assert b'process 1 on another' in Bucket(address).read('lock').content


def test_weights_are_read_from_files_and_directories(address, tmp_path):
  files.write(tmp_path / 'model.safetensors', {'head.weight': np.ones((2, 3), np.float32)})
  Bucket(address).upload({'model.safetensors': tmp_path / 'model.safetensors'})
  for path in (f'{address}/model.safetensors', address):
    assert weights.read(path).arrays['head.weight'].shape == (2, 3)
  with pytest.raises(UserError, match=f'{address}/nothing does not exist'):
    weights.read(f'{address}/nothing')


def test_the_best_checkpoint_is_read_by_its_name(address):
  with opened(address) as checkpoints:
    checkpoints.best = manifest.Best('eval/top1:max', 0.5, 1)
    for step in (1, 2):
      checkpoints.save(step, make_state(step), {})
  assert load_params(address).step == 2
  assert load_params(f'{address}/best').step == 1


def test_without_its_package_a_bucket_is_refused_in_one_line(monkeypatch):
  for scheme, package in (('gs', 'google.cloud.storage'), ('s3', 'boto3')):
    monkeypatch.setitem(sys.modules, package, None)
    if scheme == 'gs':
      monkeypatch.delattr('google.cloud.storage', raising=False)
    told = rf'^{scheme}://bucket needs one more package: pip install '
    with pytest.raises(UserError, match=told):
      places.of(f'{scheme}://bucket/run')


_TWO = """
import contextlib, sys
import jax, ml_dtypes, numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from hivit_jax.train import places, sharding
from hivit_jax.train.checkpoint import Checkpoints

address, port, index = sys.argv[1:]
jax.distributed.initialize(f'127.0.0.1:{port}', 2, int(index))
mesh = sharding.make_mesh(2, 2)
rng = np.random.default_rng(0)
values = {
  'split': rng.standard_normal((8, 6)).astype(np.float32),
  'other': rng.standard_normal((3, 4)).astype(ml_dtypes.bfloat16),
  'whole': np.array([-0.0, np.nan, 1e-42, np.inf], np.float32),
  'flags': np.array([True, False]),
  'step': np.asarray(7, np.int32),
}
parts = {'split': PartitionSpec('fsdp'), 'other': PartitionSpec(None, 'fsdp')}
shardings = {key: NamedSharding(mesh, parts.get(key, PartitionSpec())) for key in values}
state = sharding.put(values, shardings)

def opened(stack):
  place = places.of(address)
  place.open(stack)
  return stack.enter_context(Checkpoints(place.directory / 'checkpoints', place=place))

with contextlib.ExitStack() as stack:
  opened(stack).save(3, state, {'epoch': 1}, wait=True)
abstract = {
  key: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding) for key, x in state.items()
}
with contextlib.ExitStack() as stack:
  step, restored, metadata = opened(stack).restore(abstract)
assert (step, metadata) == (3, {'epoch': 1})
for key, value in values.items():
  assert restored[key].sharding == shardings[key], key
  assert sharding.fetch(restored[key]).tobytes() == value.tobytes(), key
"""


def test_of_two_processes_only_the_first_needs_the_bucket_and_both_get_the_same_bits(
  runs, tmp_path
):
  with serve('s3') as s3, socket.socket() as free:
    address = s3.address('two_processes')
    free.bind(('127.0.0.1', 0))
    port = str(free.getsockname()[1])
    free.close()
    own = {'TMPDIR': str(tmp_path), **on_devices(2)}
    # The second one gets an address where nothing listens.
    command = [sys.executable, '-c', _TWO, address, port]
    with (
      runs.start([*command, '0'], {**s3.environment, **own}) as first,
      runs.start([*command, '1'], {'AWS_ENDPOINT_URL_S3': 'http://127.0.0.1:9', **own}) as second,
    ):
      assert (first.wait(60), second.wait(60)) == (0, 0), first.output() + second.output()
    assert load_params(address, key='step').state == 7


# Whole runs

_WRITING = ('PUT', 'POST')


@pytest.mark.parametrize('scheme', ['s3', 'gs'])
def test_killed_while_it_saves_and_without_a_server_for_a_while_a_run_ends_with_the_same_bits(
  runs, forks, finished, tmp_path, scheme
):
  with serve(scheme) as server:
    address = server.address('killed')
    command = runs.command(address)
    environment = {**server.environment, 'TMPDIR': str(tmp_path)}
    copied, reached, go_on = [], threading.Event(), threading.Event()

    def hold(method, path):
      if method in _WRITING and 'config.json' in path:
        copied.append(process.output())
      if method in _WRITING and 'checkpoints/16/SHA256SUMS' in path:
        reached.set()
        go_on.wait(60)
        raise ConnectionError

    server.before = hold
    with runs.start(command, environment) as process:
      process.wait_until(reached.is_set, 'the last object of a checkpoint')
      error = error_of(forks(*command[1:], **environment))
      assert re.match(rf'{address} is in use by another run, process {process.pid} on ', error)
      process.send(signal.SIGKILL)
      process.wait()
    go_on.set()
    server.before = None
    assert 'compiling' not in copied[0]  # files are copied before the first step

    def away(method, path):
      if method in _WRITING and 'checkpoints/24/SHA256SUMS' in path:
        server.before = None
        threading.Thread(target=pause).start()
        raise ConnectionError

    def pause():
      server.stop()
      threading.Event().wait(2)
      server.start()

    server.before = away
    done = runs.finish(command, environment)
    assert done.returncode == 0, done.stderr
    assert f'removed the incomplete checkpoint {address}/checkpoints/16' in done.stderr
    assert f'resuming at step 8 of {STEPS}' in done.stderr
    assert f'finished: checkpoint {address}/checkpoints/{STEPS}' in done.stderr

    copy = pathlib.Path(places.local(address))
    assert_same_params(copy, finished.workdir)
    assert metrics(copy) == metrics(finished.workdir)
    names = set(Bucket(address).sizes())
    pictures = {n for n in content(finished.workdir) if n.startswith('reconstructions/')}
    assert pictures <= names
    assert 'config.json' in names
    assert not list(tmp_path.glob('hivit_jax-[0-9a-f]*'))


def test_a_finished_run_is_found_and_shows_what_it_reconstructs(runs, finished, tmp_path):
  with serve('s3') as server:
    address = server.address('finished')
    command = runs.command(address)
    environment = {**server.environment, 'TMPDIR': str(tmp_path)}
    Bucket(address).upload({n: finished.workdir / n for n in content(finished.workdir)})
    Bucket(address).delete(['lock'])
    again = runs.finish(command, environment)
    assert f'this run is finished: {address}/checkpoints/{STEPS}' in again.stderr

    picture = next((finished.workdir / 'reconstructions').iterdir())
    out = tmp_path / 'out.png'
    tool = [command[0], '-m', 'hivit_jax.tools.reconstruct', f'--workdir={address}']
    shown = runs.finish([*tool, f'--images={picture}', f'--out={out}'], environment)
    assert shown.returncode == 0, shown.stderr
    assert out.exists()
    assert not list(tmp_path.glob('hivit_jax-[0-9a-f]*'))
