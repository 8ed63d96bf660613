"""What a continued run says of settings that have changed."""

import pytest

from hivit_jax.train import resume
from hivit_jax.train.checkpoint import Restored
from hivit_jax.train.steps import Steps


@pytest.mark.parametrize(
  ('buckets', 'changes', 'warned'),
  [
    (False, {'detect.long_side': (64, 96)}, False),
    (False, {'detect.long_side': (64, 96), 'detect.buckets': ([[96, 96]], [])}, True),
    (True, {'detect.long_side': (64, 96)}, True),
    (True, {'detect.objects': (4, 5)}, False),
    (False, {'seed': (0, 1)}, True),
  ],
)
def test_augmentation_decides_the_order_of_images_only_with_buckets(
  caplog, buckets, changes, warned
):
  restored = Restored(3, None, {'examples': 32, 'epoch': 1.5})
  resume.warn_of_changes(restored, changes, Steps(32, 16), total=8, bucketed=buckets)
  assert ('THE ORDER OF IMAGES CHANGES' in caplog.text) == warned
  assert 'changed since this run was started' in caplog.text
