"""Trains what a config describes.

  python main.py --config=configs/demo.py --workdir=/tmp/hivit_demo

The command line can override any setting: --config.batch_size=256. A variant of a config follows
a colon: --config=configs/mae_hivit_b.py:1600.
"""

import pathlib
import sys

try:
  from absl import flags
  from ml_collections import config_flags

  from hivit_jax import cli
  from hivit_jax.errors import UserError
except ModuleNotFoundError:
  from hivit_jax import environment

  environment.check_packages()
  raise

_CONFIG = config_flags.DEFINE_config_file('config', None, 'Config file, see configs/.')
_WORKDIR = flags.DEFINE_string(
  'workdir',
  None,
  'Directory for checkpoints, metrics and pictures; a run that is in it already continues. '
  'Default: workdirs/<name of the config>_<variant>.',
)
_MODE = flags.DEFINE_enum(
  'mode',
  'train',
  ['train', 'evaluate'],
  'evaluate: the newest checkpoint of --workdir or, without one, config.init.',
)


_COORDINATOR = flags.DEFINE_string(
  'coordinator_address',
  None,
  'host:port of process 0, for runs of several processes. Slurm, Open MPI 4 and Cloud TPUs need no '
  'flags. The variables JAX_COORDINATOR_ADDRESS and so on do the same.',
)
_NUM_PROCESSES = flags.DEFINE_integer('num_processes', None, 'How many; 1: look for no others.')
_PROCESS_ID = flags.DEFINE_integer('process_id', None, 'Number of this process, from 0.')


def main(argv: list[str]) -> None:
  if argv[1:]:
    raise UserError(f'unexpected argument "{argv[1]}"; settings are given as --config.KEY=VALUE')
  if _CONFIG.value is None:
    raise UserError('which config? For a first run: --config=configs/demo.py')
  # Imported here: worker processes of the data pipeline import this file, and --help must be fast.
  from hivit_jax.reporting.console import setup_logging
  from hivit_jax.runtime import compilation_cache, distributed
  from hivit_jax.train import run

  setup_logging()  # before JAX looks for other processes and devices, and says so
  distributed.initialize(_COORDINATOR.value, _NUM_PROCESSES.value, _PROCESS_ID.value)
  compilation_cache.turn_on()
  file, _, variant = config_flags.get_config_filename(flags.FLAGS['config']).partition(':')
  name = '_'.join(filter(None, (pathlib.Path(file).stem, variant)))
  default = f'workdirs/{name}'
  given = cli.given_settings(sys.argv)
  if _MODE.value == 'evaluate':
    run.evaluate(_CONFIG.value, _WORKDIR.value, default, given)
  else:
    run.train(_CONFIG.value, _WORKDIR.value or default, given)


if __name__ == '__main__':
  cli.run(main)
