"""The names of classes: of the weights, or from the file of a flag."""

import pathlib
from collections.abc import Callable, Sequence

from absl import flags

from hivit_jax.errors import UserError
from hivit_jax.interop import files

LABELS = flags.DEFINE_string('labels', None, 'File with the class names, one per line.')


def of(
  state: files.StateDict,
  count: int,
  file: str | None,
  unknown: Callable[[int], Sequence[str]] | None = None,
) -> Sequence[str]:
  """The name of every class.

  Args:
    state: the weights, which may have names.
    count: of the classes.
    file: with a name in each line, instead of theirs.
    unknown: from the count to what is taken where no names are known, instead of the indices.

  Raises:
    UserError: the file cannot be read, or has another number of lines.
  """
  if file is None:
    names = state.metadata.get('class_names') or ()
    if len(names) == count:
      return names
    return unknown(count) if unknown else [str(i) for i in range(count)]
  try:
    names = pathlib.Path(file).read_text('utf-8').rstrip().splitlines()
  except (OSError, UnicodeDecodeError) as error:
    reason = getattr(error, 'strerror', None) or 'not UTF-8 text'
    raise UserError(f'cannot read --labels={file}: {reason}') from error
  if len(names) != count:
    raise UserError(f'--labels={file} has {len(names)} lines for {count} classes')
  return names
