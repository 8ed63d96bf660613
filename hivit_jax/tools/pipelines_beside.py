"""Input pipelines of other frameworks, which run in turns with ours in a Python of their own."""

import contextlib
import json
import pathlib
import subprocess
import tempfile
from collections.abc import Iterator, Sequence

from hivit_jax.errors import UserError
from hivit_jax.tools import other_pipelines

# Side -> how it is called in a table.
SIDES = {
  'torchvision': 'torchvision, DataLoader',
  'tf.data': 'tf.data',
  'tf.data-aliased': 'tf.data, not antialiased',
}


class Beside:
  """One of `SIDES`, running, in another Python."""

  def __init__(self, python: str, side: str, folder: pathlib.Path, threads: int):
    """Starts it; UserError where that Python lacks its packages."""
    script = pathlib.Path(other_pipelines.__file__)
    try:
      self._process = subprocess.Popen(
        [python, str(script), side, str(folder), str(threads)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
      )
    except OSError as error:
      raise UserError(f'--beside={python}: {error.strerror}') from error
    if not self._answer():
      self.close()
      raise UserError(
        f'--beside={python}: its {side} pipeline did not start; it takes a Python with torch, '
        'torchvision and tensorflow'
      )

  def speeds(self, images: int) -> tuple[float, float]:
    """Images per second of CPU time and of wall-clock time."""
    assert self._process.stdin is not None
    self._process.stdin.write(f'{images}\n')
    self._process.stdin.flush()
    spent = json.loads(self._answer())
    return images / spent['cpu'], images / spent['wall']

  def _answer(self) -> str:
    assert self._process.stdout is not None
    return self._process.stdout.readline()

  def close(self) -> None:
    """Ends it."""
    self._process.kill()
    self._process.communicate()


@contextlib.contextmanager
def started(
  python: str | None, files: Sequence[bytes], threads: int
) -> Iterator[dict[str, Beside]]:
  """All of `SIDES` on these JPEG files, in a Python that has their packages; None: none of them."""
  with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
    for i, file in enumerate(files):
      pathlib.Path(folder, f'{i:04}.jpg').write_bytes(file)
    found = {}
    for side in SIDES if python else ():
      found[side] = Beside(python or '', side, pathlib.Path(folder), threads)
      stack.callback(found[side].close)
    yield found
