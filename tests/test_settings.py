"""Forms in which settings come."""

import ml_collections
import numpy as np
import pytest

from hivit_jax import settings
from hivit_jax.errors import UserError


@pytest.mark.parametrize(
  'value', [(64, 96), [64, 96], '64x96', '64,96', (np.int64(64), 96)], ids=repr
)
def test_both_sides_come_as_numbers_or_text(value):
  assert settings.image_size(value, 'image_size') == (64, 96)


@pytest.mark.parametrize('value', [64, '64', (64,), [64], np.int32(64)], ids=repr)
def test_one_side_is_both(value):
  size = settings.image_size(value, 'image_size')
  assert size == (64, 64)
  assert all(type(side) is int for side in size)


@pytest.mark.parametrize(
  'value', [0, -16, 64.0, None, '', 'x', '64x', '64X64', (), (64, 64, 3), (64, 'a'), (64, 0)],
  ids=repr,
)  # fmt: skip
def test_what_is_no_size_is_named_with_its_setting(value):
  with pytest.raises(UserError) as error:
    settings.image_size(value, '--image_size')
  assert str(error.value) == f'--image_size={value}: expected a side or (height, width), in pixels'


def test_dotted_keys_reach_every_value():
  nested = {'a': 1, 'b': {'c': None, 'd': {'e': (2, 3)}}, 'empty': {}}
  flat = {'a': 1, 'b.c': None, 'b.d.e': (2, 3), 'empty': {}}
  assert settings.dotted(nested) == flat
  config = ml_collections.ConfigDict(nested)
  assert settings.dotted(config).keys() == flat.keys()
  assert settings.get(config, 'b.d.e') == settings.get(nested, 'b.d.e') == (2, 3)


@pytest.mark.parametrize(
  ('text', 'expected'),
  [
    ('package.module:Name', True),
    ('module:Name', True),
    ('cifar10', False),
    ('cifar10:3.0.2', False),
    ('cifar10:3.*.*', False),
    ('name/config:1.0.0', False),
    ('folder:/path', False),
    ('package.module', False),
    ('package..module:Name', False),
    ('package.module:Name.more', False),
  ],
)
def test_what_names_something_in_a_module(text, expected):
  assert settings.is_imported(text) == expected


def test_what_is_imported_is_the_thing_itself():
  assert settings.imported('hivit_jax.errors:UserError', 'config.x') is UserError
  with pytest.raises(UserError, match=r'^config\.x=hivit_jax\.errors:UsrError: .* did you mean'):
    settings.imported('hivit_jax.errors:UsrError', 'config.x')
