"""Models as directories and repositories that others can load."""

import logging
import os
import pathlib
import tempfile
from collections.abc import Mapping, Sequence
from typing import Any

from flax import nnx

from hivit_jax import models
from hivit_jax.errors import UserError
from hivit_jax.interop import carried, exporter, files, hub, infer, pretrained
from hivit_jax.interop.files import StateDict
from hivit_jax.train import card, weights

_log = logging.getLogger(__name__)


def save_pretrained(
  model: nnx.Module | str | os.PathLike[str],
  directory: str | os.PathLike[str],
  *,
  ema: bool = False,
  mean: Sequence[float] | None = None,
  std: Sequence[float] | None = None,
  eval_crop: float | None = None,
  class_names: Sequence[str] | None = None,
  **arguments: Any,
) -> None:
  """Writes a model as a directory: `model.safetensors`, `config.json` and a model card.

  `create_model('local-dir:DIRECTORY')` gives the model back, bit for bit. The parameters have
  PyTorch's names; `config.json` is as timm writes it, and timm loads ViT and Swin. A run's card
  has its training data, metrics, command and versions. A `README.md` that is there already stays.

  Args:
    model: from `create_model`; or the path of a workdir, a checkpoint or a file, which brings
      the values of the other arguments.
    directory: created if needed.
    ema: of a path: take the averaged weights.
    mean, std: of each channel of the training images, pixels in [0, 1]; default: ImageNet's.
    eval_crop: share of the sides that the central crop of an evaluation keeps; default: 7/8 up to
      224 pixels, else 1.
    class_names: in the order of the logits.
    **arguments: of a path: those of the model that its weights do not say, such as `num_heads`.

  Raises:
    UserError: the directory is a run's, the model is none of `list_models()`, a value does not
      fit, weights hold NaN or infinite numbers, or a file cannot be read or written.
  """
  directory = pathlib.Path(directory).expanduser()
  if (directory / 'checkpoints').exists() or (directory / 'metrics.jsonl').exists():
    raise UserError(
      f'{directory} is the workdir of a run, whose config.json would be lost: name another '
      'directory'
    )
  state, described = _model(model, ema, arguments)
  data = carried.pixels(state, described)
  data |= {k: list(map(float, v)) for k, v in (('mean', mean), ('std', std)) if v is not None}
  if eval_crop is not None:
    data |= {'eval_crop': eval_crop}
  names = state.metadata.get('class_names') if class_names is None else list(class_names)
  state = state._replace(metadata=state.metadata | {'data': data, 'class_names': names})
  _check(state, described, class_names)
  abstract = nnx.eval_shape(lambda: models.create_model(described.name, **described.arguments))
  width = getattr(abstract, 'backbone', abstract).feature_info[-1].channels
  config = pretrained.write(directory, state, described, width)
  path = directory / hub.CARD
  if path.exists():
    _log.info('%s stays as it is', path)
    return
  source = None if isinstance(model, nnx.Module) else model
  text = card.text(state, described, config, source)
  try:
    path.write_text(text, 'utf-8')
  except OSError as error:
    raise UserError(f'cannot write {path}: {error.strerror}') from error


def push_to_hub(
  model: nnx.Module | str | os.PathLike[str],
  name: str,
  *,
  message: str = 'Upload a model of hivit_jax',
  private: bool | None = None,
  **options: Any,
) -> str:
  """Uploads to the Hugging Face Hub what `save_pretrained` writes; needs `huggingface_hub`.

  Args:
    model: see `save_pretrained`.
    name: `OWNER/NAME`, or `OWNER/NAME@BRANCH`; created if needed. A `README.md` there stays.
    message: of the commit.
    private: whether a new repository is; None: as its owner's account has it.
    **options: see `save_pretrained`.

  Returns:
    The name with the new commit, for `create_model`: `hf-hub:OWNER/NAME@COMMIT`.

  Raises:
    UserError: see `save_pretrained`; or there is no permission or connection, or no
      `huggingface_hub`.
  """
  name = name.removeprefix(hub.PREFIX)
  hub.check_upload(hub.PREFIX + name)  # before the work
  with tempfile.TemporaryDirectory() as folder:
    save_pretrained(model, folder, **options)
    file = pathlib.Path(folder) / hub.CARD
    file.write_text(file.read_text('utf-8').replace(card.ADDRESS, name.split('@')[0]), 'utf-8')
    return hub.upload(pathlib.Path(folder), hub.PREFIX + name, message=message, private=private)


def _model(
  model: Any, ema: bool, arguments: Mapping[str, Any]
) -> tuple[StateDict, infer.Described]:
  if isinstance(model, nnx.Module):
    if ema:
      raise UserError('ema=True takes the averaged weights of a path; the model has one set')
    if arguments:
      raise UserError(f'{next(iter(arguments))}=...: the model has its arguments')
    described = carried.of_model(model)
    arrays = exporter.named_arrays(nnx.to_pure_dict(nnx.state(model)))
    state = StateDict(arrays, 'the model', {})
  else:
    state = weights.read(model, ema=ema)
    described = carried.model_of(state, **arguments)
  known = {key: described.arguments.get(key) for key in ('image_size', 'target')}
  return state._replace(metadata=state.metadata | known), described


def _check(state: StateDict, described: infer.Described, class_names: Sequence[str] | None) -> None:
  if bad := files.not_finite(state.arrays):
    raise UserError(f'{state.source} was not saved: {bad[0]} holds NaN or infinite numbers')
  channels = described.arguments['channels']
  for key, value in carried.statistics(state, described).items():
    if len(value) != channels:
      raise UserError(f'{key}={value}: the model has {channels} channels, give a number for each')
  crop = carried.pixels(state, described).get('eval_crop')
  if crop is not None and not 0 < crop <= 1:
    raise UserError(f'eval_crop={crop}: expected a share of the sides, in (0, 1]')
  classes = described.arguments.get('num_classes', 0)
  if class_names is not None and len(class_names) != classes:
    raise UserError(f'class_names has {len(class_names)} names for {classes} classes')
