"""Floating point operations of a function, counted from its jaxpr."""

import math
from collections.abc import Callable
from typing import Any

import jax
from jax.extend import core


def matmul_flops(function: Callable, *args: Any) -> int:
  """Operations in the matrix products of one call, 2 per multiply-add.

  Counted from the program as traced, before any compiler: loops (`lax.scan`) count with their
  length and recomputation (`jax.checkpoint`) as often as it happens; of a `cond` the dearest branch
  counts. Elementwise operations do not count, as in the published GMACs.

  Args:
    function: traceable by JAX.
    *args: its arguments or their `jax.ShapeDtypeStruct`s.
  """
  if isinstance(function, jax.stages.Wrapped):
    # By itself: with compiler options it cannot be traced inside another function.
    return _count(function.trace(*args).jaxpr.jaxpr)
  return _count(jax.make_jaxpr(function)(*args).jaxpr)


def _count(jaxpr: core.Jaxpr) -> int:
  total = 0
  for eqn in jaxpr.eqns:
    name = eqn.primitive.name
    if name == 'dot_general':
      ((contract, _), _) = eqn.params['dimension_numbers']
      lhs, out = (getattr(variable.aval, 'shape') for variable in (eqn.invars[0], eqn.outvars[0]))  # noqa: B009
      total += 2 * math.prod(out) * math.prod(lhs[i] for i in contract)
    elif name == 'conv_general_dilated':
      raise NotImplementedError('convolutions are not counted: no model here uses one')
    else:
      inner = [_count(sub) for sub in _subjaxprs(eqn.params)]
      if name == 'cond':
        total += max(inner)
      elif name == 'while' and any(inner):
        raise ValueError('matrix products in a while loop of unknown length cannot be counted')
      else:
        total += sum(inner) * (eqn.params['length'] if name == 'scan' else 1)
  return total


def _subjaxprs(params: dict) -> list[Any]:
  values = [v for p in params.values() for v in (p if isinstance(p, tuple | list) else (p,))]
  return [getattr(v, 'jaxpr', v) for v in values if isinstance(v, core.ClosedJaxpr | core.Jaxpr)]
