"""Event files, which TensorBoard shows.

tensorboard and PIL are imported where they are needed, so that `--help` stays fast.
"""

import io
import pathlib
import socket
import time
from collections.abc import Mapping
from typing import Any, cast

from hivit_jax.reporting.files import WholeFile


class EventFile:
  """A new event file without a buffer: an event is in the file when the call returns.

  TensorBoard's own EventFileWriter writes from a thread, so a kill could lose events; its record
  writer, on a file without a buffer, does not. Neither needs TensorFlow.
  """

  def __init__(self, directory: pathlib.Path, start_step: int):
    """Creates the file.

    Args:
      directory: where it goes; created if needed.
      start_step: the step that the run goes on from. TensorBoard drops the later events of the
        files before this one.

    Raises:
      OSError: the file cannot be written.
    """
    from tensorboard.compat.proto import event_pb2, summary_pb2
    from tensorboard.summary.writer.record_writer import RecordWriter

    # protobuf makes these classes at import: a type checker cannot see them.
    events, summaries = cast(Any, event_pb2), cast(Any, summary_pb2)
    self._event_type, self._summary = events.Event, summaries.Summary
    directory.mkdir(parents=True, exist_ok=True)
    now = time.time_ns()  # TensorBoard reads the files in the order of their names
    name = f'events.out.tfevents.{now // 10**9}.{socket.gethostname()}.{now}'
    self._records = RecordWriter(WholeFile(directory / name, 'xb'))
    self._write(file_version='brain.Event:2')
    start = events.SessionLog(status=events.SessionLog.START)
    self._write(step=start_step + 1, session_log=start)

  def write(self, step: int, scalars: Mapping[str, float]) -> None:
    values = [self._summary.Value(tag=tag, simple_value=value) for tag, value in scalars.items()]
    self._write(step=step, summary=self._summary(value=values))

  def write_image(self, step: int, tag: str, image: Any) -> None:
    from PIL import Image

    png = io.BytesIO()
    Image.fromarray(image.squeeze(2) if image.shape[2] == 1 else image).save(png, 'PNG')
    height, width, channels = image.shape
    picture = self._summary.Image(
      height=height, width=width, colorspace=channels, encoded_image_string=png.getvalue()
    )
    self._write(step=step, summary=self._summary(value=[{'tag': tag, 'image': picture}]))

  def close(self, error: BaseException | None = None) -> None:
    self._records.close()

  def _write(self, **fields: Any) -> None:
    self._records.write(self._event_type(wall_time=time.time(), **fields).SerializeToString())
