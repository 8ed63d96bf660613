"""Servers for all tests of buckets; each file has its own."""

import tempfile
from collections.abc import Iterator

import pytest

from hivit_jax.buckets import bucket
from tests.buckets.servers import Server, serve


@pytest.fixture(scope='module', params=['s3', 'gs'])
def server(request) -> Iterator[Server]:
  with serve(request.param) as server:
    yield server


@pytest.fixture(autouse=True)
def short_patience(monkeypatch):
  """A server that does not answer as it should ends a test, not the patience of who runs it."""
  monkeypatch.setattr(bucket, 'PATIENCE', 10)


@pytest.fixture(autouse=True)
def own_temporary_directory(monkeypatch, tmp_path_factory):
  monkeypatch.setattr(tempfile, 'tempdir', str(tmp_path_factory.mktemp('temporary')))
