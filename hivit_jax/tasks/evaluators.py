"""What is measured or drawn between the steps of a run."""

import dataclasses
from collections.abc import Callable
from typing import Any


@dataclasses.dataclass(frozen=True)
class Evaluator:
  """Something done between steps: an accuracy, pictures.

  Attributes:
    every: steps from one time to the next; also done at the start and the end of the run.
    run: `(step, state) -> metrics`, which are logged. A signal to stop may interrupt it anywhere;
      the continued run then does it again.
  """

  every: int
  run: Callable[[int, Any], dict[str, float]]
