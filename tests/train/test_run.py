"""What stands around a run."""

import logging
import re

import jax
import jax.numpy as jnp
import pytest

from configs import demo
from hivit_jax.errors import UserError
from hivit_jax.train import evaluation, run


def test_full_memory_is_told_with_the_ways_out():
  message = 'a device ran out of memory: .*allocating 40+ bytes.*what helps: (.*); '
  with (
    pytest.raises(UserError, match=message) as error,
    run._told_of_full_memory(demo.get_config()),
  ):
    jnp.zeros(10**15).block_until_ready()
  assert re.search(message, str(error.value))[1] == (
    '--config.accumulate_steps=2, --config.model.remat=True, --config.batch_size=16, '
    '--config.evaluation.batch_size=128, more devices'
  )


def test_results_are_in_the_run_or_in_the_current_directory(tmp_path, monkeypatch, caplog):
  """Weights outside a run, such as mmdetection's files, leave results as well."""
  (tmp_path / 'run' / 'checkpoints').mkdir(parents=True)
  monkeypatch.chdir(tmp_path)
  for path, expected in (('run', 'run/results'), ('epoch_36.pth', 'results')):
    context = evaluation.EvaluationContext(None, None, results=run._place_of_results(path))
    with caplog.at_level(logging.INFO):
      context.store('eval_boxes.json', '[]')
    file = tmp_path / expected / 'eval_boxes.json'
    assert file.read_text() == '[]\n'
    assert caplog.records[-1].getMessage().startswith('results: ')
    assert caplog.records[-1].getMessage().endswith(f'{expected}/eval_boxes.json')


def test_other_errors_of_jax_are_left_as_they_are():
  with pytest.raises(jax.errors.JaxRuntimeError), run._told_of_full_memory(None):
    raise jax.errors.JaxRuntimeError('INTERNAL: something else')
