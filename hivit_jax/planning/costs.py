"""What the instructions of a compiled program cost."""

import math
import re
from collections.abc import Iterator

from hivit_jax.planning import hlo

# What moves nothing by itself.
_FREE = {
  'parameter', 'constant', 'tuple', 'get-tuple-element', 'bitcast', 'while', 'conditional', 'call',
  'partition-id', 'replica-id', 'after-all', 'opt-barrier', 'async-start', 'async-done',
}  # fmt: skip
_UNKNOWN_CYCLES = 2**63 - 1
_COMMUNICATION = ('all-', 'reduce-scatter', 'collective-')


def memory_traffic(program: hlo.Program) -> int:
  """Bytes that a program reads from and writes to a device's main memory.

  Every instruction reads its operands and writes its results, but for those that the compiler keeps
  in the memory on the core; a slice of an array moves only itself. Unlike the "bytes accessed" of
  `jax.stages.Compiled.cost_analysis`, which knows neither of that memory nor of loops. Loops of
  unknown length count once.
  """
  return sum(moved * count for _, moved, count in _instructions(program))


def kernel_seconds(program: hlo.Program, flops: float, bandwidth: float) -> float:
  """How long a GPU takes for a program if each kernel is as fast as the chip allows.

  Kernels run one after another, and each either computes or moves its operands and results,
  whatever takes longer. What they do besides matrix products, starting them, and communication
  take no time.

  Args:
    program: compiled for GPUs.
    flops: operations in matrix products a second.
    bandwidth: bytes a second.
  """
  return sum(
    count * max(moved / bandwidth, _products(program, i) / flops)
    for i, moved, count in _instructions(program)
    if not i.op.startswith(_COMMUNICATION)
  )


def _instructions(program: hlo.Program) -> Iterator[tuple[hlo.Instruction, int, int]]:
  """What runs by itself, the bytes that it moves, and how often."""
  for call in program.calls():
    if call.parts:
      continue
    for i in call.computation.values():
      if i.op not in _FREE and not i.op.endswith('-done'):
        yield i, _moved(program, call.computation, i), call.count or 1


def _products(program: hlo.Program, i: hlo.Instruction) -> int:
  """Operations in the matrix products of an instruction that is a fusion of some."""
  total = 0
  for name in i.called():
    inside = program.computations[name]
    for part in inside.values():
      if part.op == 'dot':
        lhs = _sides(inside[part.operands[0]].shape)
        contracted = re.search(r'lhs_contracting_dims=\{([\d,]*)\}', part.rest)
        axes = hlo.numbers(contracted[1]) if contracted else []
        total += 2 * math.prod(_sides(part.shape)) * math.prod(lhs[axis] for axis in axes)
  return total


def _sides(shape: str) -> list[int]:
  return hlo.numbers(shape[shape.index('[') : shape.index(']')])


def core_cycles(program: hlo.Program) -> tuple[int, int]:
  """Clock cycles that the TPU compiler expects a core to take, network aside; 0: it says none.

  Also how many of the instructions that run it gives no number for, but one that means unknown.
  """
  total = unknown = 0
  for call in program.calls():
    if not call.parts:
      for i in call.computation.values():
        if estimated := re.search(r'"estimated_cycles":"(\d+)"', i.rest):
          cycles = int(estimated[1])
          if cycles < _UNKNOWN_CYCLES:
            total += cycles * (call.count or 1)
          else:
            unknown += call.count or 1
  return total, unknown


def _moved(program: hlo.Program, computation: hlo.Computation, i: hlo.Instruction) -> int:
  if i.op == 'slice-start':
    return hlo.size(hlo.arrays(i.shape)[1])  # after the operand
  if i.op.endswith('-start'):
    return hlo.size_in_memory(i.shape)  # in which the operands are, too
  if i.op in ('slice', 'dynamic-slice', 'gather'):
    return 2 * hlo.size_in_memory(i.shape)
  operands = [computation[name].shape for name in i.operands]
  if i.op == 'dynamic-update-slice':
    return 2 * hlo.size_in_memory(operands[1])
  if i.op == 'fusion':
    return _moved_by_fusion(program.computations[i.called()[0]], i, operands)
  return sum(map(hlo.size_in_memory, [i.shape, *operands]))


def _moved_by_fusion(inside: hlo.Computation, i: hlo.Instruction, operands: list[str]) -> int:
  total = 0
  for part in inside.values():
    if part.op == 'parameter':
      whole = hlo.size_in_memory(operands[hlo.numbers(part.rest)[0]])
      users = [user for user in inside.values() if part.name in user.operands]
      if users and all(_touches_slice(user, part) for user in users):
        read = sum(hlo.size(user.shape) for user in users if user.op == 'dynamic-slice')
        total += min(whole, read)
      else:
        total += whole
  total += hlo.size_in_memory(i.shape)
  root, shapes = hlo.root(inside), hlo.arrays(i.shape)
  results = root.operands if root.op == 'tuple' else [root.name]
  if len(results) == len(shapes):
    for name, shape in zip(results, shapes, strict=True):
      if inside[name].op == 'dynamic-update-slice':
        written = hlo.size(inside[inside[name].operands[1]].shape)
        total -= max(0, hlo.size_in_memory(shape) - written)
  return total


def _touches_slice(user: hlo.Instruction, array: hlo.Instruction) -> bool:
  slicing = user.op in ('dynamic-slice', 'dynamic-update-slice')
  return slicing and user.operands[0] == array.name
