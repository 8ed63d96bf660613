"""Exports a model's forward pass as one file that runs without this package.

  python -m hivit_jax.tools.export WORKDIR|CHECKPOINT|FILE|hf-hub:OWNER/NAME --out=FILE
      [--output=prediction|pooled|tokens|kept] [--dtype=bfloat16] [--platforms=cpu,cuda,tpu]
      [--beside] [--format=jax|onnx] [--ema] [--image_size=224x320]

FILE is for `jax.export.deserialize`, of any batch size. What it takes and gives is printed.
docs/guide/weights.md has the program that runs it.
"""

import importlib
import importlib.util
import logging
import pathlib
from collections.abc import Sequence
from typing import Any

from absl import flags
from flax import nnx

from hivit_jax import cli, settings
from hivit_jax.errors import UserError
from hivit_jax.interop import files
from hivit_jax.reporting.console import setup_logging
from hivit_jax.tools.exporting import PLATFORMS, Forward, exported, forward
from hivit_jax.train import weights as reader

_OUT = flags.DEFINE_string('out', None, 'File to write.')
_OUTPUT = flags.DEFINE_enum(
  'output',
  'prediction',
  ['prediction', 'pooled', 'tokens', 'kept'],
  "prediction: the model's own output, of autoencoders for given noise; pooled: a vector of "
  'features for an image; tokens: what the last stage gives; kept: the same for the given units '
  'only; the others are never computed.',
)
_DTYPE = flags.DEFINE_enum('dtype', 'float32', ['float32', 'bfloat16'], 'Of the computation.')
_PLATFORMS = flags.DEFINE_list(
  'platforms', ['cpu', 'cuda', 'tpu'], 'Platforms that the file can run on.'
)
_BESIDE = flags.DEFINE_bool(
  'beside', False, 'Write the weights into a .safetensors file next to it; they are an argument.'
)
_FORMAT = flags.DEFINE_enum('format', 'jax', ['jax', 'onnx'], 'onnx needs jax2onnx.')
_EMA = flags.DEFINE_bool('ema', False, 'Use the averaged weights (EMA).')
_IMAGE_SIZE = flags.DEFINE_string('image_size', None, "HEIGHTxWIDTH, if not the weights' own.")


def main(argv: list[str]) -> None:
  if len(argv) != 2 or _OUT.value is None:
    raise UserError('which model, and where to? tools.export WORKDIR|FILE --out=FILE')
  out = pathlib.Path(_OUT.value)
  if files.is_weight_file(out):
    raise UserError(f'--out={out}: that is an ending of weights; take another, such as .jaxexport')
  for platform in _PLATFORMS.value:
    if platform not in PLATFORMS:
      raise UserError(f'--platforms: "{platform}" is not one of {", ".join(PLATFORMS)}')
  inside = _DTYPE.value == 'float32' and not _BESIDE.value and not _PLATFORMS.present
  if _FORMAT.value == 'onnx' and not inside:
    raise UserError(
      '--format=onnx is float32 with its weights inside, for every platform: omit --dtype, '
      '--beside and --platforms'
    )
  if _FORMAT.value == 'onnx' and importlib.util.find_spec('jax2onnx') is None:
    raise UserError('--format=onnx needs jax2onnx: see "Export" in docs/guide/weights.md')
  if _FORMAT.value == 'jax' and importlib.util.find_spec('flatbuffers') is None:
    raise UserError('the format of jax.export needs flatbuffers: pip install flatbuffers')
  setup_logging()
  overrides: dict[str, Any] = {}
  if _IMAGE_SIZE.value is not None:
    overrides['image_size'] = settings.image_size(_IMAGE_SIZE.value, '--image_size')
  model = reader.create_model(
    # Kernels for one platform must not get into a file for all of them.
    None, argv[1], ema=_EMA.value, dtype=_DTYPE.value, ops='plain', **overrides
  )  # fmt: skip
  what = forward(model, _OUTPUT.value)
  content, said = _onnx(model, what) if _FORMAT.value == 'onnx' else _artifact(model, what, out)
  with cli.writing('out', out):
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_bytes(content)
  print(f'wrote {out} {said}')


def _artifact(model: nnx.Module, what: Forward, out: pathlib.Path) -> tuple[bytes, str]:
  """What `jax.export` reads, and what it takes and gives; writes weights `--beside` it."""
  done, weights = exported(model, what, _PLATFORMS.value, beside=_BESIDE.value)
  takes = _takes(what)
  if weights:
    files.write(out.with_suffix('.safetensors'), weights)
    takes.insert(0, f'weights of {out.with_suffix(".safetensors")}')
  gives = [_shaped(aval.dtype, aval.shape) for aval in done.out_avals]
  said = f'for {", ".join(done.platforms)}: {"; ".join(takes)} -> {"; ".join(gives)}'
  return bytes(done.serialize()), said


def _takes(what: Forward) -> list[str]:
  return [f'{name} {_shaped(dtype, shape)}' for name, (shape, dtype) in what.inputs.items()]


def _shaped(dtype: Any, shape: Sequence[Any]) -> str:
  return f'{dtype}[{", ".join(map(str, shape))}]'


def _onnx(model: nnx.Module, what: Forward) -> tuple[bytes, str]:
  """An ONNX model, and what it takes and gives."""
  for noisy in ('jax2onnx', 'onnx_ir'):  # of examples that it cannot import, of shapes it computes
    logging.getLogger(noisy).setLevel(logging.ERROR)
  jax2onnx = importlib.import_module('jax2onnx')  # in no requirements.txt: it would contradict
  inputs = [
    tuple(size.upper() if isinstance(size, str) else size for size in shape)
    for shape, _ in what.inputs.values()
  ]
  try:
    done = jax2onnx.to_onnx(
      lambda *inputs: what.function(model, *inputs), inputs, input_names=list(what.inputs)
    )
  except Exception as error:  # whatever it cannot convert, with internal errors of all kinds
    reason = f'{type(error).__name__}: {error}'
    raise UserError(f'jax2onnx cannot convert this forward pass, {reason}') from error
  gives = ', '.join(output.name for output in done.graph.output)
  return done.SerializeToString(), f'for ONNX: {"; ".join(_takes(what))} -> {gives}'


if __name__ == '__main__':
  cli.run(main)
