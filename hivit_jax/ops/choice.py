"""Which form of each operation a model computes with: the only place where that is decided."""

import dataclasses
from collections.abc import Callable

import jax

from hivit_jax.errors import UserError
from hivit_jax.ops import attention, conv, gather, linear, norm, relative_position, triton_attention


@dataclasses.dataclass(frozen=True, repr=False)
class Ops:
  """The operations of a model; `plain` in the file of the same name defines each.

  Layers that use them have an attribute `ops`, which `create_model` sets. It is part of a model's
  static half, so that `jax.jit` compiles one program for each choice.
  """

  linear: Callable[..., jax.Array]
  convolve: Callable[..., jax.Array]
  layer_norm: Callable[..., jax.Array]
  attend: Callable[..., jax.Array]
  relative_position_bias: Callable[..., jax.Array]
  gather_units: Callable[..., jax.Array]
  gather_shared: Callable[..., jax.Array]
  gather_pairs: Callable[..., jax.Array]

  def __repr__(self) -> str:
    return f'Ops({self.linear.__name__}, attend={self.attend.__name__})'


PLAIN = Ops(
  linear=linear.plain,
  convolve=conv.plain,
  layer_norm=norm.plain,
  attend=attention.projected,
  relative_position_bias=relative_position.plain,
  gather_units=gather.units_plain,
  gather_shared=gather.shared_plain,
  gather_pairs=gather.pairs_plain,
)

FAST = Ops(
  linear=linear.fast,
  convolve=conv.fast,
  layer_norm=norm.fast,
  attend=attention.projected,
  relative_position_bias=relative_position.fast,
  gather_units=gather.units_fast,
  gather_shared=gather.shared_fast,
  gather_pairs=gather.pairs_fast,
)

FORMS = {'fast': FAST, 'plain': PLAIN}
ATTENTION = {
  'auto': triton_attention.attend,
  'xla': attention.projected,
  'cudnn': attention.projected_cudnn,
}


def choose(ops: str = 'fast', attention: str = 'xla') -> Ops:
  """The operations of the names that `create_model` takes.

  Args:
    ops: 'fast', or 'plain' for the definitions, differentiated by JAX: where results differ, the
      fault is that of a fast form.
    attention: 'xla', which is the definition, or for NVIDIA GPUs 'auto', the fastest for each shape
      (see `triton_attention.attend`), or 'cudnn' (see `attention.cudnn`).

  Raises:
    UserError: an unknown name, or a kernel for attention together with plain operations.
  """
  for key, value, known in (('ops', ops, FORMS), ('attention', attention, ATTENTION)):
    if value not in known:
      raise UserError(f'{key}="{value}" is not one of {", ".join(known)}')
  if ops == 'plain':
    if attention != 'xla':
      raise UserError(f'attention={attention} is a fast form, which ops=plain excludes: take one')
    return PLAIN
  return dataclasses.replace(FAST, attend=ATTENTION[attention])
