"""What a config's settings come to."""

import re
import types

import numpy as np
import pytest
from flax import nnx

from configs import base, finetune_hivit_t, mae_hivit_t, segment_hivit_t, simmim_swin_b
from hivit_jax import models
from hivit_jax.errors import UserError
from hivit_jax.interop import exporter, files
from hivit_jax.tasks import TASKS
from hivit_jax.train import assemble, inputs
from hivit_jax.train.assemble import attention, image_size, model_creator
from hivit_jax.train.initialise import initial_model
from hivit_jax.train.steps import Steps
from tests.helpers import TINY, random_model
from tests.own import dense_config

IMAGENET = Steps(1_281_167, 4096)  # an epoch is 312.8 steps


def test_epochs_are_rounded_to_steps_and_at_least_one():
  assert IMAGENET.of(300) == 93835
  assert IMAGENET.of(1e-9) == 1


@pytest.mark.parametrize('every', [1, 2.5, 7])
@pytest.mark.parametrize('keep', [100, 3])
def test_checkpoints_kept_for_ever_are_among_those_that_are_saved(every, keep):
  checkpoint = base.get_config().checkpoint
  checkpoint.update(every_epochs=every, keep_every_epochs=float(keep))
  kept = IMAGENET.between_kept(checkpoint)
  assert kept % IMAGENET.between_saves(checkpoint) == 0
  assert kept * IMAGENET.epochs_per_step == pytest.approx(max(keep, every), abs=every / 2)


def test_zero_epochs_switch_saving_and_keeping_off():
  checkpoint = base.get_config().checkpoint
  checkpoint.keep_every_epochs = 0.0
  assert IMAGENET.between_kept(checkpoint) is None
  assert IMAGENET.between_saves(checkpoint) == 313
  checkpoint.update(every_epochs=0.0, keep_every_epochs=100.0)
  assert IMAGENET.between_saves(checkpoint) is None
  assert IMAGENET.between_kept(checkpoint) is None


def test_an_image_size_may_be_one_side():
  config = base.get_config()
  config.image_size = (96,)
  assert image_size(config) == (96, 96)
  config.image_size = (96, 64)
  assert image_size(config) == (96, 64)


def _gpu(capability: str = '9.0'):
  return types.SimpleNamespace(platform='gpu', compute_capability=capability, device_kind='a GPU')


def test_attention_is_chosen_by_device():
  config = base.get_config()
  assert attention(config, [_gpu()] * 2) == 'auto'
  assert attention(config, [_gpu('7.5')]) == attention(config, [_gpu('gfx942')]) == 'xla'
  assert attention(config) == 'xla'  # here
  config.model.ops = 'plain'
  assert attention(config, [_gpu()]) == 'xla'
  config.model.update(ops='fast', dtype='float32')
  assert attention(config, [_gpu()]) == 'xla'


def test_cudnn_is_for_nvidia_gpus_only():
  config = base.get_config()
  config.model.attention = 'cudnn'
  assert attention(config, [_gpu()]) == 'cudnn'
  assert attention(config) == 'xla'  # here
  for capability in ('7.5', 'gfx942'):
    with pytest.raises(UserError, match=rf'compute capability 8\.0 or more, not {capability}'):
      attention(config, [_gpu(capability)])
  config.model.dtype = 'float32'
  with pytest.raises(UserError, match='attention=cudnn works in bfloat16 only'):
    attention(config, [_gpu()])


def test_unknown_attention():
  config = base.get_config()
  config.model.attention = 'flash'
  with pytest.raises(UserError, match='attention="flash" is not one of auto, xla, cudnn'):
    attention(config)


@pytest.mark.parametrize(
  ('in_file', 'head_std', 'kept', 'said'),
  [
    ('ant bee cat', None, ['weight', 'bias'], None),
    ('ant bee cat', 1e-5, ['bias'], r'anew.*: head\.weight \(config\.model\.head_std=1e-05\)'),
    (
      'ant bee dog',
      None,
      [],
      r'anew.*: head\.bias, head\.weight \(the file is for other classes\)',
    ),
    (
      'bee ant cat',
      1e-5,
      [],
      r'anew.*: head\.bias, head\.weight \(the file is for other classes\)',
    ),
    (
      '',
      None,
      ['weight', 'bias'],
      'has no class names but as many classes as the data, 3',
    ),
    ('', 1e-5, ['bias'], r'no class names.* though its weight is drawn anew'),
    ('ant bee', None, [], r'new, not in the file: head\.bias, head\.weight'),
  ],
)
def test_a_head_is_kept_for_the_same_classes_only(tmp_path, caplog, in_file, head_std, kept, said):
  names = in_file.split()
  count = len(names) or 3
  model = nnx.merge(*random_model('hivit_tiny', **TINY, num_classes=count))
  arrays = exporter.state_dict(model)
  files.write(tmp_path / 'x.safetensors', arrays, metadata={'class_names': names})
  config = base.get_config()
  config.task, config.image_size = 'classify', (64, 64)
  own = {key: value for key, value in TINY.items() if key != 'image_size'}
  config.model.update(name='hivit_tiny', num_classes=3, head_std=head_std, **own)
  config.init = str(tmp_path / 'x.safetensors')
  with caplog.at_level('INFO'):
    built = exporter.state_dict(initial_model(config, ('ant', 'bee', 'cat'))())
  for part in ('weight', 'bias'):
    same = np.array_equal(built[f'head.{part}'], arrays[f'head.{part}'])
    assert same == (part in kept), part
  if head_std and 'weight' not in kept and count == 3:
    assert 0 < np.abs(built['head.weight']).max() < 1e-4
  np.testing.assert_array_equal(built['fc_norm.weight'], arrays['fc_norm.weight'])
  assert (re.search(said, caplog.text) is not None) if said else 'anew' not in caplog.text


def test_older_runs_of_models_without_scan_name_it():
  config = base.get_config()
  config.image_size = (192, 192)
  config.model.update(name='simmim_swin_tiny', scan=False)
  nnx.eval_shape(model_creator(config))
  config.model.scan = True
  with pytest.raises(UserError, match='simmim_swin_tiny has no argument "scan"'):
    nnx.eval_shape(model_creator(config))


@pytest.mark.parametrize(
  'module', [mae_hivit_t, simmim_swin_b, finetune_hivit_t, segment_hivit_t, dense_config]
)
def test_a_task_says_what_its_transform_makes_of_an_example(module):
  """Plans and benchmarks rely on it: they have no data."""
  config = module.get_config('debug') if module is not dense_config else module.get_config()
  make = lambda train, **own: inputs.train_transform(config, **own)  # noqa: E731
  task = assemble.task(config, make)
  rng = np.random.default_rng(0)
  example = {
    'image': rng.integers(0, 256, (80, 90, 3), np.uint8),
    'segmentation': rng.integers(0, 3, (80, 90), np.uint8),
    'label': 3,
  }
  made = task.input(train=True)(example, rng)
  shapes = task.shapes(image_size(config), config.channels)
  assert {key: (value.shape, value.dtype) for key, value in made.items()} == {
    key: (leaf.shape, leaf.dtype) for key, leaf in shapes.items()
  }


def test_a_batch_with_batch_norm_inside_is_not_computed_in_parts():
  config = segment_hivit_t.get_config('debug')
  config.accumulate_steps = 2
  with pytest.raises(UserError, match=r'config\.accumulate_steps=2: .*whole\. BatchNorm takes its'):
    assemble.task(config)


@pytest.mark.parametrize('name', TASKS)
def test_every_task_of_the_table_is_complete(name):
  task = TASKS[name]
  assert issubclass(task.model_class, nnx.Module)
  assert any(issubclass(cls, task.model_class) for cls, _ in models.MODELS.values())
  assert task.measures <= {'evaluation', 'knn', 'pictures', 'rankme'}
  assert assemble.task_of(task.model_class) in TASKS
