"""The order of training: which example stands where in the endless stream, and the shape of a step.

Position p of the stream belongs to step p // batch_size. An order is a pure function of a seed and
of metadata, so every host knows all of it, and any step can be loaded without those before it.
"""

import dataclasses
import functools
from typing import Protocol

import numpy as np


class Order(Protocol):
  """Which examples are trained on, one after the other, without end. Picklable."""

  def example(self, position: int) -> int:
    """Returns the index in the source of the example at a position of the stream."""
    ...

  def replacement(self, position: int, rng: np.random.Generator) -> int:
    """Returns the index of an example to try where that of a position is broken.

    Args:
      position: Where in the stream; what is returned must fit the shape of that step.
      rng: Random numbers of this position; they go on to the augmentation.
    """
    ...

  def shape(self, step: int) -> tuple[int, ...] | None:
    """Returns what the transform is given as `shape` in this step; None for a single shape."""
    ...


@dataclasses.dataclass(frozen=True)
class Shuffled:
  """Epoch after epoch, each a fresh permutation of all examples; all steps have one shape.

  An epoch may end inside a step.

  Attributes:
    length: Number of examples.
    seed: 0 <= seed < 2**63.
  """

  length: int
  seed: int

  def example(self, position: int) -> int:
    epoch, place = divmod(position, self.length)
    return int(epoch_order(self.length, self.seed, epoch)[place])

  def replacement(self, position: int, rng: np.random.Generator) -> int:
    return int(rng.integers(self.length))

  def shape(self, step: int) -> None:
    return None


@functools.lru_cache(maxsize=4)
def epoch_order(num_examples: int, seed: int, epoch: int) -> np.ndarray:
  """Returns the permutation of an epoch, int32 (num_examples,); 45 ms for ImageNet, then kept."""
  # Positions stay below 2**63, so no example shares its key with an order.
  return generator(seed, 2**63 + epoch).permutation(np.arange(num_examples, dtype=np.int32))


def generator(seed: int, stream: int) -> np.random.Generator:
  """Returns independent generators for every (seed, stream): the two halves of Philox's key."""
  return np.random.Generator(np.random.Philox(key=np.array([seed, stream], np.uint64)))
