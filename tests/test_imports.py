"""Who may import whom: the source is read, nothing is guessed from what happens to be loaded."""

import ast
import functools
import importlib.metadata
import pathlib
import re
import subprocess
import sys

import pytest

from hivit_jax.environment import PACKAGES
from tests import patience

ROOT = pathlib.Path(__file__).parents[1]
PACKAGE = ROOT / 'hivit_jax'
OURS = sorted([*PACKAGE.rglob('*.py'), *(ROOT / 'configs').glob('*.py'), ROOT / 'main.py'])

# Part of the package -> the parts that it may import, besides itself.
ALLOWED = {
  'errors': set(),
  'settings': {'errors'},
  'environment': {'errors'},
  'cli': {'errors', 'environment', 'settings'},
  'ops': {'errors'},
  'buckets': {'errors'},
  'detection': set(),
  'models': {'errors', 'settings', 'ops', 'detection'},
  'data': {'errors', 'settings', 'reporting'},
  'interop': {'errors', 'settings', 'models', 'ops'},
  'tasks': {'errors', 'models', 'data', 'detection'},
  'runtime': {'errors'},
  'reporting': {'errors', 'settings'},
  'train': {
    *('errors', 'settings', 'ops', 'models', 'interop', 'tasks', 'data', 'runtime', 'reporting'),
    'buckets',
  },
  'planning': {'errors', 'train'},
  'tools': {
    *('errors', 'settings', 'environment', 'cli', 'models', 'interop', 'tasks', 'data'),
    *('runtime', 'reporting', 'train', 'planning'),
  },
  'configs': {'errors', 'models'},
  'main': {'errors', 'environment', 'cli', 'runtime', 'reporting', 'train'},
  '__init__': {'errors', 'models', 'interop', 'train'},  # the public API, lazily
}

# Package -> the only places of ours that may import it.
CONFINED = {
  'orbax': ('hivit_jax/train/storage.py',),
  'torch': ('hivit_jax/interop/torch_io.py',),
  'huggingface_hub': ('hivit_jax/interop/hub.py',),
  'tensorflow_datasets': ('hivit_jax/data/',),
  'array_record': ('hivit_jax/data/',),
  'grain': ('hivit_jax/data/',),
  'pycocotools': ('hivit_jax/data/coco.py',),
  'faster_coco_eval': ('hivit_jax/data/coco.py',),
  'tensorboard': ('hivit_jax/reporting/tensorboard.py',),
  'boto3': ('hivit_jax/buckets/stores.py',),
  'botocore': ('hivit_jax/buckets/stores.py',),
  'google': ('hivit_jax/buckets/stores.py',),
  'wandb': ('hivit_jax/reporting/trackers.py',),
  'mlflow': ('hivit_jax/reporting/trackers.py',),
  'matplotlib': (
    'hivit_jax/tools/compare.py',
    'hivit_jax/tools/curves.py',
    'hivit_jax/tools/panels.py',
    'hivit_jax/tools/report_page.py',
  ),
  'optax': ('hivit_jax/train/',),
  'werkzeug': ('hivit_jax/tools/playground_pages.py',),
  # The config stops at the builders.
  'ml_collections': (
    'configs/',
    'main.py',
    'hivit_jax/cli.py',
    'hivit_jax/tools/',
    'hivit_jax/planning/plan.py',
    *(
      f'hivit_jax/train/{name}.py'
      for name in (
        'assemble',
        'initialise',
        'inputs',
        'validate',
        'hints',
        'launch',
        'setup',
        'run',
        'synthetic',
      )
    ),
  ),
  'tensorflow': (),
  'tf_keras': (),
}

# What data workers and `--help` cannot wait for.
HEAVY = {'jax', 'flax', 'optax', 'orbax', 'grain', 'tensorflow_datasets', 'torch', 'sklearn'}


def name(file: pathlib.Path) -> str:
  return file.relative_to(ROOT).as_posix()


def part(file: pathlib.Path) -> str:
  """'hivit_jax/data/decode.py' -> 'data', 'hivit_jax/cli.py' -> 'cli', 'main.py' -> 'main'."""
  steps = file.relative_to(ROOT).with_suffix('').parts
  return steps[1] if steps[0] == 'hivit_jax' else steps[0]


@functools.cache
def imports(file: pathlib.Path, *, lazy: bool = True) -> frozenset[str]:
  """Dotted names that a file imports, `from a import b` as 'a.b'.

  Args:
    file: Python source.
    lazy: whether to count the imports inside functions.
  """
  found = set()

  def visit(node):
    if isinstance(node, ast.Import):
      found.update(alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
      assert node.level == 0, f'{name(file)}:{node.lineno}: relative import'
      found.update(f'{node.module}.{alias.name}' for alias in node.names)
    if lazy or not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
      for child in ast.iter_child_nodes(node):
        visit(child)

  visit(ast.parse(file.read_text()))
  return frozenset(found)


def inner_parts(file: pathlib.Path) -> set[str]:
  """The parts of this project that a file imports."""
  found = set()
  for imported in imports(file):
    steps = imported.split('.')
    if steps[0] == 'hivit_jax':
      # `from hivit_jax import create_model` asks the package itself.
      known = (PACKAGE / steps[1]).is_dir() or (PACKAGE / f'{steps[1]}.py').exists()
      found.add(steps[1] if known else '__init__')
    elif steps[0] in ('configs', 'main', 'tests'):
      found.add(steps[0])
  return found


def test_the_readers_of_imports_see_what_is_there():
  assert 'train' in {part(file) for file in OURS}
  assert 'models' in inner_parts(PACKAGE / 'train' / 'assemble.py')
  assert any('orbax' in i for i in imports(PACKAGE / 'train' / 'storage.py'))
  assert any('train' in i for i in imports(ROOT / 'main.py'))
  assert not any('train' in i for i in imports(ROOT / 'main.py', lazy=False))


@pytest.mark.parametrize('file', OURS, ids=name)
def test_dependencies_point_one_way(file):
  here = part(file)
  assert here in ALLOWED, f'{name(file)}: a new part of the package needs a rule in {__file__}'
  forbidden = inner_parts(file) - ALLOWED[here] - {here}
  assert not forbidden, f'{name(file)} ({here}) must not import {sorted(forbidden)}'


@pytest.mark.parametrize('package', CONFINED)
def test_a_package_with_one_place_is_imported_nowhere_else(package):
  places = CONFINED[package]
  users = [name(f) for f in OURS if package in {i.split('.')[0] for i in imports(f)}]
  assert [user for user in users if not user.startswith(places)] == []


def modules(imported: frozenset[str]) -> set[str]:
  """The modules of this package among dotted names, which may go on into a module."""
  known = {'.'.join(f.relative_to(ROOT).with_suffix('').parts) for f in PACKAGE.rglob('*.py')}
  known = {module.removesuffix('.__init__') for module in known}
  found = set()
  for dotted in imported:
    while dotted and dotted not in known:
      dotted = dotted.rpartition('.')[0]
    found.add(dotted)
  return found - {'', 'hivit_jax'}  # the package itself imports its parts when they are asked for


def test_no_modules_import_each_other_in_a_circle():
  graph = {}
  for file in PACKAGE.rglob('*.py'):
    module = '.'.join(file.relative_to(ROOT).with_suffix('').parts).removesuffix('.__init__')
    graph[module] = modules(imports(file)) - {module}
  while True:  # take away what imports nothing that is left, or what nothing left imports
    imported = set().union(*graph.values())
    circle = {m: o & graph.keys() for m, o in graph.items() if o & graph.keys() and m in imported}
    if circle == graph:
      break
    graph = circle
  assert graph == {}


def test_log_messages_go_through_the_standard_library():
  """One way in, so that levels and format are set in one place."""
  users = [name(f) for f in OURS if any(i.startswith('absl.logging') for i in imports(f))]
  assert users == ['hivit_jax/reporting/console.py']  # which takes absl's handler away


def test_what_helps_a_compiler_stays_in_ops():
  """Models and training are definitions; `ops` has the platforms, barriers, gradients by hand."""
  names = (
    r'platform_dependent|optimization_barrier|custom_(vjp|jvp|gradient)|def(vjp|jvp)|_barrier\b'
  )
  found = {name(file): re.findall(names, file.read_text()) for file in OURS}
  users = {file for file, uses in found.items() if uses}
  assert 'hivit_jax/ops/linear.py' in users
  assert [file for file in users if not file.startswith('hivit_jax/ops/')] == []


def test_data_does_not_import_jax():
  for file in (PACKAGE / 'data').rglob('*.py'):
    assert not {'jax', 'flax'} & {i.split('.')[0] for i in imports(file)}, name(file)


def test_every_import_is_declared_in_requirements_txt():
  lines = (ROOT / 'requirements.txt').read_text().splitlines()
  declared = {_normal(re.split('[<>=!~;[ ]', line)[0]) for line in lines if line[:1].isalnum()}
  distributions = importlib.metadata.packages_distributions()
  # Asked for by name where they are needed.
  optional = {'torch', 'wandb', 'mlflow', 'huggingface_hub', 'faster_coco_eval'}
  optional |= {'boto3', 'botocore', 'google'}
  known = set(sys.stdlib_module_names) | {'hivit_jax', 'configs'} | optional
  for file in OURS:
    for package in {i.split('.')[0] for i in imports(file)} - known:
      providers = {_normal(provider) for provider in distributions[package]}
      assert providers & declared, f'{name(file)} imports {package}, of {providers}'


def test_the_packages_that_commands_look_for_are_those_of_requirements_txt():
  lines = (ROOT / 'requirements.txt').read_text().splitlines()
  declared = {_normal(re.split('[<>=!~;[ ]', line)[0]) for line in lines if line[:1].isalnum()}
  distributions = importlib.metadata.packages_distributions()
  distributions['orbax.checkpoint'] = ['orbax-checkpoint']  # of the packages that share `orbax`
  looked_for = [{_normal(d) for d in distributions[name]} & declared for name in PACKAGES]
  assert sorted(map(sorted, looked_for)) == sorted([name] for name in declared)


def _normal(distribution: str) -> str:
  return re.sub('[-_.]+', '-', distribution).lower()


def test_main_is_short_and_light():
  assert len((ROOT / 'main.py').read_text().splitlines()) < 80
  assert not HEAVY & {i.split('.')[0] for i in imports(ROOT / 'main.py', lazy=False)}


def loaded(statement: str, modules: set[str]) -> list[str]:
  """Which of the modules a fresh interpreter has loaded after a statement."""
  script = f'{statement}; import sys; print(*({modules} & set(sys.modules)))'
  done = subprocess.run(
    [sys.executable, '-c', script],
    cwd=ROOT,
    capture_output=True,
    text=True,
    timeout=patience.limit(120),
  )
  assert done.returncode == 0, done.stderr
  return done.stdout.split()


@pytest.mark.parametrize('statement', ['import hivit_jax', 'import main', 'import configs.base'])
def test_start_up_does_not_wait_for_heavy_packages(statement):
  assert loaded(statement, HEAVY) == []


def test_nothing_pulls_in_tensorflow():
  modules = 'hivit_jax.train.run, hivit_jax.data.builders, clu.parameter_overview'
  assert loaded(f'import {modules}', {'tensorflow', 'torch'}) == []


def test_a_run_does_not_wait_for_what_few_runs_need(tmp_path):
  run = f'from hivit_jax.train import run; run.MetricWriter({str(tmp_path)!r})'
  assert loaded(run, {'torch', 'scipy.interpolate', 'matplotlib', 'sklearn'}) == []


def test_the_benchmark_of_a_step_needs_no_data():
  data = {'hivit_jax.data', 'grain', 'tensorflow_datasets', 'array_record'}
  assert loaded('import hivit_jax.tools.benchmark', data) == []
