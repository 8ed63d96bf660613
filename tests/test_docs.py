"""What the documents name is there: files, settings, modules, tests; generated pages are fresh."""

import pathlib
import re

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict
from PIL import Image

import hivit_jax
from configs import base
from docs import generate
from hivit_jax import models
from hivit_jax.interop import exporter
from tests.test_configs import PARAMETERS

ROOT = pathlib.Path(__file__).parents[1]
NOTEBOOKS = generate.NOTEBOOKS
PAGES = sorted([*ROOT.glob('*.md'), *(ROOT / 'docs').rglob('*.md'), *NOTEBOOKS])
README = (ROOT / 'README.md').read_text()


def name(page: pathlib.Path) -> str:
  return page.relative_to(ROOT).as_posix()


def without_code(text: str) -> str:
  """The text without fenced blocks, in which # begins a comment and not a heading."""
  return re.sub(r'^```.*?^```', '', text, flags=re.MULTILINE | re.DOTALL)


def anchors(page: pathlib.Path) -> set[str]:
  """The headings of a page, as links name them."""
  headings = re.findall(r'^#+ (.+)$', without_code(page.read_text()), re.MULTILINE)
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


def test_every_page_can_be_found():
  index = (ROOT / 'docs' / 'README.md').read_text()
  linked = {(ROOT / 'docs' / link).resolve() for link in re.findall(r'\]\(([^)#\s]+)\)', index)}
  pages = {page for page in PAGES if 'docs' in page.parts and '{include}' not in page.read_text()}
  assert pages - linked == {ROOT / 'docs' / 'README.md'}
  site = (ROOT / 'docs' / 'index.md').read_text()
  shown = set(re.findall(r'^[\w/-]+$', site, re.MULTILINE))
  hidden = {page for page in pages if name(page.with_suffix('')).removeprefix('docs/') not in shown}
  assert hidden == {ROOT / 'docs' / 'README.md'}


def test_the_site_describes_all_that_is_public():
  page = (ROOT / 'docs' / 'reference' / 'python.md').read_text()
  described = set(
    re.findall(r'auto(?:function|class):: hivit_jax\.(?:[\w.]*\.)?(\w+)$', page, re.M)
  )
  settings = {type(own).__name__ for _, own in models.MODELS.values()}
  assert {*hivit_jax.__all__, *settings} - described == set()


def test_pages_that_code_names_exist():
  folders = ('configs', 'docs', 'hivit_jax', 'tests')
  for file in (file for folder in folders for file in (ROOT / folder).rglob('*.py')):
    for page in re.findall(r'(?<![\w/.])docs/[\w/-]+\.md', file.read_text()):
      assert (ROOT / page).exists(), f'{name(file)} names {page}'


@pytest.mark.parametrize('page', PAGES, ids=name)
def test_settings_exist(page):
  text = page.read_text()
  named = set(re.findall(r'--config\.([\w.]*\w)', text)) - {'KEY', 'typo'}
  named |= set(re.findall(r'`config\.([\w.]*\w)', text)) - {'py', 'json', 'update'}
  config = base.get_config()
  groups = [key for key in config if isinstance(config.get_ref(key).get(), ConfigDict)]
  # In backquotes `data.name`, but neither `model.features(images)`, a method, nor `data.py`.
  named |= set(re.findall(rf'`((?:{"|".join(groups)})\.\w+)\b(?![(.])', text)) - OTHERS
  assert {setting for setting in named if not is_setting(setting)} == set()


OTHERS = {'model.feature_info', 'model.safetensors'}  # a method, a file


@pytest.mark.parametrize('page', PAGES, ids=name)
def test_configs_and_tools_exist(page):
  text = page.read_text()
  for file in set(re.findall(r'configs/(\w+)\.py', text)) - {'FILE'}:
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


def test_generated_pages_are_fresh():
  pages = {
    'settings.md': generate.settings_page(),
    'configs.md': generate.configs_page(PARAMETERS.__getitem__),
  }
  stale = [page for page, text in pages.items() if (generate.PAGES / page).read_text() != text]
  assert not stale, f'{stale} are stale: run python -m docs.generate'


def test_the_page_of_settings_has_them_all():
  page = generate.settings_page()
  rows = re.findall(r'^\| `([\w.]+)` \|', page, re.MULTILINE)
  assert len(rows) == len(set(rows))
  assert set(rows) == set(generate.dotted(base.get_config()))


def test_the_page_of_configs_has_them_all():
  rows = re.findall(r'^\| \[`(\w+)`\]', generate.configs_page(PARAMETERS.__getitem__), re.MULTILINE)
  files = {file.stem for file in (ROOT / 'configs').glob('*.py')} - {'base', 'recipes', 'variants'}
  assert sorted(rows) == sorted(files)


def test_the_sizes_of_models_are_those_of_the_configs():
  page = (ROOT / 'docs' / 'reference' / 'api.md').read_text()
  cells = re.findall(r'`(\w+)`[^|]*\| ([\d ]+) \|', page)
  sizes = {model: int(size.replace(' ', '')) for model, size in cells}
  # Linear probes have a BatchNorm more; the demo's model is smaller than its name says.
  plain = [config for config in PARAMETERS if config != 'demo' and 'linear' not in config]
  expected = {generate.load(config).model.name: PARAMETERS[config] for config in plain}
  compared = sizes.keys() & expected.keys()
  assert len(compared) > 10
  assert {model: sizes[model] for model in compared} == {m: expected[m] for m in compared}


def test_the_citation_has_the_version():
  assert f'\nversion: {hivit_jax.__version__}\n' in (ROOT / 'CITATION.cff').read_text()


def test_the_readme_is_short():
  assert len(README.splitlines()) <= 170


def blocks_of_python(page: str) -> list[str]:
  return re.findall(r'```python\n(.*?)```', (ROOT / page).read_text(), re.DOTALL)


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
  """What a reader has: a picture and, smaller than published ones, a `hivit_base.pth`."""
  torch = pytest.importorskip('torch')
  folder = tmp_path_factory.mktemp('reader')
  small = {'embed_dim': 64, 'depths': (1, 1, 2), 'num_heads': 1}
  arrays = exporter.state_dict(hivit_jax.create_model('hivit_base', **small))
  state = {key: torch.from_numpy(np.array(value)) for key, value in arrays.items()}
  torch.save({'model': state}, folder / 'hivit_base.pth')
  Image.new('RGB', (300, 200), 'green').save(folder / 'PICTURE.jpg')
  return folder


def test_the_three_lines_of_the_readme_run(folder, monkeypatch):
  monkeypatch.chdir(folder)
  three, _ = blocks_of_python('README.md')
  assert len(three.splitlines()) == 3
  images = np.zeros((2, 224, 224, 3), np.float32)
  names = {'jax': jax, 'hivit_jax': hivit_jax, 'images': images}
  exec(three, names)
  assert names['features'].shape == (2, 64)
  assert names['classes'].shape == (2,)


def test_python_in_the_readme_runs():
  _, code = blocks_of_python('README.md')
  # Smaller models stand in: the promise is the calls and the shapes.
  small = ', embed_dim=32, depths=(1, 1, 1), num_heads=1'
  code = code.replace("'mae_hivit_base'", f"'mae_hivit_base'{small}, decoder_depth=1")
  names = {}
  exec(code.replace("'hivit_tiny'", f"'hivit_tiny'{small}"), names)
  out = names['out']
  assert (out.loss.shape, out.pred.shape, out.mask.shape) == ((), (2, 196, 768), (2, 196))
  assert names['logits'].shape == (2, 10)


def test_python_of_the_page_about_features_runs(folder, monkeypatch):
  monkeypatch.chdir(folder)
  first, maps, backbones, mae = blocks_of_python('docs/guide/features.md')
  small = ', embed_dim=64, depths=(1, 1, 2), num_heads=1'
  mae = mae.replace("'mae_hivit_base'", f"'mae_hivit_base'{small}, decoder_depth=1")
  backbones = re.sub(r"(\(\s*'backbone_hivit_base')", rf'\1{small}', backbones)
  backbones = backbones.replace('(4, 9, 14, 19)', '(1,)')
  names = {}
  exec(first + maps + mae, names)
  assert (names['features'].shape, names['logits'].shape) == ((1, 64), (1, 1000))
  assert [x.shape[1] for x in names['maps']] == [56, 28, 14, 7]
  assert names['out'].pred.shape == (1, 196, 768)
  exec(backbones, names)
