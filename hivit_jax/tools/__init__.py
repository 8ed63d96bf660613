"""Commands: `python -m hivit_jax.tools.NAME --help`."""

import sys

from hivit_jax import environment

if sys.argv[:1] == ['-m']:  # Python looks for the tool that it will run
  environment.check_packages()
