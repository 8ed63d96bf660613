"""The input benchmark: both sides are measured, and reported in either form."""

import importlib.util
import json

import pytest

from hivit_jax.data import benchmark
from hivit_jax.errors import UserError

TINY = {'images': 65, 'repeats': 2, 'size': 64, 'num_threads': 2}


def test_photographs_are_jpeg_files_of_imagenet_like_size():
  for file in benchmark.photo_files():
    assert file.startswith(b'\xff\xd8')
    assert 30_000 < len(file) < 300_000


def test_report_has_both_sides_per_core_and_by_the_clock(capsys):
  report = benchmark.main(as_json=True, **TINY)
  assert json.loads(capsys.readouterr().out) == report
  assert report['images_per_turn'] == 128  # Whole batches.
  for side in ('bare', 'pipeline'):
    assert report[side]['images_per_second_per_core'] > 10
    assert report[side]['images_per_second'] > 10
  # A loose bound for a loaded machine: both sides did the same amount of the same work.
  assert 0.4 < report['kept'] < 1.5


def test_table_names_the_target_and_what_was_measured(capsys):
  benchmark.main(**TINY)
  table = capsys.readouterr().out
  for expected in ('bare decode + resize', 'pipeline', 'target: 85% per core', '2 threads'):
    assert expected in table


def test_missing_photographs_are_a_user_error(monkeypatch):
  monkeypatch.setattr(importlib.util, 'find_spec', lambda name: None)
  with pytest.raises(UserError, match='pip install scikit-image'):
    benchmark.photo_files()
