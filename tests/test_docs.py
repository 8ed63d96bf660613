"""What the documents name is there: files, settings, modules, numbers of the configs."""

import importlib
import pathlib
import re

import pytest
from ml_collections import ConfigDict

from configs import base
from hivit_jax.train import assemble
from tests.test_configs import PARAMETERS

ROOT = pathlib.Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob('*.md'), *(ROOT / 'docs').glob('*.md')])
README = (ROOT / 'README.md').read_text()


def name(page: pathlib.Path) -> str:
  return page.relative_to(ROOT).as_posix()


def anchors(page: pathlib.Path) -> set[str]:
  """The headings of a page, as links name them."""
  headings = re.findall(r'^#+ (.+)$', page.read_text(), re.MULTILINE)
  return {re.sub(r'[^\w\- ]', '', heading.lower()).replace(' ', '-') for heading in headings}


def is_setting(dotted: str) -> bool:
  node = base.get_config()
  for part in dotted.split('.'):
    if not isinstance(node, ConfigDict) or part not in node:
      return False
    node = node.get_ref(part).get()
  return True


@pytest.mark.parametrize('page', PAGES, ids=name)
def test_links_lead_somewhere(page):
  for link in re.findall(r'\]\(([^)\s]+)\)', page.read_text()):
    if link.startswith('https://'):
      continue
    path, _, anchor = link.partition('#')
    target = (page.parent / path).resolve() if path else page
    assert target.exists(), f'{name(page)} links to {link}'
    assert target.is_relative_to(ROOT), f'{name(page)} links to {link}'
    assert not anchor or anchor in anchors(target), f'{name(page)} links to {link}'


@pytest.mark.parametrize('page', PAGES, ids=name)
def test_settings_exist(page):
  text = page.read_text()
  named = set(re.findall(r'--config\.([\w.]*\w)', text)) - {'KEY', 'typo'}
  named |= set(re.findall(r'`config\.([\w.]*\w)', text)) - {'py', 'json', 'update'}
  config = base.get_config()
  groups = [key for key in config if isinstance(config.get_ref(key).get(), ConfigDict)]
  named |= set(re.findall(rf'`((?:{"|".join(groups)})\.\w+)', text))
  assert {setting for setting in named if not is_setting(setting)} == set()


@pytest.mark.parametrize('page', PAGES, ids=name)
def test_configs_and_tools_exist(page):
  text = page.read_text()
  for file in set(re.findall(r'configs/(\w+)\.py', text)):
    assert (ROOT / 'configs' / f'{file}.py').exists(), file
  for module in set(re.findall(r'-m (hivit_jax[\w.]*)', text)) - {'hivit_jax.tools.NAME'}:
    assert (ROOT / (module.replace('.', '/') + '.py')).exists(), module


@pytest.mark.parametrize('page', PAGES, ids=name)
def test_tests_exist(page):
  text = page.read_text()
  named = re.findall(r'(tests/[\w/]+\.py)::(test_\w+)', text)
  assert len(named) == len(re.findall(r'\btest_\w+\b(?!\.py)', text)), 'a test without its file'
  for file, test in named:
    assert f'\ndef {test}(' in (ROOT / file).read_text(), f'{name(page)} names {file}::{test}'


def test_the_table_of_configs_is_that_of_the_configs():
  rows = re.findall(r'^\| `(\w+)\.py` \|(.*)\|$', README, re.MULTILINE)
  table = {file: [cell.strip() for cell in cells.split('|')] for file, cells in rows}
  files = {file.stem for file in (ROOT / 'configs').glob('*.py')} - {'base', 'recipes', 'evaluate'}
  assert table.keys() == files
  for file, (_, parameters, data, epochs, batch, lr) in table.items():
    config = importlib.import_module(f'configs.{file}').get_config()
    assert int(parameters.replace(' ', '')) == PARAMETERS[file]
    assert f'`{config.data.name}`' in data, file
    assert float(epochs.split(',')[0]) == config.epochs, file
    assert int(batch) == config.batch_size, file
    assert assemble.schedule(config).lr == pytest.approx(float(lr)), file


def test_python_in_the_readme_runs():
  (code,) = re.findall(r'```python\n(.*?)```', README, re.DOTALL)
  # Smaller models stand in: the promise is the calls and the shapes.
  small = ', embed_dim=32, depths=(1, 1, 1), num_heads=1'
  code = code.replace("'mae_hivit_base'", f"'mae_hivit_base'{small}, decoder_depth=1")
  names = {}
  exec(code.replace("'hivit_tiny'", f"'hivit_tiny'{small}"), names)
  out = names['out']
  assert (out.loss.shape, out.pred.shape, out.mask.shape) == ((), (2, 196, 768), (2, 196))
  assert names['logits'].shape == (2, 10)
