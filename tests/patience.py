"""Time limits that grow with what else the machine does."""

import os
import time
from collections.abc import Callable


def limit(seconds: float) -> float:
  """Seconds to allow now for what takes at most `seconds` on an idle machine.

  At least twice as many: the load is an average over the last minute, and lags behind.
  """
  load_per_core = os.getloadavg()[0] / (os.cpu_count() or 1)
  return 2 * seconds * max(1.0, load_per_core)


def wait_until(condition: Callable[[], bool], seconds: float, interval: float = 0.02) -> bool:
  """Whether the condition comes to hold in time, by a limit that follows the load."""
  start = time.monotonic()
  while not condition():
    if time.monotonic() - start > limit(seconds):
      return condition()
    time.sleep(interval)
  return True
