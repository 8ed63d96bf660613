"""The notebooks as they lie in the repository; the documentation build runs them."""

import ast
import json
import re
from typing import Any

import pytest

from docs import address, generate

NOTEBOOKS = [pytest.param(file, id=file.stem) for file in generate.NOTEBOOKS]


def cells(text: str, kind: str) -> list[dict[str, Any]]:
  return [cell for cell in json.loads(text)['cells'] if cell['cell_type'] == kind]


def python(cell: dict[str, Any]) -> str:
  """The code of a cell, without magic commands."""
  return re.sub(r'^( *)%.*', r'\1pass', ''.join(cell['source']), flags=re.MULTILINE)


def test_there_are_six():
  assert len(NOTEBOOKS) == 6


@pytest.mark.parametrize('file', NOTEBOOKS)
def test_notebooks_are_clean(file):
  """Without outputs, in one form, so that a difference shows what was changed."""
  text = file.read_text('utf-8')
  content = json.loads(text)
  form = {'indent': 1, 'ensure_ascii': False, 'sort_keys': True}
  assert text == json.dumps(content, **form) + '\n', 'not in the form that docs/notebooks have'
  for cell in cells(text, 'code'):
    assert (cell['outputs'], cell['execution_count']) == ([], None), cell['id']
    ast.parse(python(cell), cell['id'])
  names = [cell['id'] for cell in content['cells']]
  assert len(names) == len(set(names))


@pytest.mark.parametrize('file', NOTEBOOKS)
def test_the_first_cell_installs_from_the_one_address(file):
  text = file.read_text('utf-8')
  first, *others = (''.join(cell['source']) for cell in cells(text, 'code'))
  reference = ''.join(cells(generate.NOTEBOOKS[0].read_text('utf-8'), 'code')[0]['source'])
  assert first == reference
  assert f"\nREPOSITORY = '{address.REPOSITORY}'" in first, 'stale: run python -m docs.generate'
  assert not any('REPOSITORY' in code for code in others)


def test_the_first_cell_is_a_cell_of_its_own(monkeypatch):
  """Where the package is installed, it needs no address and installs nothing."""
  code = python(cells(generate.NOTEBOOKS[0].read_text('utf-8'), 'code')[0])
  names: dict[str, Any] = {}
  monkeypatch.setenv('HIVIT_JAX_NOTEBOOKS', 'full')
  exec(code, names)
  assert names['FULL'] is True
  monkeypatch.setattr('importlib.util.find_spec', lambda name: None)
  with pytest.raises(AssertionError, match='pip install'):
    exec(code.replace(f"'{address.REPOSITORY}'", "''"), {})


def test_the_address_is_written_into_the_first_cell():
  text = generate.NOTEBOOKS[0].read_text('utf-8')
  other = generate.with_address(text, 'https://example.org/x')
  first, *others = cells(other, 'code')
  assert "\nREPOSITORY = 'https://example.org/x'" in ''.join(first['source'])
  assert others == cells(text, 'code')[1:]
  assert generate.with_address(other) == text


@pytest.mark.parametrize('file', NOTEBOOKS)
def test_notebooks_say_what_they_cost(file):
  first = ''.join(cells(file.read_text('utf-8'), 'markdown')[0]['source'])
  assert first.startswith('# ')
  assert '**What it costs:**' in first
  assert 'FULL = True' in first or '`FULL`' in first
