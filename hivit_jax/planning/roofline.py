"""How long a step would take if it ran at the rates that chips are sold with."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Gpu:
  """What XLA's CUDA compiler asks about a chip that is not there.

  Attributes:
    name: as the driver tells it.
    capability: the major version of its compute capability.
    cores: streaming multiprocessors.
    clock: of these, in GHz.
    l2: bytes of the cache that they share.
    shared_memory: bytes that each has, and of these what one block can get.
    float32_units: in each.
  """

  name: str
  capability: int
  cores: int
  clock: float
  l2: int
  shared_memory: tuple[int, int]
  float32_units: int


@dataclasses.dataclass(frozen=True)
class Chip:
  """What is published of one chip.

  Attributes:
    flops: bfloat16 operations a second.
    hbm: bytes of memory for a program: what libtpu 0.0.42 leaves of the published size; of a GPU
      all that the driver tells.
    hbm_bandwidth: bytes a second.
    ici_bandwidth: bytes a second that it can send to other chips of its slice, of a GPU by NVLink,
      all links together; half of what the documents call bidirectional.
    pod: chips in the largest slice, GPUs in a machine.
    clock: of its cores, a second: what `flops` are of the products that they start in a cycle, by
      the sizes of their matrix units; None: those do not explain them, or the compiler of such
      chips counts no cycles.
    gpu: None: a TPU.
  """

  flops: float
  hbm: float
  hbm_bandwidth: float
  ici_bandwidth: float
  pod: int
  clock: float | None
  gpu: Gpu | None = None


_GIB, _MIB = 2**30, 2**20

# From https://docs.cloud.google.com/tpu/docs/v4, .../v5e, .../v5p-training and .../v6e.
CHIPS = {
  # Of the interconnect only the pod's all-reduce bandwidth is published: 1.1 PB/s.
  'v4': Chip(275e12, 30.75 * _GIB, 1200e9, 1.1e15 / 4096, 4096, 1.05e9),
  'v5e': Chip(197e12, 15.75 * _GIB, 819e9, 200e9, 256, 1.5e9),
  'v5p': Chip(459e12, 95.74 * _GIB, 2765e9, 600e9, 8960, 1.75e9),
  'v6e': Chip(918e12, 31.25 * _GIB, 1638e9, 400e9, 256, None),
  # SXM modules. Rates from NVIDIA's data sheets, without sparsity; the rest as XLA keeps it in
  # xla/backends/gpu/target_config/specs.
  'a100': Chip(
    312e12, 85100068864, 2039e9, 300e9, 8, None,
    Gpu('NVIDIA A100-SXM4-80GB', 8, 108, 1.41, 40 * _MIB, (167936, 166912), 64),
  ),
  'h100': Chip(
    989e12, 84929347584, 3352e9, 450e9, 8, None,
    Gpu('NVIDIA H100 80GB HBM3', 9, 132, 1.98, 50 * _MIB, (233472, 232448), 128),
  ),
  'h200': Chip(
    989e12, 151397597184, 4800e9, 450e9, 8, None,
    Gpu('NVIDIA H200', 9, 132, 1.98, 50 * _MIB, (233472, 232448), 128),
  ),
}  # fmt: skip


def estimate(
  chip: Chip, *, flops: float, traffic: float, sent: float, schedule: float | None
) -> dict[str, float | str | None]:
  """Seconds of a step.

  Args:
    chip: that it runs on.
    flops: in matrix products, on each chip.
    traffic: bytes that each chip reads from and writes to its memory.
    sent: bytes that each chip sends to others.
    schedule: seconds of a more detailed estimate.

  Returns:
    `products`, `memory`, `network`: seconds that each takes by itself at the published rate, and
    the name of the longest as `limiter`; `overlapped`: of a step in which the others happen
    meanwhile (the longest), `serial`: in which nothing overlaps (their sum); `schedule`.
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
    'schedule': schedule,
  }
