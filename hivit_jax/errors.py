"""Exceptions that end a program with one line for a person instead of a stack trace."""

import difflib
import shlex
from collections.abc import Iterable
from typing import Any


class UserError(ValueError):
  """A mistake in a config, a path, a data set or a checkpoint.

  The message is one line: what is at fault, the value, and the way out. `main.py` and the tools
  print it without a stack trace and exit with status 2.
  """


class Stopped(Exception):
  """A signal stopped the program after it had saved its work; the message says where."""


def flag(key: str, value: Any) -> str:
  """A setting as it is given on a command line: ('image_size', (64, 96)) -> a flag for a shell."""
  text = ','.join(map(str, value)) if isinstance(value, tuple | list) else str(value)
  return f'--config.{key}={shlex.quote(text)}'


def suggest(word: str, known: Iterable[str]) -> str:
  """' (did you mean "x"?)' when one of the known words is close, else ''."""
  close = difflib.get_close_matches(word, list(known), n=1)
  return f' (did you mean "{close[0]}"?)' if close else ''
