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
    source: where these figures stand.
  """

  flops: float
  hbm: float
  hbm_bandwidth: float
  ici_bandwidth: float
  pod: int
  source: str


_GIB = 2**30
_DOCS = 'https://docs.cloud.google.com/tpu/docs/'

CHIPS = {
  # Of the interconnect only the pod's all-reduce bandwidth is published: 1.1 PB/s.
  'v4': Chip(275e12, 30.75 * _GIB, 1200e9, 1.1e15 / 4096, 4096, f'{_DOCS}v4'),
  'v5e': Chip(197e12, 15.75 * _GIB, 819e9, 200e9, 256, f'{_DOCS}v5e'),
  'v5p': Chip(459e12, 95.74 * _GIB, 2765e9, 600e9, 8960, f'{_DOCS}v5p-training'),
  'v6e': Chip(918e12, 31.25 * _GIB, 1638e9, 400e9, 256, f'{_DOCS}v6e'),
}


def estimate(chip: Chip, *, flops: float, hbm_bytes: float, sent: float) -> dict[str, float | str]:
  """Seconds of a step.

  Args:
    chip: that it runs on.
    flops: in matrix products, on each chip.
    hbm_bytes: that each chip reads from and writes to its memory.
    sent: bytes that each chip sends to others.

  Returns:
    `products`, `memory`, `network`: seconds that each takes by itself at the published rate;
    `overlapped`: of the step if the others happen meanwhile (the longest), `serial`: if nothing
    overlaps (their sum), and the name of the longest as `limiter`.
  """
  seconds = {
    'products': flops / chip.flops,
    'memory': hbm_bytes / chip.hbm_bandwidth,
    'network': sent / chip.ici_bandwidth,
  }
  limiter = max(seconds, key=seconds.__getitem__)
  return seconds | {
    'overlapped': seconds[limiter],
    'serial': sum(seconds.values()),
    'limiter': limiter,
  }
