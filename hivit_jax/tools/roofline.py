"""How long a step would take if it ran at the rates that chips are sold with."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Chip:
  """What is published of one chip.

  Attributes:
    flops: bfloat16 operations a second.
    hbm: bytes of memory for a program: what libtpu 0.0.42 leaves of the published size.
    hbm_bandwidth: bytes a second.
    ici_bandwidth: bytes a second that it can send to other chips of its slice, all links together;
      half of what the documents call bidirectional.
    pod: chips in the largest slice.
    clock: of its cores, a second: what `flops` are of the products that they start in a cycle, by
      the sizes of their matrix units; None: those do not explain them.
  """

  flops: float
  hbm: float
  hbm_bandwidth: float
  ici_bandwidth: float
  pod: int
  clock: float | None


_GIB = 2**30

# From https://docs.cloud.google.com/tpu/docs/v4, .../v5e, .../v5p-training and .../v6e.
CHIPS = {
  # Of the interconnect only the pod's all-reduce bandwidth is published: 1.1 PB/s.
  'v4': Chip(275e12, 30.75 * _GIB, 1200e9, 1.1e15 / 4096, 4096, 1.05e9),
  'v5e': Chip(197e12, 15.75 * _GIB, 819e9, 200e9, 256, 1.5e9),
  'v5p': Chip(459e12, 95.74 * _GIB, 2765e9, 600e9, 8960, 1.75e9),
  'v6e': Chip(918e12, 31.25 * _GIB, 1638e9, 400e9, 256, None),
}


def estimate(
  chip: Chip, *, flops: float, traffic: float, sent: float, cycles: int
) -> dict[str, float | str | None]:
  """Seconds of a step.

  Args:
    chip: that it runs on.
    flops: in matrix products, on each chip.
    traffic: bytes that each chip reads from and writes to its memory.
    sent: bytes that each chip sends to others.
    cycles: of a core, by the compiler's estimate.

  Returns:
    `products`, `memory`, `network`: seconds that each takes by itself at the published rate, and
    the name of the longest as `limiter`; `overlapped`: of a step in which the others happen
    meanwhile (the longest), `serial`: in which nothing overlaps (their sum); `schedule`: by the
    compiler's cycles, None if they or the clock are not known.
  """
  seconds = {
    'products': flops / chip.flops,
    'memory': traffic / chip.hbm_bandwidth,
    'network': sent / chip.ici_bandwidth,
  }
  limiter = max(seconds, key=seconds.__getitem__)
  return seconds | {
    'limiter': limiter,
    'overlapped': seconds[limiter],
    'serial': sum(seconds.values()),
    'schedule': cycles / chip.clock if cycles and chip.clock else None,
  }
