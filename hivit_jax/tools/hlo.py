"""What a compiled program sends between devices, read from its text."""

import dataclasses
import math
import re
from collections.abc import Iterator, Mapping

import numpy as np

_KINDS = ('all-reduce', 'all-gather', 'reduce-scatter', 'all-to-all', 'collective-permute')
_INSTRUCTION = re.compile(r'\s+(ROOT )?%?([\w.-]+) = (.*?) ([a-z][a-z-]*)\((.*)')
_COMPUTATION = re.compile(r'(ENTRY )?%?([\w.-]+) \(.*\{$')
_CALLED = re.compile(
  r'(?:calls|to_apply|branch_computations|true_computation|false_computation)='
  r'(?:\{([^}]*)\}|%?([\w.-]+))'
)


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


@dataclasses.dataclass(frozen=True)
class _Instruction:
  name: str
  shape: str
  op: str
  rest: str  # from the first operand on
  root: bool

  @property
  def operands(self) -> list[str]:
    return re.findall(r'%([\w.-]+)', self.rest.split(')')[0])

  def attribute(self, name: str) -> str:
    match = re.search(rf'\b{name}=%?([\w.-]+)', self.rest)
    return match[1] if match else ''


_Program = dict[str, dict[str, _Instruction]]


def collectives(text: str, devices: int) -> list[Collective]:
  """All collective operations of a program.

  A start and its done count once; so do the pieces of one that the TPU compiler spreads over
  fusions, in which it computes meanwhile. Operations in loops count with the loops' lengths, where
  the text tells them; of a conditional, all branches count.

  Args:
    text: of the compiled program, `jax.stages.Compiled.as_text()`.
    devices: that it runs on.
  """
  program, entry = _parse(text)
  found: dict[object, Collective] = {}
  for computation, count, fused in _calls(program, entry, 1):
    done = {i.operands[0]: i for i in computation.values() if i.op.endswith('-done')}
    for i in computation.values():
      kind = i.op.removesuffix('-start')
      if kind not in _KINDS:
        continue
      # What a start gives holds its operands, too.
      size = _bytes((done[i.name] if i.op != kind else i).shape)
      groups = _groups(i.rest, devices)
      if fused.startswith('all-reduce-scatter'):
        kind = 'reduce-scatter'  # what the TPU compiler makes of an all-reduce and a slice
      elif kind == 'reduce-scatter':
        size *= groups.shape[1]
      channel = re.search(r'channel_id=(\d+)', i.rest)
      key = channel[1] if fused and channel else len(found)
      found[key] = Collective(kind, size, groups, count)
  return [c for c in found.values() if c.groups.shape[1] > 1]


def _parse(text: str) -> tuple[_Program, str]:
  """Computation -> its instructions by name, and the name of the one that runs first."""
  program: _Program = {}
  entry = computation = ''
  for line in text.splitlines():
    if match := _INSTRUCTION.match(line):
      root, name, shape, op, rest = match.groups()
      program[computation][name] = _Instruction(name, shape, op, rest, bool(root))
    elif match := _COMPUTATION.match(line):
      computation = match[2]
      program[computation] = {}
      entry = computation if match[1] else entry
  return program, entry


def _calls(
  program: _Program, name: str, count: int | None, fused: str = ''
) -> Iterator[tuple[dict[str, _Instruction], int | None, str]]:
  """Every computation as it is called: its instructions, how often, and of a fusion the name."""
  computation = program[name]
  yield computation, count, fused
  for i in computation.values():
    if i.op == 'while':
      trips = _trips(program, computation, i)
      total = None if count is None or trips is None else count * trips
      yield from _calls(program, i.attribute('body'), total)
    else:
      for several, one in _CALLED.findall(i.rest):
        for called in re.findall(r'[\w.-]+', several or one):
          yield from _calls(program, called, count, called if i.op == 'fusion' else '')


def _trips(program: _Program, caller: dict[str, _Instruction], loop: _Instruction) -> int | None:
  """How often a loop runs; None: unknown."""
  if known := re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.rest):
    return int(known[1])
  # While x[n] < limit: x[n] += step.
  condition, body = (program[loop.attribute(key)] for key in ('condition', 'body'))
  (test,) = (i for i in condition.values() if i.root)
  if test.op != 'compare' or 'direction=LT' not in test.rest:
    return None
  counter, limit = (condition[name] for name in test.operands)
  number = counter.attribute('index')
  if counter.op != 'get-tuple-element' or not number:
    return None
  (results,) = (i for i in body.values() if i.root)
  (start,) = (caller[name] for name in loop.operands)
  if results.op != 'tuple' or start.op != 'tuple':
    return None
  add = body[results.operands[int(number)]]
  if add.op != 'add':
    return None
  before, step = (body[name] for name in add.operands)
  if before.attribute('index') != number:
    return None
  values = [
    _constant(condition, limit.name),
    _constant(caller, start.operands[int(number)]),
    _constant(body, step.name),
  ]
  if None in values:
    return None
  return -(-(values[0] - values[1]) // values[2])


def _constant(computation: dict[str, _Instruction], name: str) -> int | None:
  i = computation[name]
  while i.op == 'copy':
    i = computation[i.operands[0]]
  return int(i.rest.split(')')[0]) if i.op == 'constant' else None


def _bytes(shape: str) -> int:
  """Bytes of an array or of all in a tuple, such as (f32[2,3]{1,0}, bf16[])."""
  total = 0
  for kind, width, dims in re.findall(r'\b(pred|[a-z]+(\d+)\w*)\[([\d,]*)\]', shape):
    bits = 8 if kind == 'pred' else int(width)
    total += bits * math.prod(int(d) for d in dims.split(',') if d)
  return total // 8


def _groups(attributes: str, devices: int) -> np.ndarray:
  """Devices that work together, see `Collective.groups`."""
  if match := re.search(r'(?:replica_groups|source_target_pairs)=\{(\{.*?\})\}', attributes):
    return np.array([_numbers(g) for g in re.findall(r'\{(.*?)\}', match[1])])
  if match := re.search(r'replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?', attributes):
    shape, dims, order = (_numbers(g) for g in match.groups(''))
    return _iota(dims, order).reshape(shape)
  if match := re.search(
    r'replica_groups=mesh\[(.*?)\](?:, device_ids=\(\[([\d,]+)\](?:T\(([\d,]+)\))?\))? \{(.*?)\}',
    attributes,
  ):
    mesh, dims, order, axes = match.groups('')
    return _mesh_groups(mesh, _iota(_numbers(dims) or [devices], _numbers(order)), axes)
  if 'replica_groups={}' in attributes:
    return np.arange(devices)[None]
  raise ValueError(f'unknown form of groups: {attributes[:200]}')


def _iota(dims: list[int], order: list[int]) -> np.ndarray:
  """0, 1, 2, ... as an array, transposed."""
  return np.arange(math.prod(dims)).reshape(dims).transpose(order or range(len(dims)))


def _mesh_groups(mesh: str, numbers: np.ndarray, axes: str) -> np.ndarray:
  """Groups along axes of a mesh.

  Args:
    mesh: names and sizes, such as 'a'=8,'b'=2.
    numbers: of the devices, in the order of the mesh.
    axes: such as 'a','b', or 'a':(2)4 for the part of size 4 that has a part of size 2 before it.
  """
  parts = {name: _numbers(cut) for name, cut in re.findall(r"'(\w+)'(:\(\d+\)\d+)?", axes)}
  sizes, members = [], []
  for name, size in re.findall(r"'(\w+)'=(\d+)", mesh):
    if part := parts.get(name):
      members.append(len(sizes) + 1)
      sizes += [*part, int(size) // math.prod(part)]
    else:
      members += [len(sizes)] * (name in parts)
      sizes.append(int(size))
  others = [n for n in range(len(sizes)) if n not in members]
  grouped = numbers.reshape(sizes).transpose(others + members)
  return grouped.reshape(-1, math.prod(sizes[n] for n in members))


def _numbers(text: str) -> list[int]:
  return [int(n) for n in re.findall(r'\d+', text)]
