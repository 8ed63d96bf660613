"""Loaders: what is seen depends on seed and position only, and nothing is lost in silence."""

import logging
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import textwrap
import threading
import time

import jax
import numpy as np
import pytest

from hivit_jax.data import stream, transforms
from hivit_jax.data.builders.digits import Digits
from hivit_jax.data.loader import eval_loader, train_loader
from hivit_jax.data.sources.base import open_source
from hivit_jax.errors import UserError
from tests import patience
from tests.data.in_memory import MemorySource, fail_on_30, stamp
from tests.patience import wait_until

evaluate = transforms.EvalTransform((8, 8))


def shown(batch) -> np.ndarray:
  """The index that the pixels show."""
  red, green, _ = batch['image'][:, 4, 4].astype(int).T
  return red + 256 * green


def take(loader, count: int) -> list[dict]:
  with loader:
    return [next(loader) for _ in range(count)]


def assert_same(actual: list[dict], expected: list[dict]) -> None:
  assert len(actual) == len(expected)
  for left, right in zip(actual, expected, strict=True):
    assert left.keys() == right.keys()
    for key in left:
      assert left[key].dtype == right[key].dtype
      np.testing.assert_array_equal(left[key], right[key])


def concatenated(hosts: list[list[dict]]) -> list[dict]:
  return [
    {key: np.concatenate([batch[key] for batch in step]) for key in step[0]}
    for step in zip(*hosts, strict=True)
  ]


# The training stream.


def test_batches_are_uint8_images_with_their_own_int32_labels():
  batch = take(train_loader(MemorySource(300), stamp, batch_size=40, seed=0), 1)[0]
  assert batch.keys() == {'image', 'label'}
  assert (batch['image'].dtype, batch['image'].shape) == (np.uint8, (40, 8, 8, 3))
  assert (batch['label'].dtype, batch['label'].shape) == (np.int32, (40,))
  np.testing.assert_array_equal(shown(batch), batch['label'])


def test_a_batch_that_is_kept_stays_as_it_was():
  """On a CPU, JAX may use a batch where it lies: its memory must never be filled again."""
  with train_loader(MemorySource(300), stamp, batch_size=40, seed=0) as loader:
    kept = [next(loader)]
    copy = {key: array.copy() for key, array in kept[0].items()}
    on_device = jax.device_put(kept[0])
    kept += [next(loader) for _ in range(6)]
  assert_same(kept[:1], [copy])
  assert_same([{key: np.asarray(array) for key, array in on_device.items()}], [copy])
  assert not any(np.shares_memory(kept[0]['image'], batch['image']) for batch in kept[1:])


def test_each_epoch_is_another_permutation_of_all_examples_across_batch_borders():
  batches = take(train_loader(MemorySource(50), stamp, batch_size=40, seed=0), 5)
  epochs = np.concatenate([batch['label'] for batch in batches]).reshape(4, 50)
  np.testing.assert_array_equal(np.sort(epochs), np.tile(np.arange(50), (4, 1)))
  # Two unrelated permutations of 50 agree in one place on average.
  for first, second in ((0, 1), (1, 2), (2, 3), (0, 3)):
    assert (epochs[first] == epochs[second]).sum() < 10


def test_seeds_give_unrelated_orders_and_augmentations():
  first, second = (
    np.concatenate([b['label'] for b in take(loader, 4)]).reshape(2, 50)
    for loader in (
      train_loader(MemorySource(50), stamp, batch_size=25, seed=seed) for seed in (0, 1)
    )
  )
  assert (first[0] == second[0]).sum() < 10
  assert (first[1] == second[0]).sum() < 10  # Seed and epoch do not add up, either.


def test_an_example_is_augmented_differently_in_each_epoch():
  batches = take(train_loader(MemorySource(10), stamp, batch_size=10, seed=0), 2)
  stamps = [batch['image'][np.argsort(batch['label']), 0, 0] for batch in batches]
  assert (stamps[0] != stamps[1]).any(-1).all()


@pytest.mark.parametrize(
  'options', [{'num_threads': 0}, {'num_threads': 1}, {'num_threads': 5}, {'prefetch': 0}]
)
def test_threads_and_prefetching_change_nothing(options):
  source = MemorySource(90, broken=[3, 50], gone=[7])
  settings = {'batch_size': 80, 'seed': 5, 'max_broken_fraction': 0.1}
  expected = take(train_loader(source, stamp, num_threads=2, **settings), 4)
  assert_same(take(train_loader(source, stamp, **settings, **options), 4), expected)


def test_size_of_the_chunks_changes_nothing(monkeypatch):
  source = MemorySource(90)
  expected = take(train_loader(source, stamp, batch_size=80, seed=5), 4)
  monkeypatch.setattr(stream, 'CHUNK_ROWS', 7)
  assert_same(take(train_loader(source, stamp, batch_size=80, seed=5), 4), expected)


@pytest.mark.parametrize('hosts', [2, 5])
def test_hosts_together_see_the_batches_of_one_host(hosts):
  source = MemorySource(70, broken=[3])
  settings = {'batch_size': 80, 'seed': 5, 'max_broken_fraction': 0.1}
  expected = take(train_loader(source, stamp, **settings), 3)
  parts = [
    take(train_loader(source, stamp, process_index=i, process_count=hosts, **settings), 3)
    for i in range(hosts)
  ]
  assert all(batch['label'].shape == (80 // hosts,) for part in parts for batch in part)
  assert_same(concatenated(parts), expected)


def test_restart_continues_exactly_and_reads_nothing_of_what_went_before():
  source = MemorySource(90)
  expected = take(train_loader(source, stamp, batch_size=32, seed=5), 9)[6:]
  assert_same(take(train_loader(source, stamp, batch_size=32, seed=5, start_step=6), 3), expected)
  source = MemorySource(90)  # threads of the loaders above may still read from the other one
  far = train_loader(source, stamp, batch_size=32, seed=5, start_step=10**9, num_threads=0)
  assert len(take(far, 1)[0]['label']) == len(source.reads) == 32


def test_ends_after_num_steps_and_reads_no_more_than_that():
  source = MemorySource(64)
  loader = train_loader(source, stamp, batch_size=32, seed=5, start_step=2, num_steps=3)
  assert len(list(loader)) == 3
  assert next(loader, None) is None
  assert set(source.reads) == set(range(64))
  assert len(source.reads) == 96
  assert list(train_loader(source, stamp, batch_size=32, seed=5, num_steps=0)) == []


def test_greyscale_batches_have_one_channel():
  transform = transforms.train_transform(16, channels=1)
  loader = train_loader(MemorySource(20), transform, batch_size=4, seed=0)
  assert take(loader, 1)[0]['image'].shape == (4, 16, 16, 1)


@pytest.mark.parametrize(
  ('options', 'message'),
  [
    ({'batch_size': 30, 'process_count': 4}, r'batch_size=30 .* 4 hosts; take 28 or 32\.'),
    ({'batch_size': 3, 'process_count': 4}, r'take 4\.'),
    ({'batch_size': 0}, 'batch_size=0'),
    ({'process_index': 2, 'process_count': 2}, 'process_index=2: expected 0 to 1'),
    ({'seed': -1}, 'seed=-1'),
    ({'start_step': -1}, 'start_step=-1'),
    ({'num_workers': -1}, 'num_workers=-1'),
    ({'max_broken_fraction': 1.5}, 'max_broken_fraction=1.5'),
    ({'source': MemorySource(0)}, r'memory \(train\) has no examples'),
  ],
)
def test_senseless_options_are_user_errors(options, message):
  settings = {'source': MemorySource(4), 'batch_size': 4, 'seed': 0} | options
  with pytest.raises(UserError, match=message):
    train_loader(transform=stamp, **settings)


# Evaluation.


@pytest.mark.parametrize('hosts', [1, 2, 8])
@pytest.mark.parametrize('length', [1, 64, 150])
def test_evaluation_sees_every_example_once_in_batches_of_one_shape(length, hosts):
  source = MemorySource(length)
  parts = [
    list(eval_loader(source, evaluate, batch_size=64, process_index=i, process_count=hosts))
    for i in range(hosts)
  ]
  assert {len(part) for part in parts} == {-(-length // 64)}
  for batch in concatenated(parts):
    assert batch.keys() == {'image', 'label', 'mask', 'index'}
    assert {len(value) for value in batch.values()} == {64}
    assert (batch['mask'].dtype, batch['index'].dtype) == (bool, np.int32)
    seen = batch['mask']
    np.testing.assert_array_equal(seen, batch['index'] >= 0)
    np.testing.assert_array_equal(shown(batch)[seen], batch['index'][seen])
    np.testing.assert_array_equal(batch['label'][seen], batch['index'][seen])
    assert not batch['image'][~seen].any()
  indices = np.concatenate([b['index'][b['mask']] for b in concatenated(parts)])
  np.testing.assert_array_equal(indices, np.arange(length))


def test_evaluation_masks_broken_examples_and_reports_them():
  source = MemorySource(200, broken=[5, 70], gone=[199])
  with eval_loader(source, evaluate, batch_size=64, max_broken_fraction=0.1) as loader:
    batches = concatenated([list(loader)])
  mask, index = (np.concatenate([b[key] for b in batches]) for key in ('mask', 'index'))
  assert index[~mask].tolist() == [5, 70, 199] + [-1] * 56
  assert sorted(loader.broken) == [5, 70, 199]
  assert loader.broken[70].startswith('thing/70.png (not an image')


# Broken files.


def test_broken_examples_are_replaced_by_others_and_logged_once_by_name(caplog):
  source = MemorySource(100, broken=[11], gone=[42])
  loader = train_loader(source, stamp, batch_size=50, seed=0, max_broken_fraction=0.02)
  with caplog.at_level(logging.WARNING):
    epochs = np.stack([b['label'] for b in take(loader, 6)]).reshape(3, 100)
  for epoch in epochs:
    assert set(range(100)) - set(epoch.tolist()) == {11, 42}
  assert len({tuple(sorted(epoch)) for epoch in epochs}) == 3  # Not the same stand-ins each time.
  lines = [record.getMessage() for record in caplog.records]
  assert len(lines) == 2
  assert any(re.search(r'replaced by another: thing/11\.png \(not an image', x) for x in lines)
  assert any(re.search(r'thing/42\.png \(cannot be read: .*No such file', x) for x in lines)
  assert sorted(loader.broken) == [11, 42]


def test_file_that_disappears_while_training_counts_as_broken():
  source = MemorySource(32)
  loader = train_loader(source, stamp, batch_size=32, seed=0, num_threads=0)
  with loader:
    assert 9 in next(loader)['label']
    source.gone.add(9)
    assert 9 not in next(loader)['label']
  assert list(loader.broken) == [9]


def test_many_good_epochs_do_not_excuse_files_that_disappear_afterwards():
  source = MemorySource(32)
  settings = {'batch_size': 32, 'seed': 0, 'num_threads': 0, 'max_broken_fraction': 0.1}
  with train_loader(source, stamp, **settings) as loader:
    for _ in range(20):
      next(loader)
    source.gone.update(range(4))
    with pytest.raises(UserError, match='4 of the 32 examples'):
      next(loader)


def test_damaged_record_of_a_prepared_data_set_counts_as_broken(tmp_path):
  open_source('digits', 'train', str(tmp_path))
  (shard,) = tmp_path.glob('digits/*/*train*array_record*')
  data = bytearray(shard.read_bytes())
  middle = len(data) // 2
  data[middle : middle + 1000] = bytes(1000)
  shard.write_bytes(data)
  source = open_source('digits', 'train', str(tmp_path))
  with eval_loader(source, evaluate, batch_size=256) as loader:
    seen = sum(batch['mask'].sum() for batch in loader)
  assert 1 <= len(loader.broken) <= 10
  assert seen == len(source) - len(loader.broken)
  index, reason = next(iter(loader.broken.items()))
  assert reason.startswith(f'digits/train[{index}]')
  assert 'cannot be read: Corrupted' in reason


def test_a_shard_that_is_cut_off_while_it_is_open_counts_as_broken(tmp_path):
  source = open_source('digits', 'train', str(tmp_path))
  (shard,) = tmp_path.glob('digits/*/*train*array_record*')
  assert source[0]['image']
  os.truncate(shard, 0)
  with pytest.raises(UserError, match=r'broken.*digits/train\[\d+\] \(.*its file was truncated'):
    list(train_loader(source, stamp, batch_size=32, seed=0))


def test_of_a_shard_that_disappears_what_is_open_is_read_and_the_rest_is_broken(tmp_path):
  Digits(data_dir=tmp_path, examples_per_shard=721).download_and_prepare()
  shards = sorted(tmp_path.glob('digits/*/*train*array_record*'))
  assert len(shards) == 2
  source = open_source('digits', 'train', str(tmp_path))
  label = source[0]['label']
  for shard in shards:
    shard.unlink()
  assert source[0]['label'] == label  # the first shard is open
  with pytest.raises(UserError) as error:
    list(train_loader(source, stamp, batch_size=32, seed=0))
  named = {int(i) for i in re.findall(r'digits/train\[(\d+)\] \(', str(error.value))}
  assert min(named) >= 721
  assert f'No such file or directory; opening {shards[1]}' in str(error.value)


def test_too_many_broken_examples_stop_the_run_with_their_names():
  bad = list(range(0, 2000, 50))  # 2 %
  loader = train_loader(MemorySource(2000, broken=bad), stamp, batch_size=100, seed=0)
  with pytest.raises(UserError) as caught:
    take(loader, 20)
  message = str(caught.value)
  named = {int(x) for x in re.findall(r'thing/(\d+)\.png \(not an image', message)}
  assert len(named) == len(loader.broken) == 11  # One more than 1 % of the first thousand.
  assert named <= set(bad)
  assert re.match(r'11 of the \d+ examples of memory \(train\) seen so far are broken', message)
  assert 'more than max_broken_fraction=0.01 allows' in message
  assert '\n' not in message
  assert next(loader, None) is None


@pytest.mark.parametrize(('broken', 'fraction'), [([1], 0.001), (range(20), 0.5), (range(10), 0.1)])
def test_as_many_broken_examples_as_allowed_stop_nothing(broken, fraction):
  source = MemorySource(100, broken=broken)
  settings = {'batch_size': 20, 'seed': 0, 'max_broken_fraction': fraction}
  assert len(take(train_loader(source, stamp, **settings), 30)) == 30


def test_fraction_zero_stops_at_the_first_broken_example():
  source = MemorySource(100, broken=[99])
  with pytest.raises(UserError, match=r'thing/99\.png'):
    list(eval_loader(source, evaluate, batch_size=20, max_broken_fraction=0))


def test_source_in_which_nothing_is_readable_stops_the_run_even_if_all_may_be_broken():
  source = MemorySource(30, gone=range(30))
  loader = train_loader(source, stamp, batch_size=8, seed=0, max_broken_fraction=1)
  with pytest.raises(UserError, match=r'100 examples of memory .* are all broken: .* 80 more'):
    next(loader)


def test_long_list_of_broken_examples_is_cut():
  source = MemorySource(200, broken=range(100))
  with pytest.raises(UserError, match=r'thing/19\.png \(.*\), and \d+ more\.$'):
    list(eval_loader(source, evaluate, batch_size=200, max_broken_fraction=0.1))


# Errors and the end of things.


def prefetch_threads() -> list[str]:
  return [t.name for t in threading.enumerate() if t.name.startswith(('grain-prefetch', 'joining'))]


def test_error_in_a_transform_surfaces_with_the_name_of_the_example():
  loader = train_loader(MemorySource(50), fail_on_30, batch_size=50, seed=0)
  with pytest.raises(RuntimeError, match=r'thing/30\.png: LookupError: .*no such colour') as caught:
    next(loader)
  assert isinstance(caught.value.__cause__, LookupError)
  assert wait_until(lambda: not prefetch_threads(), seconds=20)


def test_close_ends_the_threads_and_the_iterator():
  loader = train_loader(MemorySource(50), stamp, batch_size=50, seed=0, num_threads=3)
  next(loader)
  assert prefetch_threads()
  loader.close()
  loader.close()
  assert next(loader, None) is None
  assert wait_until(lambda: not prefetch_threads(), seconds=20)


def test_forgotten_loader_ends_its_threads():
  next(train_loader(MemorySource(50), stamp, batch_size=50, seed=0))
  assert wait_until(lambda: not prefetch_threads(), seconds=20)


def test_closing_does_not_wait_for_data_that_never_come():
  class Hanging(MemorySource):
    released = threading.Event()

    def __getitem__(self, index: int) -> dict:
      self.released.wait()
      return super().__getitem__(index)

  source = Hanging(50)
  loader = train_loader(source, stamp, batch_size=50, seed=0)
  start = time.monotonic()
  loader.close()
  assert time.monotonic() - start < patience.limit(10)
  assert next(loader, None) is None
  source.released.set()
  assert wait_until(lambda: not prefetch_threads(), seconds=20)


# Worker processes.


@pytest.mark.slow
@pytest.mark.parametrize('workers', [1, 2])
def test_worker_processes_change_nothing_and_report_what_is_broken(workers, caplog):
  source = MemorySource(90, broken=[3, 50], gone=[7])
  settings = {'batch_size': 80, 'seed': 5, 'max_broken_fraction': 0.1}
  expected = take(train_loader(source, stamp, start_step=3, num_steps=4, **settings), 4)
  caplog.clear()
  with train_loader(
    source, stamp, start_step=3, num_steps=4, num_workers=workers, **settings
  ) as loader:
    assert_same(list(loader), expected)
  assert sorted(loader.broken) == [3, 7, 50]
  assert len(caplog.records) == 3
  assert wait_until(lambda: not multiprocessing.active_children(), seconds=20)


def test_error_in_a_worker_process_surfaces_with_its_message_and_traceback():
  loader = train_loader(MemorySource(50), fail_on_30, batch_size=50, seed=0, num_workers=1)
  with pytest.raises(RuntimeError, match=r'thing/30\.png: LookupError: .*no such colour') as caught:
    next(loader)
  assert 'in fail_on_30' in caught.value.__notes__[0]
  assert wait_until(lambda: not multiprocessing.active_children(), seconds=20)


def test_killed_worker_process_is_an_error_and_no_deadlock():
  loader = train_loader(MemorySource(50), stamp, batch_size=50, seed=0, num_workers=1)
  next(loader)
  os.kill(multiprocessing.active_children()[0].pid, signal.SIGKILL)
  with pytest.raises(UserError, match=r'worker process was killed \(exit code -9; .* same command'):
    take(loader, 100)


def test_worker_processes_that_cannot_start_are_a_line_with_the_way_out():
  class Ended:
    def __next__(self):
      raise RuntimeError('Worker process was terminated unexpectedly with exit code 1. Search')

    def close(self):
      pass

  loader = train_loader(MemorySource(50), stamp, batch_size=50, seed=0, num_threads=0)
  loader._running[0] = Ended()
  with pytest.raises(UserError, match=r'__main__.*--config\.data\.num_workers=0'):
    next(loader)


SCRIPT = """
  import os, signal, sys, time
  from hivit_jax.data.loader import train_loader
  from tests.data.in_memory import MemorySource, fail_on_30, stamp

  if __name__ == '__main__':
    signals = []
    for number in (signal.SIGINT, signal.SIGTERM):
      signal.signal(number, lambda number, frame: signals.append(number))
    settings = {'batch_size': 50, 'seed': 0, 'num_workers': 2}
    loader = train_loader(MemorySource(50), stamp, **settings)
    next(loader)
    print('ready', flush=True)
    while len(signals) < 2:
      time.sleep(0.01)
    for _ in range(20):
      next(loader)
    loader.close()
    settings['num_workers'] = 1
    forgotten = train_loader(MemorySource(50), stamp, **settings)
    next(forgotten)
    try:
      list(train_loader(MemorySource(50), fail_on_30, **settings))
    except RuntimeError as error:
      kept = error
    for batch in train_loader(MemorySource(50), stamp, num_steps=2, **settings):
      pass
    print('done', flush=True)
"""


@pytest.fixture
def script(tmp_path):
  """A training script with workers, running, after its first batch."""
  path = tmp_path / 'script.py'
  path.write_text(textwrap.dedent(SCRIPT))
  process = subprocess.Popen(
    [sys.executable, path],
    env=os.environ | {'PYTHONPATH': os.pathsep.join(sys.path)},
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
    start_new_session=True,
  )
  with process:
    assert process.stdout.readline() == 'ready\n'
    yield process
    process.kill()


@pytest.mark.slow
def test_workers_outlive_signals_to_the_group_and_a_script_ends_without_a_sound(script):
  os.killpg(script.pid, signal.SIGINT)
  os.killpg(script.pid, signal.SIGTERM)
  assert script.communicate(timeout=patience.limit(120)) == ('done\n', '')
  assert script.returncode == 0


def test_workers_end_with_a_killed_parent(script):
  os.kill(script.pid, signal.SIGKILL)
  # The workers share its output: this waits for them.
  script.communicate(timeout=patience.limit(60))


def test_data_path_imports_no_model_and_no_training_code():
  code = (
    'import sys, hivit_jax.data.loader, hivit_jax.data.transforms;'
    "print([m for m in sys.modules if m.startswith('hivit_jax.') and 'data' not in m])"
  )
  done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True)
  assert done.stdout == "['hivit_jax.errors', 'hivit_jax.settings']\n"
