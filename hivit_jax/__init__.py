"""HiViT and masked autoencoding in JAX."""

from typing import Any

__version__ = '0.1.0'
__all__ = ['create_model', 'list_models', 'load_weights']

# Imports are inside: data workers and `main.py --help` import this package and must not wait for
# JAX. This file stands above all others: it may import any part, no part imports it.


def list_models() -> list[str]:
  """Names that `create_model` accepts."""
  from hivit_jax import models

  return models.list_models()


def create_model(
  name: str | None = None,
  *,
  seed: int = 0,
  attention: str = 'xla',
  weights: Any = None,
  partial: bool = False,
  ema: bool = False,
  **overrides: Any,
) -> Any:
  """Builds a model, with fresh parameters or with given ones.

  Args:
    name: one of `list_models()`; None: the model that `weights` are for. If `weights` carry that
      model, it has the arguments that it was trained with. Arguments that a file of other code does
      not show are guessed, and one warning names them.
    seed: of the initialisation.
    attention: 'xla', or 'cudnn' for NVIDIA GPUs, see `ops.attention.cudnn`.
    weights: path of a file, workdir or checkpoint, see `load_weights`.
    partial: see `load_weights`.
    ema: see `load_weights`.
    **overrides: arguments of the model's class instead of the variant's or the weights':
      `image_size` (one side or (height, width) in pixels), `num_classes`, `drop_path_rate`, ...
      `ops='plain'` computes every operation by its definition, see `ops.choice`. `dtype`,
      `attention`, `ops`, `remat` and `scan` never come with weights.

  Returns:
    A `flax.nnx.Module`.

  Raises:
    UserError: an unknown name or argument, values that do not fit, or weights that do not.
  """
  from hivit_jax import models
  from hivit_jax.errors import UserError

  if weights is None:
    if name is None:
      raise UserError('give the name of a model, or weights=')
    return models.create_model(name, seed=seed, attention=attention, **overrides)
  from hivit_jax.train import weights as reader

  return reader.create_model(
    name, weights, seed=seed, attention=attention, partial=partial, ema=ema, **overrides
  )


def load_weights(model: Any, path: Any, **options: Any) -> Any:
  """Loads weights into a model, in place: see `hivit_jax.train.weights.load_weights`."""
  from hivit_jax.train import weights

  return weights.load_weights(model, path, **options)
