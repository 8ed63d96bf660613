"""The kernels that a training step spends its time in, from JAX's own profiler."""

import collections
import pathlib
import tempfile
import warnings
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax

from hivit_jax.tools.timing import TrainingStep


class Kernel(NamedTuple):
  """A kernel's part in a step.

  Attributes:
    name: of the kernel, or of the operation where the device runs no named kernels (CPU).
    calls: in a step.
    milliseconds: in a step, all calls together.
  """

  name: str
  calls: float
  milliseconds: float


def profile(step: TrainingStep, *, steps: int = 3) -> list[Kernel]:
  """The kernels of a step on the first device, the slowest first.

  Args:
    step: started already, so that nothing is compiled or allocated meanwhile.
    steps: to profile.

  Returns:
    Kernels by name; an empty list where the profiler sees none.
  """
  with tempfile.TemporaryDirectory() as folder:
    with jax.profiler.trace(folder):
      step.run(steps)
    files = list(pathlib.Path(folder).rglob('*.xplane.pb'))
    if not files:
      return []
    seconds: dict[str, float] = collections.defaultdict(float)
    calls: dict[str, int] = collections.defaultdict(int)
    data = jax.profiler.ProfileData.from_file(str(files[0]))
    for name, nanoseconds in _events(data):
      seconds[name] += nanoseconds * 1e-9
      calls[name] += 1
  kernels = [Kernel(n, calls[n] / steps, 1e3 * s / steps) for n, s in seconds.items()]
  return sorted(kernels, key=lambda kernel: -kernel.milliseconds)


def _events(data: Any) -> Iterator[tuple[str, float]]:
  """Names and nanoseconds of what ran on the first device."""
  planes = {plane.name: plane for plane in data.planes}
  device = next((name for name in sorted(planes) if name.startswith('/device:')), None)
  if device is not None:
    lines = list(planes[device].lines)
    # Streams of a GPU; the other lines sum up the same time by module or operation. A TPU has none.
    streams = [line for line in lines if line.name.startswith('Stream')]
    for line in streams or [line for line in lines if line.name == 'XLA Ops']:
      for event in line.events:
        yield event.name, event.duration_ns
  elif '/host:CPU' in planes:
    for line in planes['/host:CPU'].lines:
      for event in line.events:
        if _operation(event):
          yield event.name, event.duration_ns


def _operation(event: Any) -> bool:
  with warnings.catch_warnings():  # "builtin type event_stats has no __module__ attribute"
    warnings.simplefilter('ignore', DeprecationWarning)
    return any(key == 'hlo_op' for key, _ in event.stats)
