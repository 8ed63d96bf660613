"""What the matrix products of a function compute and move, counted from its jaxpr."""

import math
from collections.abc import Callable
from typing import Any

import jax
from jax.extend import core

# Products in the primitives that JAX has for cuDNN's attention, which computes the logits again.
_ATTENTION = {'dot_product_attention_fwd_wrapper': 2, 'dot_product_attention_bwd_wrapper': 5}


def matmul_flops(function: Any, *args: Any) -> int:
  """Operations in the matrix products of one call, 2 per multiply-add.

  Counted from the program as traced, before any compiler: loops (`lax.scan`) count with their
  length and recomputation (`jax.checkpoint`) as often as it happens; of a `cond` the dearest branch
  counts, of a choice by platform the cheapest. Elementwise operations do not count, as in the
  published GMACs.

  Args:
    function: traceable by JAX, or traced already (`jax.stages.Traced`).
    *args: its arguments or their `jax.ShapeDtypeStruct`s; none if it is traced.
  """
  return _total(function, args, _flops)


def matmul_outputs(function: Callable, *args: Any) -> int:
  """Elements of all results of matrix products: "activations" (arXiv 2003.13678); see above."""
  return _total(function, args, lambda eqn: eqn.outvars[0].aval.size)


def matmul_bytes(function: Callable, *args: Any) -> int:
  """Bytes of the operands and results of all matrix products; see above.

  What a program moves through memory at least, if no product stays on the chip for the next one;
  a compiler can fuse what is elementwise into them. The logits of cuDNN's attention do not count.
  """
  return _total(
    function, args,
    lambda eqn: sum(v.aval.size * v.aval.dtype.itemsize for v in (*eqn.invars, *eqn.outvars)),
  )  # fmt: skip


def _flops(eqn: Any) -> int:
  if products := _ATTENTION.get(eqn.primitive.name):
    (batch, n, heads, d), keys = eqn.invars[0].aval.shape, eqn.invars[1].aval.shape[1]
    return products * 2 * batch * heads * n * keys * d
  if eqn.primitive.name == 'conv_general_dilated':
    kernel = eqn.invars[1].aval
    features = kernel.shape[eqn.params['dimension_numbers'].rhs_spec[0]]
    spread = math.prod(eqn.params['lhs_dilation'])  # zeros between the pixels are no work
    return 2 * eqn.outvars[0].aval.size * (kernel.size // features) // spread
  ((contract, _), _) = eqn.params['dimension_numbers']
  lhs = eqn.invars[0].aval.shape
  return 2 * math.prod(eqn.outvars[0].aval.shape) * math.prod(lhs[i] for i in contract)


def _total(function: Any, args: Any, measure: Callable[[Any], int]) -> int:
  if isinstance(function, jax.stages.Traced):
    return _count(function.jaxpr.jaxpr, measure)
  if isinstance(function, jax.stages.Wrapped):
    # By itself: with compiler options it cannot be traced inside another function.
    return _count(function.trace(*args).jaxpr.jaxpr, measure)
  return _count(jax.make_jaxpr(function)(*args).jaxpr, measure)


def _count(jaxpr: core.Jaxpr, measure: Callable[[Any], int]) -> int:
  total = 0
  for eqn in jaxpr.eqns:
    name = eqn.primitive.name
    if name in ('dot_general', 'conv_general_dilated') or name in _ATTENTION:
      total += measure(eqn)
    else:
      inner = [_count(sub, measure) for sub in _subjaxprs(eqn.params)]
      if name == 'cond':
        # By platform: some have products in the place of sums.
        total += (min if eqn.params.get('branches_platforms') else max)(inner)
      elif name == 'while' and any(inner):
        raise ValueError('matrix products in a while loop of unknown length cannot be counted')
      else:
        total += sum(inner) * _times(name, eqn.params)
  return total


def _times(name: str, params: dict) -> int:
  """How often the body of an operation runs."""
  if name == 'pallas_call':
    return math.prod(params['grid_mapping'].grid)
  return params['length'] if name == 'scan' else 1


def _subjaxprs(params: dict) -> list[Any]:
  values = [v for p in params.values() for v in (p if isinstance(p, tuple | list) else (p,))]
  return [getattr(v, 'jaxpr', v) for v in values if hasattr(v, 'eqns')]
