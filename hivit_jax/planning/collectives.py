"""What a compiled program sends between devices."""

import math
import re
from collections.abc import Iterator
from typing import Any

_KINDS = 'all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute'
_COMPUTATION = re.compile(r'(ENTRY )?%?([\w.-]+) \(.*\{$')
_COLLECTIVE = re.compile(rf' = (.*?) ({_KINDS})(?:-start)?\((.*?)\)(.*)')
_CALLED = re.compile(
  r'\b(calls|to_apply|body|branch_computations|true_computation|false_computation)='
  r'(?:\{([^}]*)\}|%?([\w.-]+))'
)
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"')
_ARRAY = re.compile(r'\b(pred|[a-z]+(\d+)\w*)\[([\d,]*)\]')


def collectives(text: str, devices: int) -> list[dict[str, Any]]:
  """All that one run of a program sends, in total by kind and by devices in a group.

  A start and its done count once; so do the pieces of one that the TPU compiler spreads over
  fusions, in which it computes meanwhile.

  Args:
    text: of the compiled program, from `jax.stages.Compiled.as_text()`.
    devices: that it runs on.

  Returns:
    The most sent first: `kind`, such as all-reduce; `devices` in a group; `count`; `bytes` of the
    arrays that a group has in common (the result of an all-gather, the operand of a
    reduce-scatter); `sent`, bytes by each device with the ring algorithm; `complete`: False if some
    are in a loop of unknown length, and count once.
  """
  totals: dict[tuple[str, int], dict[str, Any]] = {}
  pieces = set()
  for line, count, fusion in _lines(text):
    if not (match := _COLLECTIVE.search(line)):
      continue
    shape, kind, operands, attributes = match.groups()
    sizes, names = _sizes(shape), operands.count('%')
    if len(sizes) > names:  # of a start: operands, results, and more
      sizes = sizes[names : 2 * names]
    size, members = sum(sizes), _members(kind, attributes, devices)
    if fusion.startswith('all-reduce-scatter'):
      kind = 'reduce-scatter'  # what the TPU compiler makes of an all-reduce and a slice
    elif kind == 'reduce-scatter':
      size *= members
    elif fusion:
      piece = kind, size, *re.findall(r'channel_id=\d+', attributes)
      if piece in pieces:
        continue
      pieces.add(piece)
    if members == 1:
      continue
    row = {'kind': kind, 'devices': members, 'count': 0, 'bytes': 0, 'sent': 0.0, 'complete': True}
    row = totals.setdefault((kind, members), row)
    times = count or 1
    ring = (members - 1) / members * (2 if kind == 'all-reduce' else 1)
    row['count'] += times
    row['bytes'] += times * size
    row['sent'] += times * size * (1 if kind == 'collective-permute' else ring)
    row['complete'] &= count is not None
  return sorted(totals.values(), key=lambda row: -row['sent'])


def _lines(text: str) -> Iterator[tuple[str, int | None, str]]:
  """Instructions as they run: their text, how often (None: unknown), and the fusion around."""
  computations: dict[str, list[str]] = {}
  entry = name = ''
  for line in text.splitlines():
    if match := _COMPUTATION.match(line):
      name = match[2]
      computations[name] = []
      entry = name if match[1] else entry
    elif name:
      computations[name].append(line)

  def visit(name: str, count: int | None, fusion: str) -> Iterator[tuple[str, int | None, str]]:
    for line in computations[name]:
      yield line, count, fusion
      for kind, several, one in _CALLED.findall(line):
        trips = _TRIPS.findall(line) if kind == 'body' else [1]
        total = count * int(trips[0]) if count is not None and trips else None
        for called in re.findall(r'[\w.-]+', several or one):
          yield from visit(called, total, fusion or called * (' fusion(' in line))

  return visit(entry, 1, '')


def _sizes(shape: str) -> list[int]:
  """Bytes of each array in a tuple, or of the one that is none: (f32[2,3]{1,0}, bf16[])."""
  return [
    (8 if kind == 'pred' else int(bits)) * math.prod(map(int, re.findall(r'\d+', sides))) // 8
    for kind, bits, sides in _ARRAY.findall(shape)
  ]


def _members(kind: str, attributes: str, devices: int) -> int:
  """How many devices work together in a group."""
  if kind == 'collective-permute':
    return 2
  if match := re.search(r'replica_groups=\{\{([\d,]+)\}', attributes):
    return 1 + match[1].count(',')
  if match := re.search(r'replica_groups=\[\d+,(\d+)\]', attributes):
    return int(match[1])
  if match := re.search(r'replica_groups=mesh\[(.*?)\].*? \{(.*?)\}', attributes):
    # Such as mesh['a'=8,'b'=2] {'a':(2)4,'b'}: of a the part of size 4 that comes after one of 2.
    sizes = dict(re.findall(r"'(\w+)'=(\d+)", match[1]))
    axes = re.findall(r"'(\w+)'(?::\(\d+\)(\d+))?", match[2])
    return math.prod(int(part or sizes[axis]) for axis, part in axes)
  if 'replica_groups={}' in attributes:
    return devices
  raise ValueError(f'unknown form of groups: {attributes[:200]}')
