"""The documentation site: every page of docs/ and the docstrings of what is public.

  python -m sphinx -W -n --keep-going -b html docs OUT

The pages are written for the repository's web page, where links lead to files. Here links to files
outside docs/ lead to the page that includes them; else, if the address of the repository is known
from HIVIT_JAX_REPOSITORY or docs/address.py, to the file there; else to a copy of it in the site.

The notebooks are run, in their short form; HIVIT_JAX_NOTEBOOKS=full runs the long one, =off none.
"""

import os
import pathlib
import re
import sys

DOCS = pathlib.Path(__file__).parent
ROOT = DOCS.parent
sys.path.insert(0, str(ROOT))

import hivit_jax  # noqa: E402
from docs import address  # noqa: E402

REPOSITORY = os.environ.get('HIVIT_JAX_REPOSITORY', address.REPOSITORY).rstrip('/')
NOTEBOOKS = os.environ.get('HIVIT_JAX_NOTEBOOKS', 'short')

# Files that a page of the site is made of -> that page.
PAGES = {
  'README.md': 'index.md',
  'docs/README.md': 'index.md',
  'CONTRIBUTING.md': 'contributing.md',
  'CHANGELOG.md': 'changelog.md',
}

project = 'hivit_jax'
version = release = hivit_jax.__version__
author = 'the authors of hivit_jax'
copyright = author

extensions = ['myst_nb', 'sphinx.ext.autodoc', 'sphinx.ext.napoleon', 'sphinx.ext.viewcode']
exclude_patterns = ['README.md']
highlight_language = 'text'  # blocks without a language are shell commands
default_role = 'code'  # `name` in docstrings
nitpicky = True
# Types of other packages, and names that only stand in annotations: no inventory is fetched.
nitpick_ignore_regex = [(r'py:.*', r'(?!hivit_jax\.).*'), (r'py:.*', r'hivit_jax\..*\._?[A-Z]\w*')]

# Kernels run in a folder of their own. They see the package that is installed, or this checkout.
os.environ['PYTHONPATH'] = os.pathsep.join(
  [*filter(None, [os.environ.get('PYTHONPATH')]), str(ROOT)]
)
nb_execution_mode = 'off' if NOTEBOOKS == 'off' else 'force'
nb_execution_in_temp = True
nb_execution_timeout = -1 if NOTEBOOKS == 'full' else 600  # seconds a cell, on a busy machine
nb_execution_raise_on_error = True
nb_merge_streams = True
nb_mime_priority_overrides = [('html', 'image/png', 5)]  # PIL images also come as JPEG

myst_heading_anchors = 4
myst_links_external_new_tab = False

napoleon_numpy_docstring = False
napoleon_use_ivar = True
napoleon_custom_sections = [
  ('Settings of every model', 'params_style'),
  ('Settings of a family', 'params_style'),
]
napoleon_use_rtype = False
autodoc_member_order = 'bysource'
autodoc_preserve_defaults = True

html_theme = 'sphinx_book_theme'
html_title = 'hivit_jax'
html_theme_options = {'show_toc_level': 2, 'navbar_persistent': []}
if REPOSITORY:
  html_theme_options |= {
    'repository_url': REPOSITORY,
    'use_repository_button': True,
    'use_issues_button': True,
    'repository_branch': 'main',
    'path_to_docs': 'docs',
    'launch_buttons': {'colab_url': 'https://colab.research.google.com'},
  }

_LINK = re.compile(r'(?<=\]\()(?!\w+:|#)([^)\s#]+)')
_INCLUDE = re.compile(r'```\{include\} (\S+)\n(?::(start|end): (.+)\n)?```\n')


def read(page: pathlib.Path, place: pathlib.Path, text: str) -> str:
  """The text of a page, with what it includes and with links that fit the site.

  Args:
    page: file that the text is from; its links are relative to it.
    place: page of the site that the text is for.
    text: Markdown. An `{include}` takes a whole file, or what is from `:start:` on or before
      `:end:`.
  """

  def included(match: re.Match) -> str:
    file = (page.parent / match[1]).resolve()
    whole, kind, mark = file.read_text('utf-8'), match[2], match[3]
    if kind and mark not in whole:
      raise ValueError(f'{page} includes {match[1]}, which has no line "{mark}"')
    before, _, after = whole.partition(mark) if kind else ('', '', whole)
    return read(file, place, before if kind == 'end' else (mark or '') + after)

  def link(match: re.Match) -> str:
    file = pathlib.Path(os.path.normpath(page.parent / match[1]))
    name = file.relative_to(ROOT).as_posix()
    if name in PAGES:
      file = DOCS / PAGES[name]
    elif REPOSITORY and not name.startswith('docs/'):
      return f'{REPOSITORY}/{"tree" if file.is_dir() else "blob"}/main/{name}'
    return os.path.relpath(file, place.parent)

  return _INCLUDE.sub(included, _LINK.sub(link, text))


def setup(app) -> None:
  """Connects `read`."""

  def on_read(app, name: str, source: list[str]) -> None:
    page = pathlib.Path(app.env.doc2path(name))
    source[0] = read(page, page, source[0])

  app.connect('source-read', on_read)
