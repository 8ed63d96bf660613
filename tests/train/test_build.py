"""What a config's settings come to."""

import types

import pytest

from configs import base
from hivit_jax.errors import UserError
from hivit_jax.train.build import Steps, attention, image_size

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


def test_cudnn_is_for_nvidia_gpus_only():
  config = base.get_config()
  gpu = types.SimpleNamespace(platform='gpu', compute_capability='9.0', device_kind='NVIDIA H200')
  assert attention(config, gpu) == 'xla'
  config.model.attention = 'cudnn'
  assert attention(config, gpu) == 'cudnn'
  assert attention(config) == 'xla'  # here
  for capability in ('7.5', 'gfx942'):
    other = types.SimpleNamespace(**vars(gpu) | {'compute_capability': capability})
    with pytest.raises(UserError, match=rf'compute capability 8\.0 or more, not {capability} '):
      attention(config, other)
  config.model.dtype = 'float32'
  with pytest.raises(UserError, match='attention=cudnn computes in bfloat16 only'):
    attention(config, gpu)
  config.model.attention = 'flash'
  with pytest.raises(UserError, match='attention="flash" is not one of xla, cudnn'):
    attention(config)
