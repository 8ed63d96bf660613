"""The Hugging Face Hub: uploads, downloads, revisions, cache; only tensors are ever read."""

import json
import re
import sys

import pytest
from flax import nnx
from safetensors.numpy import load_file

import hivit_jax
from hivit_jax.errors import UserError
from tests import hub_server
from tests.helpers import TINY_VIT, random_model
from tests.runs import error_of

NAME = 'hf-hub:someone/small_vit'
CONVERT = 'hivit_jax/tools/convert.py'


@pytest.fixture(scope='module')
def saved(tmp_path_factory):
  """Two models, as directories."""
  directories = []
  for seed in range(2):
    model = nnx.merge(*random_model('vit_base', seed=seed, num_classes=3, **TINY_VIT))
    directories.append(tmp_path_factory.mktemp('saved'))
    hivit_jax.save_pretrained(model, directories[-1])
  return directories


@pytest.fixture
def convert(forks, tmp_path):
  """Runs the tool in a process of its own, with the Hub's settings."""

  def call(*arguments, endpoint='http://127.0.0.1:9', home='home', **settings):
    environment = {
      'HF_ENDPOINT': endpoint, 'HF_HOME': str(tmp_path / home), 'HF_TOKEN': hub_server.TOKEN,
      'HF_HUB_DISABLE_XET': '1', 'HF_HUB_DISABLE_TELEMETRY': '1',
    }  # fmt: skip
    return forks(CONVERT, *map(str, arguments), **(environment | settings))

  return call


def _same(path, directory) -> bool:
  expected = load_file(directory / 'model.safetensors')
  actual = load_file(path)
  return {k: v.tobytes() for k, v in actual.items()} == {
    k: v.tobytes() for k, v in expected.items()
  }


def test_uploads_come_back_by_revision_and_without_a_connection(convert, saved, tmp_path):
  out = tmp_path / 'x.safetensors'
  with hub_server.serve() as hub:
    commits = []
    for directory in saved:
      done = convert('to-hub', directory, f'--out={NAME}', endpoint=hub.url)
      assert done.status == 0, done.stderr
      head = hub.branches['someone/small_vit']['main']
      assert f'{NAME}@{head}' in done.stdout
      commits.append(head)
      if directory is saved[0]:  # the owner completes the card
        files = hub.commits['someone/small_vit'][head]
        assert b"create_model('hf-hub:someone/small_vit')" in files['README.md']
        hub.commit('someone/small_vit', {'README.md': b'mine'})
    files = hub.commits['someone/small_vit'][commits[1]]
    assert files['README.md'] == b'mine'
    assert json.loads(files['config.json'])['architecture'] == 'vit_base_patch16_224'
    out.write_bytes(files['model.safetensors'])
    assert _same(out, saved[1])

    done = convert('to-hub', saved[0], f'--out={NAME}@trial', endpoint=hub.url)
    assert done.status == 0, done.stderr
    assert hub.branches['someone/small_vit']['main'] == commits[1]

    for revision, directory in (('', saved[1]), (f'@{commits[0]}', saved[0]), ('@trial', saved[0])):
      done = convert('to-torch', NAME + revision, f'--out={out}', endpoint=hub.url)
      assert done.status == 0, done.stderr
      assert _same(out, directory)
    asked = len(hub.asked)
    done = convert('to-torch', NAME, f'--out={out}', endpoint=hub.url, HF_HUB_OFFLINE='1')
    assert done.status == 0, done.stderr
    assert _same(out, saved[1])
    assert len(hub.asked) == asked
  # The server is gone: what is in the cache still loads.
  done = convert('to-torch', f'{NAME}@{commits[0]}', f'--out={out}')
  assert done.status == 0, done.stderr
  assert _same(out, saved[0])


def test_a_cache_that_others_filled_is_used(convert, saved, tmp_path):
  commit = 'c0ffee' + '0' * 34
  repository = tmp_path / 'home' / 'hub' / 'models--someone--small_vit'
  for file, content in (
    ('refs/main', commit.encode()),
    (f'snapshots/{commit}/model.safetensors', (saved[0] / 'model.safetensors').read_bytes()),
  ):
    path = repository / file
    path.parent.mkdir(parents=True)
    path.write_bytes(content)
  out = tmp_path / 'x.safetensors'
  done = convert('to-torch', NAME, f'--out={out}', HF_HUB_OFFLINE='1')
  assert done.status == 0, done.stderr
  assert _same(out, saved[0])


def test_code_and_pickles_are_never_asked_for(convert, tmp_path):
  with hub_server.serve() as hub:
    files = {'pytorch_model.bin': b'pickle', 'model.py': b'exit()', 'config.json': b'{}'}
    hub.commit('someone/small_vit', files)
    done = convert('to-torch', NAME, f'--out={tmp_path}/x.pth', endpoint=hub.url)
    assert 'has no model.safetensors; other kinds of files are not loaded' in error_of(done)
    assert {path.rpartition('/')[2] for path in hub.asked} <= {'model.safetensors', 'config.json'}


@pytest.mark.parametrize(
  ('arguments', 'settings', 'said'),
  [
    (('to-torch', 'hf-hub:nobody/nothing'), {}, 'there is no such repository, or it is private'),
    (('to-torch', f'{NAME}@none'), {}, 'the repository has no such revision'),
    (('to-torch', NAME), {'HF_HUB_OFFLINE': '1'}, 'is not in the cache, and cannot be downloaded'),
    (
      ('to-hub', '{saved}'),
      {'HF_TOKEN': 'hf_of_another'},
      'hf-hub:x/y: .*401',
    ),
  ],
)
def test_mistakes_have_one_line(convert, saved, tmp_path, arguments, settings, said):
  with hub_server.serve() as hub:
    hub.commit('someone/small_vit', {'config.json': b'{}'})
    command, what = arguments
    out = 'hf-hub:x/y' if command == 'to-hub' else tmp_path / 'x.pth'
    what = what.format(saved=saved[0])
    done = convert(command, what, f'--out={out}', endpoint=hub.url, home='empty', **settings)
  assert re.search(said, error_of(done))


def test_a_bad_name_and_a_missing_package_have_one_line(monkeypatch):
  with pytest.raises(UserError, match='expected hf-hub:OWNER/NAME or hf-hub:OWNER/NAME@REVISION'):
    hivit_jax.create_model('hf-hub:small_vit')
  # Before any weights are read.
  with pytest.raises(UserError, match='expected hf-hub:OWNER/NAME'):
    hivit_jax.push_to_hub('nowhere', 'small_vit')
  monkeypatch.setitem(sys.modules, 'huggingface_hub', None)
  with pytest.raises(UserError, match='needs huggingface_hub: pip install huggingface_hub'):
    hivit_jax.create_model(NAME)
  with pytest.raises(UserError, match='needs huggingface_hub: pip install huggingface_hub'):
    hivit_jax.push_to_hub('nowhere', NAME)


def test_nothing_is_uploaded_to_a_commit():
  name = f'{NAME}@{"c0ffee" + "0" * 34}'
  with pytest.raises(UserError, match=f'^{name}: a commit never changes; name a branch'):
    hivit_jax.push_to_hub('nowhere', name)
