"""What a compiled program sends between devices."""

import dataclasses
import math
import re
from collections.abc import Mapping

import numpy as np

from hivit_jax.planning import hlo

_KINDS = ('all-reduce', 'all-gather', 'reduce-scatter', 'all-to-all', 'collective-permute')


@dataclasses.dataclass(frozen=True)
class Collective:
  """One collective operation.

  Attributes:
    kind: one of all-reduce, all-gather, reduce-scatter, all-to-all, collective-permute.
    size: bytes of the array that a group of devices has in common: of what an all-gather gives, of
      what a reduce-scatter takes, else of either.
    groups: (groups, devices in each), numbers of devices; of a permute (pairs, 2): from, to.
    count: how often one call of the program runs it; None: in a loop of unknown length.
  """

  kind: str
  size: int
  groups: np.ndarray
  count: int | None

  @property
  def sent(self) -> float:
    """Bytes that each device sends when it runs once, by the ring algorithm."""
    if self.kind == 'collective-permute':
      return self.size
    rounds = 2 if self.kind == 'all-reduce' else 1  # it is a reduce-scatter and an all-gather
    members = self.groups.shape[1]
    return rounds * self.size * (members - 1) / members

  def axes(self, shape: Mapping[str, int]) -> tuple[str, ...]:
    """The axes of a mesh, by name and size, along which it sends."""
    places = np.unravel_index(self.groups, tuple(shape.values()))
    return tuple(
      name for name, x in zip(shape, places, strict=True) if (x != x[:, :1]).any()
    )  # fmt: skip


def collectives(program: hlo.Program, devices: int) -> list[Collective]:
  """All collective operations of a program.

  A start and its done count once; so do the pieces of one that the TPU compiler spreads over
  fusions, in which it computes meanwhile.

  Args:
    program: compiled.
    devices: that it runs on.
  """
  found: dict[str, Collective] = {}
  for call in program.calls():
    for i in call.computation.values():
      kind = i.op.removesuffix('-start')
      if kind not in _KINDS:
        continue
      arrays = hlo.arrays(i.shape)
      if len(arrays) > len(i.operands):  # of a start: operands, results, and more
        arrays = arrays[len(i.operands) : 2 * len(i.operands)]
      size = sum(map(hlo.size, arrays))
      groups = _groups(i.rest, devices)
      if call.parts.startswith('all-reduce-scatter'):
        kind = 'reduce-scatter'  # what the TPU compiler makes of an all-reduce and a slice
      elif kind == 'reduce-scatter':
        size *= groups.shape[1]
      key = str(len(found))
      if call.parts and kind != 'reduce-scatter':
        key = f'{kind} {i.attribute("channel_id")} {size}'
      if groups.shape[1] > 1:
        found[key] = Collective(kind, size, groups, call.count)
  return list(found.values())


def _groups(attributes: str, devices: int) -> np.ndarray:
  """Devices that work together, see `Collective.groups`."""
  if match := re.search(r'(?:replica_groups|source_target_pairs)=\{(\{.*?\})\}', attributes):
    return np.array([hlo.numbers(g) for g in re.findall(r'\{(.*?)\}', match[1])])
  if match := re.search(r'replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?', attributes):
    shape, dims, order = (hlo.numbers(g) for g in match.groups(''))
    return _iota(dims, order).reshape(shape)
  if match := re.search(
    r'replica_groups=mesh\[(.*?)\](?:, device_ids=\(\[([\d,]+)\](?:T\(([\d,]+)\))?\))? \{(.*?)\}',
    attributes,
  ):
    mesh, dims, order, axes = match.groups('')
    return _mesh_groups(mesh, axes, hlo.numbers(dims), hlo.numbers(order))
  if 'replica_groups={}' in attributes:
    return np.arange(devices)[None]
  raise ValueError(f'unknown form of groups: {attributes[:200]}')


def _iota(dims: list[int], order: list[int]) -> np.ndarray:
  """0, 1, 2, ... as an array, transposed."""
  return np.arange(math.prod(dims)).reshape(dims).transpose(order or range(len(dims)))


def _mesh_groups(mesh: str, axes: str, dims: list[int], order: list[int]) -> np.ndarray:
  """Groups along axes of a mesh.

  Args:
    mesh: names and sizes, such as 'a'=8,'b'=2.
    axes: such as 'a','b', or 'a':(2)4 for the part of size 4 that has a part of size 2 before it.
    dims, order: of the mesh's devices, see `_iota`; empty: 0, 1, 2, ...
  """
  parts = {name: hlo.numbers(cut) for name, cut in re.findall(r"'(\w+)'(:\(\d+\)\d+)?", axes)}
  sizes, members = [], []
  for name, size in re.findall(r"'(\w+)'=(\d+)", mesh):
    if part := parts.get(name):
      members.append(len(sizes) + 1)
      sizes += [*part, int(size) // math.prod(part)]
    else:
      members += [len(sizes)] * (name in parts)
      sizes.append(int(size))
  others = [n for n in range(len(sizes)) if n not in members]
  grouped = _iota(dims or sizes, order).reshape(sizes).transpose(others + members)
  return grouped.reshape(-1, math.prod(sizes[n] for n in members))
