"""The contract of everything that metrics are written to."""

from collections.abc import Mapping
from typing import Any, Protocol


class Writer(Protocol):
  """A place where metrics go.

  A file has what is written when the call returns; a service may have it later.
  """

  def write(self, step: int, scalars: Mapping[str, int | float]) -> None:
    """Writes numbers by name, NaN and infinities too."""

  def write_image(self, step: int, tag: str, image: Any) -> None:
    """Writes a picture, (H, W, C) uint8 with C one of 1, 3, 4; or ignores it."""

  def close(self, error: BaseException | None = None) -> None:
    """Nothing is written any more; `error` is what ended the run, None if it finished."""
