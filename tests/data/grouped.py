"""An order whose steps differ in shape, as detection needs it."""

import dataclasses
import functools

import numpy as np

from hivit_jax.data.order import generator


@dataclasses.dataclass(frozen=True)
class Grouped:
  """Steps of examples of one shape, which is known of each example before it is read.

  Every epoch covers all examples. Those that are missing in the last step of a shape are repeated
  from its beginning, `repeated` in all; the steps of an epoch are in random order.

  Attributes:
    shapes: Of the examples, by index.
    batch_size: Examples in a step.
    seed: Of the order.
  """

  shapes: tuple[tuple[int, int], ...]
  batch_size: int
  seed: int

  @property
  def repeated(self) -> int:
    return self.epoch_steps * self.batch_size - len(self.shapes)

  @property
  def epoch_steps(self) -> int:
    return len(_epoch(self, 0))

  def _step(self, step: int) -> np.ndarray:
    epoch, place = divmod(step, self.epoch_steps)
    return _epoch(self, epoch)[place]

  def example(self, position: int) -> int:
    step, row = divmod(position, self.batch_size)
    return int(self._step(step)[row])

  def replacement(self, position: int, rng: np.random.Generator) -> int:
    shape = self.shape(position // self.batch_size)
    return int(rng.choice([i for i, other in enumerate(self.shapes) if other == shape]))

  def shape(self, step: int) -> tuple[int, int]:
    return self.shapes[self._step(step)[0]]

  def given(self, position: int, index: int) -> dict:
    return {'shape': self.shape(position // self.batch_size)}


@functools.lru_cache(maxsize=4)
def _epoch(order: Grouped, epoch: int) -> np.ndarray:
  """Indices (steps, batch_size)."""
  rng = generator(order.seed, 2**63 + epoch)
  steps = []
  for shape in sorted(set(order.shapes)):
    members = rng.permutation([i for i, other in enumerate(order.shapes) if other == shape])
    count = -(-len(members) // order.batch_size)
    steps.append(np.resize(members, (count, order.batch_size)))
  return rng.permutation(np.concatenate(steps))
