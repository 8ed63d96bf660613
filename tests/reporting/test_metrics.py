"""What a run measures is in its files: one valid line a step, whatever interrupts."""

import io
import json
import os
import pathlib
import resource
import struct
import subprocess
import sys

import jax.numpy as jnp
import numpy as np
import pytest

from hivit_jax.errors import UserError
from hivit_jax.reporting.metrics import MetricWriter

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
  assert not (tmp_path / 'new').exists()


def test_an_unwritable_workdir_is_named(tmp_path):
  (tmp_path / 'file').write_text('')
  with pytest.raises(UserError, match=r'cannot write .*file.*another --workdir'):
    MetricWriter(tmp_path / 'file' / 'run')


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
  from tensorboard.compat.proto import event_pb2

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
  from tensorboard.backend.event_processing import event_accumulator

  write_steps(tmp_path, [10, 20, 30, 40], value=1.0)
  write_steps(tmp_path, [30], value=2.0, start_step=20)
  reader = event_accumulator.EventAccumulator(str(tmp_path / 'tensorboard')).Reload()
  shown = [(event.step, event.value) for event in reader.Scalars('train/loss')]
  assert shown == [(10, 1.0), (20, 1.0), (30, 2.0)]
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
