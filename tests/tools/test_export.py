"""Exported files run where this package is not, on any batch, and give what the model gives."""

import importlib.util
import json
import re
import subprocess
import sys

import jax
import numpy as np
import pytest
from flax import nnx

import hivit_jax
from hivit_jax.errors import UserError
from hivit_jax.tools import exporting
from tests import patience
from tests.helpers import TINY, TINY_SWIN, TINY_VIT, assert_close, random_model
from tests.runs import error_of

VIT = TINY_VIT | {'num_classes': 3}
# In an interpreter that sees neither this directory nor PYTHONPATH.
PROGRAM = """
import importlib.util, json, sys
import jax
import numpy as np
from safetensors.numpy import load_file

assert importlib.util.find_spec('hivit_jax') is None
file, beside, inputs, outputs = sys.argv[1:]
with open(file, 'rb') as stream:
  exported = jax.export.deserialize(stream.read())
with np.load(inputs) as given:
  arguments = [given[name] for name in json.loads(str(given['order']))]
weights = [load_file(beside)] if beside else []
out = jax.tree.leaves(exported.call(*weights, *arguments))
np.savez(outputs, *[np.asarray(x, np.float32) for x in out])
"""


def _inputs(what: exporting.Forward, batch: int) -> list[np.ndarray]:
  rng = np.random.default_rng(0)
  sizes = {'b': batch, 'k': 2}
  shapes = [[sizes.get(n, n) for n in shape] for shape, _ in what.inputs.values()]
  return [
    rng.permuted(np.tile(np.arange(4, dtype=np.int32), (batch, 1)), axis=1)[:, :2]
    if dtype == 'int32'
    else rng.standard_normal(shape, np.float32)
    for shape, (_, dtype) in zip(shapes, what.inputs.values(), strict=True)
  ]


def _elsewhere(tmp_path, file, inputs, beside='') -> list[np.ndarray]:
  names = [str(i) for i in range(len(inputs))]
  order = np.array(json.dumps(names))
  np.savez(tmp_path / 'in.npz', order=order, **dict(zip(names, inputs, strict=True)))
  command = [
    sys.executable, '-I', '-c', PROGRAM, file, beside, tmp_path / 'in.npz', tmp_path / 'out.npz',
  ]  # fmt: skip
  done = subprocess.run(
    command, cwd=tmp_path, capture_output=True, text=True, timeout=patience.limit(120)
  )
  assert done.returncode == 0, done.stderr
  with np.load(tmp_path / 'out.npz') as given:
    return [given[name] for name in given.files]


@pytest.mark.parametrize('beside', [False, True])
def test_a_classifier_runs_without_this_package(forks, tmp_path, beside):
  model = nnx.merge(*random_model('vit_base', **VIT))
  hivit_jax.save_pretrained(model, tmp_path / 'saved')
  file = tmp_path / 'vit.jaxexport'
  done = forks(
    'hivit_jax/tools/export.py', str(tmp_path / 'saved'), f'--out={file}', f'--beside={beside}'
  )
  assert done.status == 0, done.stderr
  weights = f'weights of {tmp_path}/vit.safetensors; ' if beside else ''
  assert done.stdout == (
    f'wrote {file} for cpu, cuda, tpu: {weights}images float32[b, 32, 32, 3] -> float32[b, 3]\n'
  )
  inputs = _inputs(exporting.forward(model, 'prediction'), 3)
  (logits,) = _elsewhere(
    tmp_path, file, inputs, str(file.with_suffix('.safetensors')) if beside else ''
  )
  assert_close(logits, jax.jit(lambda model, x: model(x))(model, *inputs), relative=1e-5)


CASES = [
  ('hivit_tiny', TINY | {'num_classes': 3}, 'kept', 1),
  ('mae_vit_base', TINY_VIT | {'decoder_embed_dim': 16, 'decoder_depth': 1,
                               'decoder_num_heads': 2, 'mask_ratio': 0.5}, 'prediction', 3),
  ('swin_tiny', TINY_SWIN | {'num_classes': 3}, 'pooled', 1),
  ('hivit_tiny', TINY, 'tokens', 1),
  ('backbone_hivit_tiny', TINY | {'window_size': 2, 'global_blocks': (1,)}, 'prediction', 4),
  ('segment_hivit_tiny', {'image_size': 32, 'position_image_size': 32, 'embed_dim': 16,
                          'depths': (1, 1, 1), 'num_heads': 2, 'num_classes': 3,
                          'head_channels': 8, 'auxiliary_channels': 4}, 'prediction', 1),
  ('simmim_swin_tiny', TINY_SWIN | {'mask_ratio': 0.5}, 'prediction', 3),
  ('vit_base', VIT | {'dtype': 'bfloat16'}, 'prediction', 1),
]  # fmt: skip


@pytest.mark.parametrize(('name', 'settings', 'output', 'results'), CASES)
def test_every_output_equals_the_models_for_any_batch(name, settings, output, results):
  graphdef, params = random_model(name, ops='plain', **settings)
  model = nnx.merge(graphdef, params)
  what = exporting.forward(model, output)
  done, _ = exporting.exported(model, what, ['cpu', 'cuda', 'tpu'])
  again = jax.export.deserialize(done.serialize())
  for batch in (1, 3):
    inputs = _inputs(what, batch)
    expected = jax.tree.leaves(jax.jit(what.function)(model, *inputs))
    actual = jax.tree.leaves(again.call(*inputs))
    assert len(actual) == len(expected) == results
    for one, other in zip(actual, expected, strict=True):
      assert_close(one, other, relative=1e-6)


def test_what_depends_on_the_batch_is_refused_in_one_line():
  model = nnx.merge(*random_model('vit_base', ops='plain', **VIT))
  images = exporting.forward(model, 'prediction').inputs
  what = exporting.Forward(lambda model, x: model(x) if x.shape[0] > 2 else x.sum(), images)
  with pytest.raises(UserError, match=r'^ViT cannot be exported .* for any batch: .*') as caught:
    exporting.exported(model, what, ['cpu'])
  assert '\n' not in str(caught.value)


def test_no_kernel_of_one_platform_is_in_the_file():
  model = nnx.merge(*random_model('vit_base', ops='plain', dtype='bfloat16', **VIT))
  done, _ = exporting.exported(model, exporting.forward(model, 'prediction'), ['cuda', 'tpu'])
  text = done.mlir_module()
  assert set(re.findall(r'custom_call @([\w$.]+)', text)) <= {'shape_assertion'}
  assert 'bf16' in text
  assert done.platforms == ('cuda', 'tpu')


def test_mistakes_have_one_line(forks, tmp_path):
  done = forks('hivit_jax/tools/export.py', str(tmp_path / 'no.pth'), f'--out={tmp_path}/x')
  assert 'no.pth does not exist' in error_of(done)
  done = forks('hivit_jax/tools/export.py', str(tmp_path))
  assert error_of(done).startswith('which model, and where to?')
  done = forks('hivit_jax/tools/export.py', 'x.pth', '--out=y.safetensors')
  assert '--out=y.safetensors: that is an ending of weights' in error_of(done)
  done = forks('hivit_jax/tools/export.py', 'x.pth', '--out=y', '--platforms=cpu,gpu')
  assert '--platforms: "gpu" is not one of cpu, cuda, rocm, tpu' in error_of(done)
  onnx = ('x.pth', '--out=x.onnx', '--format=onnx')
  done = forks('hivit_jax/tools/export.py', *onnx, '--platforms=cpu')
  assert '--format=onnx is float32 with its weights inside, for every' in error_of(done)
  if importlib.util.find_spec('jax2onnx') is None:
    done = forks('hivit_jax/tools/export.py', *onnx)
    assert '--format=onnx needs jax2onnx' in error_of(done)
