"""Files of strangers: nothing in them runs, and each kind of bad file has its one-line error."""

import argparse
import os
import pathlib
import pickle
import subprocess
import sys

import numpy as np
import pytest

from hivit_jax.errors import UserError
from hivit_jax.interop import files
from tests import patience
from tests.interop_files import cfg_node, forget_yacs, golden_state, official, save, tensors

torch = pytest.importorskip('torch')


class Hostile:
  """Creates a file when it is unpickled."""

  def __init__(self, path, how):
    self.path, self.how = str(path), how

  def __reduce__(self):
    if self.how == 'eval':
      return eval, (f'open({self.path!r}, "w").close()',)
    if self.how == 'builtin open':
      return open, (self.path, 'w')
    return os.system, (f'touch {self.path}',)


@pytest.mark.parametrize('how', ['os.system', 'eval', 'builtin open'])
@pytest.mark.parametrize('kind', ['zip', 'legacy', 'bare pickle', 'safetensors by name'])
def test_a_hostile_pickle_creates_nothing(tmp_path, kind, how):
  owned, path = tmp_path / 'owned', tmp_path / 'weights.pth'
  content = {'model': tensors(golden_state('hivit_norpe')), 'args': Hostile(owned, how)}
  if kind in ('zip', 'legacy'):
    torch.save(content, path, _use_new_zipfile_serialization=kind == 'zip')
  else:
    path.write_bytes(pickle.dumps({'model': {}, 'args': content['args']}))
  if kind == 'safetensors by name':
    path = path.rename(tmp_path / 'weights.safetensors')
  with pytest.raises(UserError) as error:
    files.read(path)
  assert not owned.exists()
  assert '\n' not in str(error.value)
  if kind in ('zip', 'legacy'):
    assert 'nothing in a weight file may run' in str(error.value)
  if kind != 'safetensors by name':  # the file would really have done it
    made = pickle.loads(pickle.dumps(content['args']))
    if how == 'builtin open':
      made.close()
    assert owned.exists()


def test_code_that_comes_through_the_allowed_namespace_does_not_run(tmp_path):
  owned = tmp_path / 'owned'
  path = save(
    tmp_path / 'x.pth',
    {
      'model': tensors(golden_state('hivit_norpe')),
      'args': argparse.Namespace(a=Hostile(owned, '')),
    },
  )
  with pytest.raises(UserError, match='system'):
    files.read(path)
  assert not owned.exists()


def test_other_classes_are_refused_and_named(tmp_path):
  path = save(tmp_path / 'x.pth', {'model': {}, 'where': pathlib.PurePosixPath('a')})
  with pytest.raises(UserError, match=r'pathlib\.PurePosixPath'):
    files.read(path)


def test_damaged_and_foreign_files_have_one_clear_error(tmp_path):
  whole = save(tmp_path / 'whole.pth', official(golden_state('hivit_norpe'))).read_bytes()
  safe = tmp_path / 'whole.safetensors'
  files.write(safe, golden_state('hivit_norpe'))
  cut = safe.read_bytes()[:1000]
  bad = {
    'half.pth': whole[: len(whole) // 2],
    'end.pth': whole[:-30],
    'start.pth': whole[:10],
    'empty.pth': b'',
    'page.pth': b'<!DOCTYPE html><html>404</html>',
    'list.pth': None,
    'scalars.pth': None,
    'cut.safetensors': cut,
    'page.safetensors': b'<!DOCTYPE html><html>404</html>',
  }
  save(tmp_path / 'list.pth', [1, 2])
  save(tmp_path / 'scalars.pth', {'epoch': 3})
  for name, content in bad.items():
    if content is not None:
      (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError) as error:
      files.read(tmp_path / name)
    assert name in str(error.value)
    assert '\n' not in str(error.value)
  for missing in (tmp_path / 'none.pth', tmp_path):
    with pytest.raises(UserError, match=r'does not exist|is not a file'):
      files.read(missing)


@pytest.mark.parametrize(
  'prefix',
  ['', 'module.', 'backbone.', 'encoder.', 'module.backbone.', 'model.', 'model.backbone.'],
)
@pytest.mark.parametrize('container', ['model', 'model_ema', 'state_dict', 'bare', 'supervised'])
def test_every_container_and_prefix_gives_the_same_weights(tmp_path, container, prefix):
  state = golden_state('hivit_rpe')
  weights = tensors(state, prefix)
  wrong = tensors({name: value * 0 for name, value in state.items()}, prefix)
  content = {
    'model': official(state, prefix),
    'model_ema': {**official(state, prefix), 'model': wrong, 'model_ema': weights},
    'state_dict': {'meta': {'epoch': 12}, 'state_dict': weights},
    'bare': weights,
    'supervised': {
      'model': weights, 'lr_scheduler': {'a': 1}, 'max_accuracy': 83.8, 'epoch': 299,
      'config': cfg_node(DATA=cfg_node(BATCH_SIZE=128), TAGS=['a']),
    },
  }[container]  # fmt: skip
  path = save(tmp_path / 'x.pth', content)
  forget_yacs()
  read = files.read(path, ema=container == 'model_ema').arrays
  assert set(read) == set(state)
  for name, value in state.items():
    assert read[name].tobytes() == value.tobytes()
  assert 'yacs' not in sys.modules


def test_averaged_weights_are_neither_guessed_nor_overlooked(tmp_path):
  state = tensors(golden_state('hivit_norpe'))
  only_ema = save(tmp_path / 'ema.pth', {'model_ema': state})
  with pytest.raises(UserError, match='--ema'):
    files.read(only_ema)
  with pytest.raises(UserError, match='no averaged weights'):
    files.read(save(tmp_path / 'x.pth', {'model': state, 'epoch': 1}), ema=True)


def test_old_and_half_precision_files_are_read(tmp_path):
  state = golden_state('hivit_norpe')
  torch.save({'model': tensors(state)}, tmp_path / 'old.pth', _use_new_zipfile_serialization=False)
  old = files.read(tmp_path / 'old.pth').arrays
  assert old['head.weight'].tobytes() == state['head.weight'].tobytes()
  for dtype in (torch.float16, torch.bfloat16):
    weights = {name: value.to(dtype) for name, value in tensors(state).items()}
    half = files.read(save(tmp_path / 'half.pth', weights)).arrays['head.weight']
    assert half.dtype == np.float32
    np.testing.assert_array_equal(half, weights['head.weight'].float().numpy())


def test_two_names_that_become_one_are_refused(tmp_path):
  state = tensors(golden_state('hivit_norpe'))
  state['module.head.bias'] = state['head.bias']
  with pytest.raises(UserError, match=r'head\.bias appears twice'):
    files.read(save(tmp_path / 'x.pth', state))


def test_without_pytorch_safetensors_work_and_pth_says_how_to_install_it(tmp_path):
  files.write(tmp_path / 'x.safetensors', golden_state('hivit_norpe'))
  save(tmp_path / 'x.pth', tensors(golden_state('hivit_norpe')))
  script = f"""
import sys
sys.modules['torch'] = None  # as if it were not installed
import hivit_jax
from hivit_jax.errors import UserError
hivit_jax.create_model(weights={str(tmp_path / 'x.safetensors')!r}, num_heads=4)
try:
  hivit_jax.create_model(weights={str(tmp_path / 'x.pth')!r})
except UserError as error:
  print(error)
"""
  done = subprocess.run(
    [sys.executable, '-c', script], capture_output=True, text=True, timeout=patience.limit(120),
    cwd=pathlib.Path(__file__).parents[2],
  )  # fmt: skip
  assert done.returncode == 0, done.stderr
  assert 'pip install torch --index-url https://download.pytorch.org/whl/cpu' in done.stdout
  assert 'x.pth' in done.stdout
