"""Checkpoints of the training state.

Layout: `<directory>/<step>/` is an ordinary Orbax checkpoint with one checkpointable, `state`, a
nested dict of arrays; `orbax.checkpoint.v1.load(path)` reads it without this module. Containers
are stored by the names of their keys (dict key, tuple index, namedtuple field), so neither optax's
classes nor empty states are part of the format: Adam's first moment of `blocks/0/mlp/fc1/kernel` is
`opt_state/1/mu/blocks/0/mlp/fc1/kernel`. Orbax's custom metadata (the JSON file
`_CHECKPOINT_METADATA`) carries the caller's metadata and every leaf's dtype and shape. The file
`SHA256SUMS` lists all the others; `sha256sum -c SHA256SUMS` checks a copy by hand.

A step being written is called `<step>.writing*` and gets its name, by one rename, when all is on
the disk; a damaged one is moved to `<step>.damaged`.

Files are verified before Orbax sees them, see `integrity`; whatever goes wrong after that is not
damage but an error to be raised. Orbax itself is behind `storage`.
"""

import concurrent.futures
import functools
import logging
import os
import pathlib
import shutil
import time
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from hivit_jax.errors import UserError
from hivit_jax.runtime import distributed
from hivit_jax.train import integrity, manifest, places, storage

_log = logging.getLogger(__name__)

_WRITING = '.writing'
_QUIET_SECONDS, _ABANDON_SECONDS = 1.0, 5.0  # that nothing comes back after a failed save; at most


class Restored(NamedTuple):
  """What was read from a checkpoint: `metadata` is the dict that was given to `save`."""

  step: int
  state: Any
  metadata: dict[str, Any]


class Checkpoints:
  """The checkpoints of one run, in one directory; use it as a context manager.

  Attributes:
    best: what the next checkpoints shall tell of the best one, which is kept as long as they do;
      from `restore`, and set by `best.KeepBest`.

  Saving returns as soon as the values are safe from the next step, even from one that donates the
  state; the rest happens in the background. An error there is raised by the next `save`, `wait` or
  `close`. A save begins only when the one before it has ended. Every process of a multi-process
  run must make the same calls.
  """

  def __init__(
    self,
    directory: str | os.PathLike[str],
    *,
    keep_last: int = 2,
    keep_every_steps: int | None = None,
    place: places.Disk | None = None,
  ):
    """Opens the directory, creates it if needed, and removes what an interrupted save left there.

    Args:
      directory: where the checkpoints lie, usually `workdir/checkpoints`.
      keep_last: how many of the newest checkpoints are kept, at least 1.
      keep_every_steps: checkpoints at multiples of this step are kept for good; None: none.
      place: opened, of the run, if that is not the directory alone.

    Raises:
      UserError: an option is out of range, or the directory cannot be created or written to.
    """
    for name, count in (('keep_last', keep_last), ('keep_every_steps', keep_every_steps)):
      if count is not None and count < 1:
        raise UserError(f'{name} must be at least 1, got {count}')
    self.directory = pathlib.Path(directory).absolute()
    self._keep_last, self._keep_every_steps = keep_last, keep_every_steps
    self.best: manifest.Best | None = None
    self._place = places.Disk(self.directory.parent) if place is None else place
    self._primary = jax.process_index() == 0
    self._ours: set[int] = set()  # steps restored or saved here; other steps are another run's
    self._pending: tuple[int, concurrent.futures.Future] | None = None
    self._worker = concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix='checkpoint')
    try:
      self._place.make(self.directory)
      for path in self._remove_unfinished('*') if self._primary else ():
        _log.info('removed the incomplete checkpoint %s', path)
    except OSError as error:
      raise UserError(
        f'cannot write checkpoints to {self.directory}: {error.strerror}; choose another --workdir'
      ) from error

  def __enter__(self) -> 'Checkpoints':
    return self

  def __exit__(self, kind, error, traceback) -> None:
    try:
      self.close()
    except Exception as save_error:
      if error is None:
        raise
      _log.error('%s', save_error)  # it must not hide the error that ends the run

  def steps(self) -> list[int]:
    """The steps that have a complete checkpoint, ascending; one still being written is not in."""
    return manifest.steps(self.directory)

  def latest_step(self) -> int | None:
    """The newest complete checkpoint's step, or None."""
    return max(self.steps(), default=None)

  def path(self, step: int) -> pathlib.Path | str:
    """Where the checkpoint of `step` lies or would lie; an address if that is in a bucket."""
    return self._place.shown(self._path(step))

  def save(self, step: int, state: Any, metadata: Mapping[str, Any], *, wait: bool = False) -> bool:
    """Saves `state`, then removes the checkpoints that are no longer to be kept.

    Args:
      step: the step that `state` has reached, 0 or more.
      state: a tree of jax.Arrays; dicts, lists, tuples, namedtuples, None and empty states.
      metadata: a small dict for JSON, stored beside the state (model, epoch, seed...).
      wait: return only when the files are complete.

    Returns:
      False if this object has already saved or restored this step and there was nothing to do.

    Raises:
      UserError: this or the previous save could not be written (the older checkpoints are kept),
        or another run's checkpoint of the same step is in the way.
    """
    self.wait()
    if step in self._ours:
      return False
    if self._path(step).exists():
      raise UserError(
        f'{self.path(step)} exists already, from a run that this one does not continue; '
        f'choose another --workdir, or remove it: {self._place.removal(self._path(step))}'
      )
    leaves, _ = manifest.flatten(state)
    record = manifest.make_record(leaves, metadata, self.best)
    try:
      if self._primary:  # a probe: Orbax notices only in the background, and leaves warnings behind
        self._writing(step).mkdir(parents=True)
        self._writing(step).rmdir()
      response = storage.save(self._writing(step), leaves, record, self._place.shared)
    except Exception as error:
      self._abandon(step)
      raise self._explain(step, error) from error
    best = self.best and self.best.step
    self._pending = step, self._worker.submit(self._complete, step, response, best)
    if wait:
      self.wait()
    return True

  def restore(self, abstract_state: Any, step: int | None = None) -> Restored | None:
    """Reads a checkpoint onto the devices that `abstract_state` names.

    A damaged checkpoint is skipped, with a warning, for the newest one before it, and then moved
    out of the way to `<step>.damaged` so that the step can be saved again.

    Args:
      abstract_state: a tree like the saved one, with jax.ShapeDtypeStruct leaves; a leaf without a
        sharding goes to the first local device. The mesh need not be the one that saved.
      step: exactly this checkpoint, and no other if it is damaged; None: the newest usable one.

    Returns:
      Step, state (bit for bit what was saved) and metadata; None if there is no checkpoint.

    Raises:
      Misfit: the state has other leaves, shapes or dtypes than the checkpoint.
      UserError: there are checkpoints but none is usable, or an earlier version wrote it.
    """
    self.wait()
    leaves, treedef = manifest.flatten(abstract_state)
    # One process verifies and chooses: others may see another state of a shared file system.
    choice = distributed.on_primary(functools.partial(self._choose, step))
    if choice is None:
      return None
    found, damaged, content = choice
    path = self._path(found)
    record = manifest.parsed(path, content)
    manifest.check_continuable(path, record)
    manifest.check_fit(path, record.leaves, leaves)
    values = storage.load(path, leaves, self._place.shared)
    self._place.strip(path)
    self._ours.add(found)
    there = record.best is not None and record.best.step in self.steps()
    self.best = record.best if distributed.on_primary(lambda: there) else None
    for bad in damaged if self._primary else ():
      self._place.set_aside(self._path(bad))
    return Restored(found, jax.tree.unflatten(treedef, values.values()), record.metadata)

  def _choose(self, step: int | None) -> tuple[int, list[int], dict[str, Any]] | None:
    if step is None and not self.steps():
      return None
    found, _, damaged = manifest.newest_usable(self.directory, step, self._place.read)
    return found, damaged, manifest.content(self._path(found))

  def wait(self) -> None:
    """Returns when no save is under way; raises the error of the one that was."""
    if self._finish():
      # Process 0 completes a checkpoint after the others: none may think it saved, and end, before.
      distributed.meet()

  def _finish(self) -> bool:
    """Waits for this process's part of a save; False if none was under way."""
    pending, self._pending = self._pending, None
    if pending is None:
      return False
    step, future = pending
    try:
      future.result()
    except Exception as error:
      raise self._explain(step, error) from error
    self._ours.add(step)
    return True

  def close(self) -> None:
    """Waits for this process's part of the save under way and ends the background thread."""
    try:
      self._finish()
    finally:
      self._worker.shutdown()

  def _path(self, step: int) -> pathlib.Path:
    return self.directory / str(step)

  def _writing(self, step: int) -> pathlib.Path:
    return self.directory / f'{step}{_WRITING}'

  def _complete(self, step: int, response: Any, best: int | None) -> None:
    """The background half of a save: nothing is deleted before the new checkpoint is complete."""
    try:
      response.result()
      if not self._primary:
        return
      integrity.write_sums(self._writing(step))
      self._place.publish(self._writing(step), step)
      self._writing(step).rename(self._path(step))
      integrity.sync(self.directory)
      self._place.strip(self._path(step))
    except Exception:
      self._abandon(step)
      raise
    # Later steps are another run's and do not count: the one just saved must never be the victim.
    steps = [s for s in self.steps() if s <= step]
    kept, every = {*steps[-self._keep_last :], best}, self._keep_every_steps
    for old in (s for s in steps if s not in kept and (every is None or s % every)):
      try:
        self._place.remove(self._path(old))
      except (OSError, UserError) as error:
        _log.warning('could not remove the old checkpoint %s: %s', self.path(old), error)

  def _abandon(self, step: int) -> None:
    """Removes what a failed save has left: a full disk needs the room."""
    if not self._primary:
      return
    # Other Orbax threads do not know yet that the save has failed, and recreate what was removed.
    start = quiet_since = time.monotonic()
    while time.monotonic() < min(start + _ABANDON_SECONDS, quiet_since + _QUIET_SECONDS):
      if self._remove_unfinished(str(step)):
        quiet_since = time.monotonic()
      time.sleep(_QUIET_SECONDS / 10)

  def _remove_unfinished(self, step: str) -> list[pathlib.Path]:
    """Removes and returns the incomplete saves of a step, or of all (`*`)."""
    found = list(self.directory.glob(f'{step}{_WRITING}*'))
    for path in found:
      shutil.rmtree(path, ignore_errors=True)
    return found

  def _explain(self, step: int, error: Exception) -> Exception:
    """Turns an error of the storage into a message; other errors keep their type and trace."""
    message = f'could not save the checkpoint {self.path(step)}'
    last = self.latest_step()
    kept = 'there is no earlier one' if last is None else f'{self.path(last)} is kept'
    if isinstance(error, UserError):
      return UserError(f'{message}: {error}; {kept}')
    reason = storage.fault_of_the_disk(error)
    if reason is not None:
      return UserError(
        f'{message}: {reason}; {kept}; '
        'make room there (df -h) or choose another --workdir, and start the same command again'
      )
    error.add_note(f'{message}; {kept}')
    return error


def load_metadata(path: str | os.PathLike[str], step: int | None = None) -> dict[str, Any]:
  """Reads the metadata that was saved with a checkpoint; no array is read.

  Args:
    path: `workdir`, `workdir/checkpoints` or `workdir/checkpoints/<step>`.
    step: which checkpoint; None: the one that `path` names, or else the newest whose metadata is
      intact.

  Raises:
    UserError: there is no such checkpoint.
  """
  directory, step = manifest.locate(places.local(path, step), step)
  return manifest.newest_usable(directory, step, manifest.read_record)[1].metadata


def load_params(
  path: str | os.PathLike[str],
  abstract: Any = None,
  *,
  key: str = 'params',
  step: int | None = None,
) -> Restored:
  """Reads one part of a checkpointed state, for tools and for fine-tuning; changes no file.

  Args:
    path: `workdir`, `workdir/checkpoints` or `workdir/checkpoints/<step>`.
    abstract: a tree with jax.ShapeDtypeStruct leaves that fits the part exactly; None: nested
      dicts of numpy arrays, with the keys under which they were saved.
    key: the part's key at the top of the state.
    step: which checkpoint; None: the one that `path` names, or else the newest usable one.

  Returns:
    Step, the part, and the metadata.

  Raises:
    UserError: there is no usable checkpoint, it has no such part, or `abstract` does not fit.
  """
  directory, step = manifest.locate(places.local(path, step), step)
  step, record, _ = manifest.newest_usable(directory, step, manifest.read_verified)
  path = directory / str(step)
  part = {name: leaf for name, leaf in record.leaves.items() if name[0] == key}
  if not part:
    keys = ', '.join(dict.fromkeys(str(name[0]) for name in record.leaves))
    raise UserError(f'{path} has no {key!r}; it has: {keys}')
  if abstract is None:
    wanted = {n: jax.ShapeDtypeStruct(x.shape, jnp.dtype(x.dtype)) for n, x in part.items()}
    tree = manifest.nest({n: np.asarray(x) for n, x in storage.load(path, wanted).items()})
  else:
    wanted, treedef = manifest.flatten({key: abstract})
    manifest.check_fit(path, part, wanted)
    tree = jax.tree.unflatten(treedef, storage.load(path, wanted).values())
  return Restored(step, tree[key], record.metadata)
