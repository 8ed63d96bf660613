"""How long a step would take at the published rates of a chip."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Gpu:
  """What XLA's CUDA compiler must know about a chip that is not there."""

  name: str  # in the driver's words
  capability: int  # major version of the compute capability
  cores: int  # streaming multiprocessors
  clock: float  # GHz
  l2: int  # bytes of the cache that the cores share
  shared_memory: tuple[int, int]  # bytes of a core, and what one block can get of them
  float32_units: int  # of a core


@dataclasses.dataclass(frozen=True)
class Chip:
  """Published rates of one chip.

  Attributes:
    flops: bfloat16 operations a second.
    hbm: bytes of memory for a program: what libtpu 0.0.42 leaves of the published size; of a GPU
      everything that the driver reports.
    hbm_bandwidth: bytes a second.
    ici_bandwidth: bytes a second that it can send to other chips of its slice, of a GPU by NVLink,
      all links together; half of what the documents call bidirectional.
    pod: chips in the largest slice, GPUs in a machine.
    gpu: None: a TPU.
  """

  flops: float
  hbm: float
  hbm_bandwidth: float
  ici_bandwidth: float
  pod: int
  gpu: Gpu | None = None


_GIB, _MIB = 2**30, 2**20

# From https://docs.cloud.google.com/tpu/docs/v4, .../v5e, .../v5p-training and .../v6e.
CHIPS = {
  # Of the interconnect only the pod's all-reduce bandwidth is published: 1.1 PB/s.
  'v4': Chip(275e12, 30.75 * _GIB, 1200e9, 1.1e15 / 4096, 4096),
  'v5e': Chip(197e12, 15.75 * _GIB, 819e9, 200e9, 256),
  'v5p': Chip(459e12, 95.74 * _GIB, 2765e9, 600e9, 8960),
  'v6e': Chip(918e12, 31.25 * _GIB, 1638e9, 400e9, 256),
  # SXM modules. Rates from NVIDIA's data sheets, without sparsity; the rest as XLA keeps it in
  # xla/backends/gpu/target_config/specs.
  'a100': Chip(
    312e12, 85100068864, 2039e9, 300e9, 8,
    Gpu('NVIDIA A100-SXM4-80GB', 8, 108, 1.41, 40 * _MIB, (167936, 166912), 64),
  ),
  'h100': Chip(
    989e12, 84929347584, 3352e9, 450e9, 8,
    Gpu('NVIDIA H100 80GB HBM3', 9, 132, 1.98, 50 * _MIB, (233472, 232448), 128),
  ),
  'h200': Chip(
    989e12, 151397597184, 4800e9, 450e9, 8,
    Gpu('NVIDIA H200', 9, 132, 1.98, 50 * _MIB, (233472, 232448), 128),
  ),
}  # fmt: skip


def estimate(chip: Chip, *, flops: float, traffic: float, sent: float) -> dict[str, float | str]:
  """Seconds of a step.

  Args:
    chip: that it runs on.
    flops: in matrix products, on each chip.
    traffic: bytes that each chip reads from and writes to its memory.
    sent: bytes that each chip sends to others.

  Returns:
    `products`, `memory`, `network`: seconds that each takes alone at the published rate, and
    the name of the longest as `limiter`; `overlapped`: of a step in which the others happen
    meanwhile (the longest), `serial`: in which nothing overlaps (their sum).
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
  }
