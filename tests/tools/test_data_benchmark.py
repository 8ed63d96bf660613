"""The input benchmark: every side is measured, and reported in either form."""

import importlib.util
import json

import pytest

from hivit_jax.data.transforms import train_transform
from hivit_jax.errors import UserError
from hivit_jax.tools import data_benchmark, photographs, pipelines_beside

TINY = {'images': 65, 'repeats': 2, 'size': 64, 'segmented': 96, 'num_threads': 2}
MAIN = TINY | {'detected': 2, 'banded': 2, 'large': 1}


@pytest.fixture
def python(tmp_path):
  """Makes an executable that answers as a shell script says."""

  def make(script: str) -> str:
    path = tmp_path / 'python'
    path.write_text(f'#!/bin/sh\n{script}\n')
    path.chmod(0o755)
    return str(path)

  return make


def test_photographs_are_jpeg_files_of_imagenet_like_size():
  for file in photographs.photo_files():
    assert file.startswith(b'\xff\xd8')
    assert 30_000 < len(file) < 300_000


def test_report_and_table_have_every_side_per_core_and_by_the_clock(capsys, python):
  other = python("""echo '"ready"'; while read images; do echo '{"cpu": 2.0, "wall": 1.0}'; done""")
  report = data_benchmark.main(as_json=True, beside=other, **MAIN)
  _check_table(data_benchmark.format_all(report))
  assert json.loads(capsys.readouterr().out) == report
  assert report['images_per_turn'] == 128  # Whole batches.
  for side in ('bare', 'pipeline', 'supervised', 'bare_segmentation', 'segmentation'):
    assert report[side]['images_per_second_per_core'] > 10
    assert report[side]['images_per_second'] > 10
  found = report['detection']
  assert found['ms'].keys() == {'decode', 'rasterise', 'geometry', 'arrays'}
  assert min(found['ms'].values()) > 0
  assert found['cores'] == pytest.approx(found['ms_per_image'] * 8 * 30 / 1000)
  assert min(report['bands']['ms'].values()) > 0
  assert report['tf.data'] == {'images_per_second_per_core': 64.0, 'images_per_second': 128.0}
  large = report['large']['ms']['4000x3000']
  assert 0 < large['reduced'] < large['whole']
  # A loose bound for a loaded machine: the sides did the same amount of the same work.
  assert 0.4 < report['pipeline']['kept'] < 1.5
  assert 0.4 < report['supervised']['kept'] < 1.5
  assert 0.3 < report['segmentation']['kept'] < 1.5


def _check_table(table: str) -> None:
  """The targets and what was measured are named."""
  for expected in (
    'bare decode + resize',
    'supervised pipeline',
    'of bare; target: 85% per core',
    'of pipeline; target: 70% per core',
    'of bare segmentation; target: 50% per core',
    'for segmentation to 96x96',
    '2 threads',
    'masks from polygons',
    '8 GPUs at 30 images/s each (assumed) need',
    '.npy, 13 channels of 16 bits',
    '8 GPUs at 5000 images/s each would need',
    '4000x3000',
    'torchvision, DataLoader',
  ):
    assert expected in table


def test_supervised_side_is_the_published_augmentation(monkeypatch):
  made = []
  monkeypatch.setattr(
    data_benchmark,
    'train_transform',
    lambda *a, **k: made.append(train_transform(*a, **k)) or made[-1],
  )
  data_benchmark.measure(**TINY | {'images': 1, 'repeats': 1})
  kinds = [[type(step).__name__ for step in transform.steps] for transform in made]
  assert kinds == [
    ['RandomResizedCrop', 'RandomFlip'],
    ['RandomResizedCrop', 'RandomFlip', 'RandAugment'],
  ]


def test_missing_photographs_are_a_user_error(monkeypatch):
  monkeypatch.setattr(importlib.util, 'find_spec', lambda name: None)
  with pytest.raises(UserError, match='pip install scikit-image'):
    photographs.photo_files()


@pytest.mark.parametrize('script', ['exit 1', None])
def test_a_python_that_cannot_run_the_others_is_a_user_error(script, python, tmp_path):
  name = python(script) if script else str(tmp_path / 'none')
  with pytest.raises(UserError, match=f'--beside={name}: '), pipelines_beside.started(name, [], 1):
    pass
