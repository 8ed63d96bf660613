"""Files that a kill or a full disk leaves in order."""

import io
import pathlib


class WholeFile(io.FileIO):
  """A file without a buffer: a write takes everything, or raises OSError."""

  def write(self, data) -> int:
    rest = memoryview(data)
    while rest:  # when a disk becomes full, the system takes a part without a word
      rest = rest[super().write(rest) :]
    return len(data)


def replace(path: pathlib.Path, content: bytes) -> None:
  """Writes a file so that a reader, and a kill, find either the old or the new content."""
  temporary = path.with_name(f'{path.name}.tmp')
  temporary.write_bytes(content)
  temporary.replace(path)
