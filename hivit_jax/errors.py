"""The one exception for mistakes that a user can mend."""


class UserError(ValueError):
  """A mistake in a config, a path, a data set or a checkpoint.

  The message is one line for a person: what is at fault, the value seen, and the way out. `main.py`
  and the tools print it without a stack trace and exit with status 2.
  """
