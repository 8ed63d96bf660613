"""What training and evaluation begin with."""

import dataclasses
import types

import numpy as np
import pytest
from PIL import Image

from configs import finetune_hivit_t, mae_hivit_t
from hivit_jax.data.order import InOrder
from hivit_jax.errors import UserError
from hivit_jax.interop.files import StateDict
from hivit_jax.train import validate
from hivit_jax.train.setup import set_up


@pytest.fixture
def config(tmp_path):
  """A tiny finetuning on two classes, with settings that a run completes."""
  for split in ('train', 'val'):
    for name in ('ant', 'bee'):
      (tmp_path / split / name).mkdir(parents=True)
      Image.fromarray(np.zeros((4, 4, 3), np.uint8)).save(tmp_path / split / name / '1.png')
  config = finetune_hivit_t.get_config('debug')
  _use(config, tmp_path)
  return config


def _use(config, folder):
  config.data.update(name=f'folder:{folder}', train_split='train', eval_split='val')
  config.image_size = (48,)
  config.batch_size = config.evaluation.batch_size = 2
  config.knn.every_epochs = 0.0


def test_a_config_is_completed_in_a_copy_to_which_nobody_can_write(config):
  before = config.to_dict()
  setup = set_up(validate.checked(config))
  assert config.to_dict() == before
  assert before['model']['num_classes'] is None
  assert setup.config.model.num_classes == 2
  assert setup.config.image_size == (48, 48)
  for section, key in ((setup.config, 'seed'), (setup.config.model, 'num_classes')):
    with pytest.raises(AttributeError, match='immutable'):
      setattr(section, key, 3)


def test_training_learns_and_evaluates_the_same_classes(config):
  setup = set_up(validate.checked(config))
  assert setup.train_source.class_names == setup.eval_source.class_names == ('ant', 'bee')
  assert setup.class_sets == setup.sets == {'eval': setup.eval_source}
  assert setup.steps.of(1) == 1
  assert [list(batch['label']) for batch in setup.eval_batches(setup.eval_source)] == [[0, 1]]


class _InTurn:
  """The examples one after the other, the same in every epoch."""

  def example(self, position):
    return position % 2

  def replacement(self, position, rng):
    return 0

  def given(self, position, index):
    return {}


def test_order_and_transforms_are_the_tasks(config):
  setup = set_up(validate.checked(config))
  task = types.SimpleNamespace(
    order=lambda source, seed, batch_size: _InTurn(),
    eval_order=lambda source, batch_size: None,
    input=lambda train: setup.task.input(train) if train else lambda example: {'x': np.ones(3)},
  )
  own = dataclasses.replace(setup, task=task)
  with own.train_batches(0, 3) as batches:
    assert [list(batch['label']) for batch in batches] == [[0, 1]] * 3
  (batch,) = own.eval_batches(setup.eval_source)
  assert batch['x'].shape == (2, 3)
  task.eval_order = lambda source, batch_size: InOrder(1, batch_size)  # one of the two
  (batch,) = own.eval_batches(setup.eval_source)
  assert batch['mask'].tolist() == [True, False]
  (batch,) = own.eval_batches(setup.eval_source, alone=True)
  assert batch['mask'].tolist() == [True, True]


def test_pretraining_has_no_classes(config, tmp_path):
  pretraining = mae_hivit_t.get_config('debug')
  _use(pretraining, tmp_path)
  setup = set_up(validate.checked(pretraining))
  assert setup.class_sets == {}
  assert setup.config.model.num_classes is None


def test_labels_of_k_nn_agree_where_splits_have_folders_of_their_own(tmp_path):
  """No `train` folder gives the classes here: bee is 1 in one split, and 0 in the other."""
  for folder in ('a/ant', 'a/bee', 'b/bee'):
    (tmp_path / folder).mkdir(parents=True)
    Image.fromarray(np.zeros((4, 4, 3), np.uint8)).save(tmp_path / folder / '1.png')
  pretraining = mae_hivit_t.get_config('debug')
  _use(pretraining, tmp_path)
  pretraining.data.update(train_split='a', eval_split='b')
  pretraining.knn.every_epochs = 1.0
  setup = set_up(validate.checked(pretraining))
  assert setup.eval_source.class_names == setup.train_source.class_names == ('ant', 'bee')
  assert [setup.eval_source[i]['label'] for i in range(len(setup.eval_source))] == [1]
  (tmp_path / 'b/bee').rename(tmp_path / 'b/cow')
  with pytest.raises(UserError, match=r'what differs: ant, bee, cow; .*--config\.data\.eval_split'):
    set_up(validate.checked(pretraining))


@pytest.mark.parametrize('every', [0.0, 1.0])
def test_an_evaluation_has_the_classes_of_the_weights_and_a_bank_for_k_nn_only(config, every):
  config.knn.every_epochs = every
  names = ['cat', 'bee', 'ant']
  weights = StateDict({'head.weight': np.zeros((3, 8))}, 'FILE', {'class_names': names})
  setup = set_up(validate.checked(config), evaluated=weights)
  labelled = setup.class_sets['eval']
  assert list(labelled.class_names) == names
  assert [labelled[i]['label'] for i in (0, 1)] == [
    {'ant': 2, 'bee': 1}[setup.eval_source.example_name(i).split('/')[-2]] for i in (0, 1)
  ]
  assert setup.config.model.num_classes == 3
  assert (setup.train_source is None) == (not every)


def test_weights_without_a_head_are_not_compared_with_classes(config):
  setup = set_up(validate.checked(config), evaluated=StateDict({}, 'FILE', {}))
  assert setup.class_sets == {}


def test_what_does_not_fit_the_devices_or_the_task_is_said_before_data_are_looked_for(config):
  config.data.name = 'folder:/nowhere'
  config.mesh.fsdp = 7
  with pytest.raises(UserError, match=r'config\.mesh\.fsdp=7'):
    set_up(validate.checked(config))
  config.mesh.fsdp = 1
  config.model.name = 'mae_hivit_tiny'
  with pytest.raises(UserError, match='is not a classifier'):
    set_up(validate.checked(config))
