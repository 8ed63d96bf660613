"""Training from Python."""

import os
import pathlib
import tomllib

import pytest

import hivit_jax
from configs import demo
from hivit_jax.errors import UserError
from hivit_jax.train import launch

ROOT = pathlib.Path(__file__).parents[2]


@pytest.fixture
def started(monkeypatch):
  """What `run` hands over to training, which does not begin."""
  calls = []
  monkeypatch.setattr(launch.compilation_cache, 'turn_on', lambda: None)
  monkeypatch.setattr(launch.runs, 'train', lambda *arguments: calls.append(arguments))
  return calls


def test_a_recipe_by_name_with_settings(started, tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  settings = {'optim.lr': 1, 'image_size': [32, 64], 'init': None}
  assert hivit_jax.run('demo:finetune', 'own', settings) == tmp_path / 'own'
  [(config, workdir, given)] = started
  expected = demo.get_config('finetune')
  expected.update_from_flattened_dict({'optim.lr': 1.0, 'image_size': (32, 64), 'init': None})
  assert config.to_dict() == expected.to_dict()
  assert workdir == os.path.join(tmp_path, 'own')
  assert set(given) == set(settings)


def test_a_config_stays_as_it_is(started, tmp_path):
  config = demo.get_config()
  hivit_jax.run(config, tmp_path, {'seed': 7})
  assert started[0][0].seed == 7
  assert config.to_dict() == demo.get_config().to_dict()


def test_a_workdir_in_a_bucket(started):
  assert hivit_jax.run('demo', 'gs://bucket/runs/demo') == 'gs://bucket/runs/demo'
  assert started[0][1] == 'gs://bucket/runs/demo'


@pytest.mark.parametrize(
  ('config', 'overrides', 'message'),
  [
    (
      'mae_hivit_bb',
      {},
      r'no recipe "mae_hivit_bb" \(did you mean "mae_hivit_b"\?\); known: .*demo, ',
    ),
    ('base', {}, 'there is no recipe "base"'),
    ('demo:none', {}, 'unknown variant ":none"; known: finetune'),
    ('demo', {'optim.lrr': 1.0}, r'^optim.lrr: config.optim has no setting "lrr" \(did you mean'),
    ('demo', {'batch_size': 'many'}, "^batch_size='many': expected int such as 32"),
    ('demo', {'optim': 1}, '^optim=1: this is a section; give optim.'),
    (7, {}, 'config is of type int: expected the name of a recipe, or a ConfigDict'),
  ],
)
def test_mistakes(started, tmp_path, config, overrides, message):
  with pytest.raises(UserError, match=message):
    hivit_jax.run(config, tmp_path, overrides)
  assert not started


def test_optional_packages_are_those_that_the_tests_have():
  extras = tomllib.loads((ROOT / 'pyproject.toml').read_text())['project']['optional-dependencies']
  tested = (ROOT / 'requirements-dev.txt').read_text().splitlines()
  assert set(extras) == {'gcs', 's3', 'hub', 'export', 'wandb', 'mlflow'}
  assert {requirement for extra in extras.values() for requirement in extra} <= set(tested)


def test_the_wheel_holds_the_recipes():
  """Setuptools follows the link: .ci/run installs a wheel and trains by a recipe's name."""
  assert (ROOT / 'hivit_jax' / 'configs').samefile(ROOT / 'configs')
  project = tomllib.loads((ROOT / 'pyproject.toml').read_text())
  find = project['tool']['setuptools']['packages']['find']
  assert find == {'include': ['hivit_jax*']}  # packages without __init__.py count, too
  for file in (ROOT / 'configs').glob('*.py'):
    assert 'from configs' not in file.read_text(), f'{file}: not importable in a wheel'
