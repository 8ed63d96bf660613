"""Compiled programs as text (HLO): their instructions, and how often each runs."""

import dataclasses
import functools
import math
import re
from collections.abc import Iterator

_INSTRUCTION = re.compile(r'\s+(ROOT )?%?([\w.-]+) = (.*?) ([a-z][a-z-]*)\((.*)')
_COMPUTATION = re.compile(r'(ENTRY )?%?([\w.-]+) \(.*\{$')
_CALLED = re.compile(
  r'(?:calls|to_apply|branch_computations|true_computation|false_computation)='
  r'(?:\{([^}]*)\}|%?([\w.-]+))'
)
_ARRAY = re.compile(r'\b(pred|[a-z]+(\d+)\w*)\[([\d,]*)\](?:\{([^}]*)\})?')


@dataclasses.dataclass(frozen=True)
class Instruction:
  """A line of a computation.

  Attributes:
    name: unique in its computation.
    shape: of what it gives, such as f32[2,3]{1,0} or a tuple of such.
    op: what it does.
    rest: operands and attributes, as in the text.
    root: whether the computation gives what this gives.
  """

  name: str
  shape: str
  op: str
  rest: str
  root: bool

  @functools.cached_property
  def operands(self) -> list[str]:
    return re.findall(r'%([\w.-]+)', self.rest.split(')')[0])

  def attribute(self, name: str) -> str:
    match = re.search(rf'\b{name}=%?([\w.-]+)', self.rest)
    return match[1] if match else ''

  def called(self) -> list[str]:
    """Names of the computations that it runs, but for a loop's."""
    return [
      name
      for several, one in _CALLED.findall(self.rest)
      for name in re.findall(r'[\w.-]+', several or one)
    ]


Computation = dict[str, Instruction]


@dataclasses.dataclass(frozen=True)
class Call:
  """A computation as it is called.

  Attributes:
    computation: instructions by name.
    count: how often, in one run of the program; None: in a loop of unknown length.
    parts: the name of the computation, if it is the inside of one instruction (a fusion, what a
      reduction applies) whose parts do not run one by one; else ''.
  """

  computation: Computation
  count: int | None
  parts: str


class Program:
  """A program from the text of `jax.stages.Compiled.as_text()`."""

  def __init__(self, text: str):
    self.computations: dict[str, Computation] = {}
    self._entry = computation = ''
    for line in text.splitlines():
      if match := _INSTRUCTION.match(line):
        root, name, shape, op, rest = match.groups()
        instruction = Instruction(name, shape, op, rest, bool(root))
        self.computations[computation][name] = instruction
      elif match := _COMPUTATION.match(line):
        computation = match[2]
        self.computations[computation] = {}
        self._entry = computation if match[1] else self._entry

  def calls(self) -> Iterator[Call]:
    """Every computation, once for each place that it is called from; of branches, all."""
    yield from self._calls(self._entry, 1, '')

  def _calls(self, name: str, count: int | None, parts: str) -> Iterator[Call]:
    computation = self.computations[name]
    yield Call(computation, count, parts)
    for i in computation.values():
      if i.op == 'while':
        trips = self._trips(computation, i)
        total = None if count is None or trips is None else count * trips
        yield from self._calls(i.attribute('body'), total, '')
      else:
        whole = i.op in ('call', 'conditional', 'async-start')
        for called in i.called():
          yield from self._calls(called, count, '' if whole else called)

  def _trips(self, caller: Computation, loop: Instruction) -> int | None:
    """How often a loop runs; None: unknown."""
    if known := re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.rest):
      return int(known[1])
    # What loops of a known length look like otherwise: while x[n] < limit: x[n] += step.
    condition = self.computations[loop.attribute('condition')]
    body = self.computations[loop.attribute('body')]
    test, results, start = root(condition), root(body), caller[loop.operands[0]]
    if (test.op, results.op, start.op) != ('compare', 'tuple', 'tuple'):
      return None
    counter, limit = (condition[name] for name in test.operands)
    if counter.op != 'get-tuple-element' or 'direction=LT' not in test.rest:
      return None
    n = int(counter.attribute('index'))
    add = body[results.operands[n]]
    if add.op != 'add' or body[add.operands[0]].attribute('index') != str(n):
      return None
    first = _constant(caller, start.operands[n])
    last = _constant(condition, limit.name)
    step = _constant(body, add.operands[1])
    if first is None or last is None or step is None:
      return None
    return -(-(last - first) // step)


def root(computation: Computation) -> Instruction:
  """What a computation gives."""
  return next(i for i in computation.values() if i.root)


def _constant(computation: Computation, name: str) -> int | None:
  i = computation[name]
  while i.op == 'copy':
    i = computation[i.operands[0]]
  return int(i.rest.split(')')[0]) if i.op == 'constant' else None


def arrays(shape: str) -> list[str]:
  """The arrays of a tuple, or the one that is none."""
  return [match[0] for match in _ARRAY.finditer(shape)]


def size(shape: str) -> int:
  """Bytes of an array or of all in a tuple, such as (f32[2,3]{1,0}, bf16[])."""
  total = 0
  for kind, width, dims, _ in _ARRAY.findall(shape):
    total += _bits(kind, width) * math.prod(numbers(dims))
  return total // 8


def size_in_memory(shape: str) -> int:
  """As `size`, of the arrays in main memory only, with what fills their tiles up.

  A layout such as {0,1:T(8,128)S(1)} has the order of the axes, the one with neighbours in memory
  first, a tile of the first two, and the memory, if it is not the main one.
  """
  total = 0
  for kind, width, dims, layout in _ARRAY.findall(shape):
    if re.search(r'S\([1-9]', layout):
      continue
    sides = numbers(dims)
    order, _, rest = layout.partition(':')
    sides = [sides[axis] for axis in numbers(order)]
    tile = re.match(r'T\(([\d,]+)\)', rest)
    for axis, side in enumerate(reversed(numbers(tile[1]) if tile else [])):
      if axis < len(sides):
        sides[axis] = -(-sides[axis] // side) * side
    total += _bits(kind, width) * math.prod(sides)
  return total // 8


def _bits(kind: str, width: str) -> int:
  return 8 if kind == 'pred' else int(width)


def numbers(text: str) -> list[int]:
  """The numbers in a text."""
  return [int(n) for n in re.findall(r'\d+', text)]
