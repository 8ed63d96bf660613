"""What must be in place before a command can start: packages, flags of XLA, devices.

No package is imported here: `main.py` and `hivit_jax.tools` call this before they import any.
"""

import importlib.util
import os
import pathlib
import re
import subprocess
import sys
import traceback
from collections.abc import Sequence

from hivit_jax.errors import UserError

# Packages of requirements.txt as they are imported; a test compares the two. The first are enough
# to compile and time a training step.
FOR_STEPS = (
  *('jax', 'flax', 'optax', 'orbax.checkpoint', 'ml_collections', 'absl', 'numpy', 'ml_dtypes'),
)
PACKAGES = (
  *FOR_STEPS,
  *('clu', 'scipy', 'safetensors', 'tensorflow_datasets', 'array_record', 'grain', 'PIL'),
  *('importlib_resources', 'skimage', 'sklearn', 'pycocotools', 'tqdm'),
  *('tensorboard', 'matplotlib', 'werkzeug'),
)
_SHOWN = 3


def check_packages(packages: Sequence[str] = PACKAGES) -> None:
  """Exits with one line, status 2, unless `packages` are installed."""
  missing = [name for name in packages if not _installed(name)]
  if not missing:
    return
  shown = ', '.join(missing[:_SHOWN]) + (', ...' if len(missing) > _SHOWN else '')
  file = pathlib.Path(__file__).parents[1] / 'requirements.txt'
  file = os.path.relpath(file) if file.is_file() else 'requirements.txt'
  print(
    f'error: {len(missing)} of the {len(packages)} packages that hivit_jax needs are not '
    f'installed ({shown}): {sys.executable} -m pip install -r {file}',
    file=sys.stderr,
  )
  sys.exit(2)


def _installed(name: str) -> bool:
  try:
    return importlib.util.find_spec(name) is not None
  except ModuleNotFoundError:  # the package around it
    return False


def check_xla_flags() -> None:
  """Raises UserError if XLA would end the process for what it finds in XLA_FLAGS.

  XLA says so in its own log, some hundred lines of it for a value that it cannot read, and then
  the process is gone. So another process reads them first, which takes 0.15 seconds, and only
  where the variable is set.
  """
  given = os.environ.get('XLA_FLAGS')
  if not given:
    return
  script = 'import jaxlib.xla_client as xla; xla.CompileOptions()'
  done = subprocess.run([sys.executable, '-c', script], capture_output=True, text=True)
  said = re.search(r'^[EF]\d{4} .*?\] (.*)', done.stderr, re.MULTILINE)
  if done.returncode and said:
    raise UserError(
      f'XLA_FLAGS="{given}": {said[1].strip(" .")}; correct it, or start without: env -u XLA_FLAGS'
    )


def explain_devices(error: BaseException) -> UserError | None:
  """The mistake behind an error that JAX raised while it looked for its devices, or None."""
  frames = traceback.extract_tb(error.__traceback__)
  if not frames or not frames[-1].filename.endswith(os.path.join('jax', '_src', 'xla_bridge.py')):
    return None
  wanted = os.environ.get('JAX_PLATFORMS')
  reason = str(error).split('\n')[0].split(' (set JAX_PLATFORMS')[0].strip(' .')
  where = f'JAX_PLATFORMS={wanted}: ' if wanted else ''
  install = {
    'cuda': '; for NVIDIA GPUs: pip install "jax[cuda13]"',
    'gpu': '; for NVIDIA GPUs: pip install "jax[cuda13]"',
    'tpu': '; for Google TPUs: pip install "jax[tpu]"',
  }.get((wanted or '').split(',')[0], '')
  return UserError(
    f'{where}JAX finds no such device{f" ({reason})" if reason else ""}{install}; to use the '
    'CPU: JAX_PLATFORMS=cpu'
  )
