"""A TFDS builder that can be killed at any moment and continues where it stopped.

TFDS's own `download_and_prepare` writes into a folder of random name that it deletes on failure,
and starts from nothing the next time. Here every shard is a file that appears complete under its
final name or not at all, in a folder that becomes the data set by one rename at the very end.
"""

import abc
import contextlib
import dataclasses
import fcntl
import hashlib
import json
import logging
import os
import shutil
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from array_record.python.array_record_module import ArrayRecordReader, ArrayRecordWriter
from tensorflow_datasets.core import constants
from tensorflow_datasets.core.dataset_builder import FileReaderBuilder

from hivit_jax.data.sources import splits
from hivit_jax.data.sources import tfds as tfds_source
from hivit_jax.errors import UserError
from hivit_jax.reporting.console import Progress

_log = logging.getLogger(__name__)

_PLAN_FILE = 'preparation.json'


@dataclasses.dataclass(frozen=True)
class SplitContent:
  """The examples of one split before they are written.

  Attributes:
    names: file name of each example, unique; they settle the order on disk.
    examples: reads one example as a dict of features; called from several threads.
    num_bytes: about how many bytes they take, to check the free space beforehand.
    scenes: (n, 3) int32, see `sources.base.Source`; None: not known.
  """

  names: Sequence[str]
  examples: Sequence[Mapping[str, Any]]
  num_bytes: int
  scenes: np.ndarray | None = None

  @classmethod
  def of(cls, examples: Sequence[Mapping[str, Any]]) -> 'SplitContent':
    """Examples that are in memory."""
    names = [example['file_name'] for example in examples]
    return cls(names, examples, sum(len(example['image']) for example in examples))


class _Info(tfds.core.DatasetInfo):
  """A data set as our code and its folder describe it."""

  def initialize_from_bucket(self) -> None:
    """Does not look for the set on TFDS's server, which leaves an empty folder in /tmp."""


class ShardedBuilder(FileReaderBuilder, skip_registration=True):
  """Writes the splits of a data set as ArrayRecord shards, shuffled by a hash of the file names.

  The shuffle is fixed: the same images give the same bytes, whatever they were read from, and any
  slice of a split is a random subset. TFDS reads the result (`tfds.builder_from_directory`).
  """

  EXAMPLES_PER_SHARD = 2500

  def __init__(self, *, data_dir: str | None = None, examples_per_shard: int | None = None):
    """Reads what is there already; prepares nothing.

    Args:
      data_dir: folder of prepared data sets; default TFDS's own.
      examples_per_shard: about how many examples go into a file.

    Raises:
      UserError: if the set is there already, in another format than ArrayRecord.
    """
    if examples_per_shard is not None and examples_per_shard < 1:
      raise UserError(f'examples_per_shard must be at least 1, got {examples_per_shard}')
    self._examples_per_shard = examples_per_shard or self.EXAMPLES_PER_SHARD
    root = Path(data_dir or constants.DATA_DIR).expanduser()
    folder = root / self.name / str(self.VERSION)
    formats = tfds_source.file_formats(folder)
    if formats and 'array_record' not in formats:
      raise UserError(
        f'{folder} holds {self.name} as {"/".join(sorted(formats))}; give another data_dir, or '
        'delete that folder'
      )
    super().__init__(data_dir=os.fspath(root), file_format='array_record')

  def _image_classification(
    self, image: Any, label: Any, **description: Any
  ) -> tfds.core.DatasetInfo:
    """What `_info` is to return, for a set of images with labels and file names."""
    features = {'image': image, 'label': label}
    return self._described(features, ('image', 'label'), **description)

  def _described(
    self,
    features: Mapping[str, Any],
    supervised_keys: tuple[str, str],
    palette: np.ndarray | None = None,
    category_ids: Sequence[int] = (),
    **description: Any,
  ) -> tfds.core.DatasetInfo:
    """What `_info` is to return, for a set of examples with file names.

    Args:
      features: of TFDS, by name.
      supervised_keys: names of the input and of what is to be learnt.
      palette: (n, 3) uint8, colours of the classes.
      category_ids: of the classes in result files.
      **description: of the set, as TFDS has it.
    """
    metadata = tfds.core.MetadataDict()
    if palette is not None:
      metadata['palette'] = palette.tolist()
    if category_ids:
      metadata['category_ids'] = list(category_ids)
    return _Info(
      builder=self, supervised_keys=supervised_keys, metadata=metadata or None,
      features=tfds.features.FeaturesDict({**features, 'file_name': tfds.features.Text()}),
      **description,
    )  # fmt: skip

  def _asked(self) -> Collection[str]:
    """Splits that there have to be; for a set that may be prepared without one of them."""
    return ()

  @abc.abstractmethod
  def _contents(self) -> dict[str, SplitContent]:
    """Lists what goes into each split."""

  def _download_and_prepare(self, dl_manager, download_config=None) -> None:
    raise NotImplementedError('the whole of download_and_prepare is replaced')

  def is_ready(self) -> bool:
    """Whether the data set is prepared."""
    return (Path(self.data_dir) / tfds_source.INFO_FILE).exists()

  def download_and_prepare(self) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
    """Prepares the data set, continuing where a killed run stopped. Does nothing if it is ready.

    Several processes may call this at once: one works and the others wait for it.

    Raises:
      UserError: if the folder cannot be written, the disk is too small, an unfinished preparation
        there was made from other files, or the set was prepared before without a split.
    """
    asked = self._asked()
    if not self.is_ready():
      self._prepare(Path(self.data_dir))
    if not self.info.splits:  # another process, or an earlier run, has written them
      self.info.read_from_directory(self.data_dir)
    lacking = [split for split in asked if split not in self.info.splits]
    if lacking:
      raise UserError(
        f'{self.data_dir} was prepared before without {lacking[0]}; delete that folder and run '
        'this again with the sources of all splits'
      )

  def _prepare(self, final: Path) -> None:
    partial = final.with_name(f'incomplete.{final.name}')
    try:
      final.parent.mkdir(parents=True, exist_ok=True)
      lock = open(final.parent / f'.{final.name}.lock', 'w')  # noqa: SIM115
    except OSError as error:
      raise UserError(
        f'cannot write {self.name} to {final.parent}: {error.strerror}; give another data_dir (or '
        'set TFDS_DATA_DIR)'
      ) from None
    with lock, _exclusive(lock, self.name):
      if not self.is_ready():
        if final.exists():
          raise UserError(f'{final} is in the way: not a prepared data set; move or delete it')
        partial.mkdir(exist_ok=True)
        # The plan goes last: a description without a plan means that only the rename is missing.
        if (partial / _PLAN_FILE).exists() or not (partial / tfds_source.INFO_FILE).exists():
          self._write(partial)
          (partial / _PLAN_FILE).unlink()
        partial.rename(final)

  def _write(self, folder: Path) -> None:
    contents = self._contents()
    shards: dict[str, list[np.ndarray]] = {}
    digest = hashlib.sha256()
    for split, content in contents.items():
      order = splits.hashed_order(name.encode() for name in content.names)
      count = -(-len(order) // self._examples_per_shard)
      shards[split] = np.array_split(order, count)
      for index in order:
        digest.update(f'{split}/{content.names[index]}\n'.encode())
    lengths = {split: [len(shard) for shard in parts] for split, parts in shards.items()}
    self._check_plan(folder, {'files': digest.hexdigest(), 'shards': lengths})
    _check_space(folder, sum(content.num_bytes for content in contents.values()))

    infos = []
    total = sum(len(content.names) for content in contents.values())
    done = 0
    with (
      Progress(total, title=f'preparing {self.name}', interval_seconds=30.0) as progress,
      ThreadPoolExecutor(8) as readers,
    ):
      for split, parts in shards.items():
        template = self._get_filename_template(split)
        paths = [folder / p.name for p in template.sharded_filepaths(len(parts))]
        for path, indices in zip(paths, parts, strict=True):
          if not _is_complete(path, len(indices)):
            # Threads read ahead: that hides the latency of network disks.
            examples = readers.map(contents[split].examples.__getitem__, indices)
            _write_shard(path, map(self._serialize, _counted(examples, progress, done)))
          done += len(indices)
        scenes = contents[split].scenes
        if scenes is not None:
          order = np.concatenate(parts)
          np.save(folder / tfds_source.SCENES_FILE.format(split=split), scenes[order])
        size = sum(path.stat().st_size for path in paths)
        infos.append(tfds.core.SplitInfo(split, lengths[split], size, template))
    self.info.set_splits(tfds.core.SplitDict(infos))
    self.info.write_to_directory(folder)

  def _serialize(self, example: Mapping[str, Any]) -> bytes:
    features: Any = self.info.features
    serializer = tfds.core.ExampleSerializer(features.get_serialized_info())
    proto = serializer.get_tf_example(features.encode_example(example))
    return proto.SerializeToString(deterministic=True)  # the same bytes in every process

  def _check_plan(self, folder: Path, plan: dict) -> None:
    """Writes down what is to be done, or checks that a preparation begun earlier is the same."""
    path = folder / _PLAN_FILE
    if not path.exists():
      temporary = path.with_suffix('.tmp')
      temporary.write_text(json.dumps(plan))
      temporary.rename(path)
    elif json.loads(path.read_text()) != plan:
      raise UserError(
        f'{folder} holds an unfinished preparation of {self.name} from other files or with other '
        f'options; continue with those, or delete it: rm -r {folder}'
      )


def _counted(examples: Iterator[Any], progress: Progress, done: int) -> Iterator[Any]:
  """Yields the examples and shows how far the work is, `done` examples before them included."""
  start = time.monotonic()
  for count, example in enumerate(examples, 1):
    yield example
    progress.update(done + count, {'images/s': count / (time.monotonic() - start)})


def _write_shard(path: Path, records: Iterator[bytes]) -> None:
  """Writes a file that appears under its name complete, and on the disk, or not at all."""
  temporary = path.with_name(f'{path.name}.unfinished')
  # A group is what is read at once: one record, for random access.
  writer = ArrayRecordWriter(os.fspath(temporary), 'group_size:1')
  try:
    try:
      for record in records:
        writer.write(record)
    finally:
      writer.close()
  except RuntimeError as error:  # how ArrayRecord reports what the system refuses
    reason = str(error).split(';')[0]
    raise UserError(f'cannot write {path}: {reason}; fix that and start again') from error
  with temporary.open('rb') as file:
    os.fsync(file.fileno())
  temporary.rename(path)


def _is_complete(path: Path, count: int) -> bool:
  """Whether an earlier run wrote this shard, and the disk kept it."""
  if not path.exists():
    return False
  try:
    reader = ArrayRecordReader(os.fspath(path))
    try:
      return reader.num_records() == count
    finally:
      reader.close()
  except RuntimeError:
    return False


def _check_space(folder: Path, needed: int) -> None:
  written = sum(path.stat().st_size for path in folder.iterdir())
  free = shutil.disk_usage(folder).free
  if needed - written > free:
    raise UserError(
      f'{folder} needs {(needed - written) / 1e9:.1f} GB, and {free / 1e9:.1f} GB are free there; '
      'give a data_dir on a larger disk'
    )


@contextlib.contextmanager
def _exclusive(lock, name: str) -> Iterator[None]:
  """Holds the lock; the system lets go of it even if this process is killed."""
  try:
    try:
      fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
      _log.info('another process is preparing %s; waiting for it', name)
      fcntl.flock(lock, fcntl.LOCK_EX)
  except OSError as error:
    _log.warning(
      'cannot lock %s (%s): prepare %s with one process only', lock.name, error.strerror, name
    )
  yield
