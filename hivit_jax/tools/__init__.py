"""Commands: `python -m hivit_jax.tools.NAME --help`."""

import sys

from hivit_jax import environment

if sys.argv[:1] == ['-m']:  # Python looks for the tool that it will run
  alone = f'{__name__}.benchmark' in sys.orig_argv  # also runs where there is no data
  environment.check_packages(environment.FOR_STEPS if alone else environment.PACKAGES)
