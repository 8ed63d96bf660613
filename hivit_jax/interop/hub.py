"""Models on the Hugging Face Hub, through the optional package `huggingface_hub`.

The client's own settings apply: `HF_HOME` and `HF_HUB_CACHE` for the cache, `HF_HUB_OFFLINE`,
`HF_ENDPOINT`, `HF_TOKEN` or the token of `hf auth login`. Only safetensors and JSON are ever
downloaded.
"""

import contextlib
import os
import pathlib
import re
from collections.abc import Iterator
from typing import Any

from hivit_jax.errors import UserError
from hivit_jax.interop import pretrained
from hivit_jax.interop.files import StateDict

PREFIX = 'hf-hub:'  # before the name of a repository, as timm has it
CARD = 'README.md'
_NAME = re.compile(r'hf-hub:(?P<repo>[\w.-]+/[\w.-]+)(@(?P<revision>[\w./-]+))?')


def is_name(path: str | os.PathLike[str]) -> bool:
  """Whether it is `hf-hub:...`, no path."""
  return str(path).startswith(PREFIX)


def read(name: str, *, ema: bool = False) -> StateDict:
  """Reads the model of a repository, from the cache if it is already there.

  Args:
    name: `hf-hub:OWNER/NAME`, or `hf-hub:OWNER/NAME@REVISION` for a branch, a tag, or a commit,
      which never changes.
    ema: as for `files.read`; such files have no averaged weights.

  Raises:
    UserError: no such repository or revision, no access to it, no connection and no copy in the
      cache, no `model.safetensors`, or it is damaged.
  """
  repo, revision = _parts(name)
  api = _api(name)
  with _explained(name):
    weights = api.hf_hub_download(repo, pretrained.WEIGHTS, revision=revision)
  folder = pathlib.Path(weights).parent  # its name is that of the commit
  absent = [_errors().RemoteEntryNotFoundError]
  if _offline():  # else it is a connection that failed
    absent.append(_errors().LocalEntryNotFoundError)
  with _explained(name), contextlib.suppress(*absent):
    api.hf_hub_download(repo, pretrained.CONFIG, revision=folder.name)
  state = pretrained.read(folder, ema=ema)
  return state._replace(source=f'{PREFIX}{repo}@{folder.name}')


def upload(folder: pathlib.Path, name: str, *, message: str, private: bool | None = None) -> str:
  """Uploads the files of a folder, in one commit; the repository is created if needed.

  A model card that the repository has stays: people edit it.

  Args:
    folder: has the files.
    name: as for `read`; the revision is a branch, created if needed.
    message: of the commit.
    private: whether a new repository is; None: as its owner's account has it.

  Returns:
    The name with the commit as its revision, for `read`.

  Raises:
    UserError: see `check_upload`; no permission, no connection, or HF_HUB_OFFLINE is set.
  """
  repo, branch = check_upload(name)
  api = _api(name)
  with _explained(name):
    api.create_repo(repo, private=private, exist_ok=True)
    if branch is not None:
      api.create_branch(repo, branch=branch, exist_ok=True)
    kept = [CARD] if api.file_exists(repo, CARD, revision=branch) else None
    done = api.upload_folder(
      repo_id=repo,
      folder_path=folder,
      revision=branch,
      commit_message=message,
      ignore_patterns=kept,
    )
  return f'{PREFIX}{repo}@{done.oid}'


def check_upload(name: str) -> tuple[str, str | None]:
  """Repository and branch of a name for `upload`.

  Raises:
    UserError: it is no such name, it names a commit, or `huggingface_hub` is absent.
  """
  repo, branch = _parts(name)
  if branch and re.fullmatch(r'[0-9a-f]{40}', branch):
    raise UserError(f'{name}: a commit never changes; name a branch, or none')
  _api(name)
  return repo, branch


def _parts(name: str) -> tuple[str, str | None]:
  match = _NAME.fullmatch(name)
  if not match:
    raise UserError(f'{name}: expected {PREFIX}OWNER/NAME or {PREFIX}OWNER/NAME@REVISION')
  return match['repo'], match['revision']


def _api(name: str) -> Any:
  try:
    import huggingface_hub
  except ModuleNotFoundError:
    raise UserError(f'{name} needs huggingface_hub: pip install huggingface_hub') from None
  return huggingface_hub.HfApi(library_name='hivit_jax')


def _errors() -> Any:
  from huggingface_hub import errors

  return errors


def _offline() -> bool:
  from huggingface_hub import constants

  return constants.HF_HUB_OFFLINE


@contextlib.contextmanager
def _explained(name: str) -> Iterator[None]:
  """One line for what can go wrong between here and the Hub."""
  errors = _errors()
  try:
    yield
  except errors.GatedRepoError:
    raise UserError(
      f'{name} is gated: accept its terms on the website, then hf auth login'
    ) from None
  except errors.RevisionNotFoundError:
    raise UserError(f'{name}: the repository has no such revision') from None
  except errors.RepositoryNotFoundError:
    raise UserError(
      f'{name}: there is no such repository, or it is private: hf auth login, or HF_TOKEN'
    ) from None
  except errors.LocalEntryNotFoundError as error:
    raise UserError(
      f'{name} is not in the cache, and cannot be downloaded: {_first(error)}'
    ) from None
  except errors.EntryNotFoundError:
    raise UserError(
      f'{name} has no {pretrained.WEIGHTS}; other kinds of files are not loaded from the Hub'
    ) from None
  except Exception as error:  # its errors and those of its HTTP client have no common base
    raise UserError(f'{name}: {_first(error)}') from error


def _first(error: Exception) -> str:
  """The first line of a message."""
  return str(error).strip().split('\n')[0] or type(error).__name__
