"""A training state as few arrays: the host takes its time for each when it starts a step."""

import itertools
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import core

from hivit_jax.train import sharding


class Layout(NamedTuple):
  """How a tree was before `pack`.

  Attributes:
    structure: of the tree.
    lengths: of each leaf that is a vector; None for the others.
  """

  structure: Any
  lengths: tuple[int | None, ...]


def pack(tree: Any) -> tuple[dict[str, Any], Layout]:
  """Joins the vectors of a tree, which of a model are its biases and scales, to a single one.

  Args:
    tree: of arrays of JAX, traced or not, or of numpy, or of `jax.ShapeDtypeStruct`s; vectors lie
      on every device.

  Returns:
    `matrices`: the tree, with None instead of its float32 vectors; `vectors`: (V,) these one after
    the other, in the order of the tree, or None if there are none. And what `unpack` needs.
  """
  leaves, structure = jax.tree.flatten(tree)
  lengths = tuple(x.shape[0] if x.ndim == 1 and x.dtype == jnp.float32 else None for x in leaves)
  matrices = [x if n is None else None for x, n in zip(leaves, lengths, strict=True)]
  vectors = [x for x, n in zip(leaves, lengths, strict=True) if n is not None]
  packed = {'matrices': structure.unflatten(matrices), 'vectors': _join(vectors)}
  return packed, Layout(structure, lengths)


def unpack(packed: Any, layout: Layout) -> Any:
  """Inverse of `pack`."""
  matrices = iter(jax.tree.leaves(packed['matrices']))
  vectors = iter(_cut(packed['vectors'], [n for n in layout.lengths if n is not None]))
  return layout.structure.unflatten(
    [next(matrices if n is None else vectors) for n in layout.lengths]
  )


def _join(vectors: list[Any]) -> Any:
  if not vectors:
    return None
  first = vectors[0]
  if isinstance(first, jax.ShapeDtypeStruct):
    return first.update(shape=(sum(x.shape[0] for x in vectors),))
  if isinstance(first, core.Tracer):
    return jnp.concatenate(vectors)
  # Outside of programs it is seldom done: no program is compiled for it.
  joined = np.concatenate(vectors)
  return joined if isinstance(first, np.ndarray) else sharding.put(joined, first.sharding)


def _cut(vectors: Any, lengths: list[int]) -> list[Any]:
  if not lengths:
    return []
  if isinstance(vectors, jax.ShapeDtypeStruct):
    return [vectors.update(shape=(length,)) for length in lengths]
  ends = list(itertools.accumulate(lengths))[:-1]
  if isinstance(vectors, core.Tracer):
    return jnp.split(vectors, ends)
  # A copy: no view of memory that the next step is given.
  parts = np.split(np.array(vectors), ends)
  if isinstance(vectors, np.ndarray):
    return parts
  return sharding.put(parts, [vectors.sharding] * len(parts))


def elementwise(function: Callable, *trees: Any) -> Any:
  """`jax.tree.map` of a function that works element by element, all vectors at once."""
  packed, layouts = zip(*map(pack, trees), strict=True)
  return unpack(jax.tree.map(function, *packed), layouts[0])


@jax.tree_util.register_pytree_node_class
class State(Mapping[str, Any]):
  """A training state: a mapping to trees, for JAX one list of arrays with the vectors joined.

  Has `step`: () int32; `params`, `opt_state`: trees; with an average of the parameters, `ema`: as
  `params`. What is looked up is cut out of the joined vectors anew.

  More than half of the host's time to start a step otherwise goes into the biases and scales, into
  taking nested dicts apart and making them, and into Python's collection of the old ones.
  """

  def __init__(self, trees: Mapping[str, Any]):
    """Packs the trees of a state: arrays or `jax.ShapeDtypeStruct`s."""
    packs = {key: pack(trees[key]) for key in sorted(trees)}
    self._leaves, structure = jax.tree.flatten({key: packed for key, (packed, _) in packs.items()})
    self._layout = structure, tuple((key, layout) for key, (_, layout) in packs.items())

  def __getitem__(self, key: str) -> Any:
    structure, layouts = self._layout
    return unpack(structure.unflatten(self._leaves)[key], dict(layouts)[key])

  def __iter__(self) -> Iterator[str]:
    return (key for key, _ in self._layout[1])

  def __contains__(self, key: object) -> bool:
    return key in tuple(self)

  def __len__(self) -> int:
    return len(self._layout[1])

  def tree_flatten(self) -> tuple[list[Any], Any]:
    return self._leaves, self._layout

  @classmethod
  def tree_unflatten(cls, layout: Any, leaves: Any) -> 'State':
    state = object.__new__(cls)
    state._leaves, state._layout = leaves, layout
    return state
