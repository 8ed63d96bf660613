"""Files that other packages carry."""

import importlib.util
from pathlib import Path

from hivit_jax.errors import UserError

_PIP_NAMES = {'skimage': 'scikit-image', 'sklearn': 'scikit-learn'}


def package_file(package: str, path: str) -> Path:
  """Finds a data file of an installed package without importing it (that takes seconds).

  Args:
    package: a top-level package, such as `skimage`.
    path: the file, relative to the folder of the package.

  Raises:
    UserError: if the package is not installed or has no such file.
  """
  pip_name = _PIP_NAMES.get(package, package)
  spec = importlib.util.find_spec(package)
  if spec is None or not spec.submodule_search_locations:
    raise UserError(f'{pip_name} is needed for its images: pip install {pip_name}')
  for folder in spec.submodule_search_locations:
    if (Path(folder) / path).is_file():
      return Path(folder) / path
  raise UserError(
    f'the installed {pip_name} has no {path}: pip install --force-reinstall {pip_name}'
  )
