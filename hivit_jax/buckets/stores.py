"""Objects of one bucket, by the clients of Google Cloud Storage and Amazon S3.

Both clients are optional packages, imported when a bucket is opened. They raise what they like;
`reason` says in one line what is wrong for good, and nothing else is tried a second time there.
"""

import contextlib
import errno
import io
import pathlib
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple, Protocol

from hivit_jax.errors import UserError

_CONNECT_SECONDS, _READ_SECONDS = 10, 60


class Conflict(Exception):
  """An object is no longer, or not yet, what a conditional write expects."""


class Found(NamedTuple):
  """An object.

  Attributes:
    content: all of it.
    version: for a conditional write.
  """

  content: bytes
  version: str


class Store(Protocol):
  """What both kinds of buckets can do; names are those of objects, with slashes in them."""

  def sizes(self, prefix: str) -> dict[str, int]:
    """Sizes in bytes by name, of the objects whose names begin with the prefix."""
    ...

  def read(self, name: str) -> Found | None:
    """An object, None if there is none."""
    ...

  def write(self, name: str, content: bytes, expected: str | None = None) -> str:
    """Writes an object, and returns its version.

    Args:
      name: of the object.
      content: all of it.
      expected: write only over this version; '': only if there is no such object; None: always.

    Raises:
      Conflict: it is not as expected.
    """
    ...

  def upload(self, path: pathlib.Path, name: str) -> None:
    """Copies a file into the bucket."""
    ...

  def download(self, name: str, path: pathlib.Path) -> None:
    """Copies an object into a file."""
    ...

  def delete(self, names: Iterable[str]) -> None:
    """Deletes objects, of which some may not exist."""
    ...

  def reason(self, error: Exception) -> str | None:
    """What is wrong, if it will not be better the next time; None: it may."""
    ...


def opened(scheme: str, bucket: str) -> Store:
  """The store of `gs://bucket` or `s3://bucket`; asks no server.

  Raises:
    UserError: the scheme is another one, or its package is absent.
  """
  kind, package = KINDS[scheme]
  try:
    return kind(bucket)
  except ModuleNotFoundError as error:
    raise UserError(f'{scheme}://{bucket} needs one more package: pip install {package}') from error
  except Exception as error:  # a client may look for credentials, profiles, regions
    raise UserError(f'{scheme}://{bucket}: {" ".join(str(error).split())[:300]}') from error


class GoogleStore:
  """A bucket of Google Cloud Storage; STORAGE_EMULATOR_HOST names another server."""

  def __init__(self, bucket: str):
    from google.api_core import exceptions
    from google.auth import exceptions as auth
    from google.cloud import storage

    self._errors, self._auth = exceptions, auth
    self._bucket = storage.Client(project=None).bucket(bucket)
    # `Bucket` tries again; it alone knows for how long.
    self._how: dict[str, Any] = {'retry': None, 'timeout': (_CONNECT_SECONDS, _READ_SECONDS)}

  def sizes(self, prefix: str) -> dict[str, int]:
    return {blob.name: blob.size for blob in self._bucket.list_blobs(prefix=prefix, **self._how)}

  def read(self, name: str) -> Found | None:
    try:
      blob = self._bucket.get_blob(name, **self._how)
      if blob is None:
        return None
      version = str(blob.generation)
      content = blob.download_as_bytes(if_generation_match=blob.generation, **self._how)
    except (self._errors.PreconditionFailed, self._errors.NotFound):  # replaced in between
      return self.read(name)
    return Found(content, version)

  def write(self, name: str, content: bytes, expected: str | None = None) -> str:
    blob = self._bucket.blob(name)
    condition = None if expected is None else int(expected or 0)
    try:
      # With a size it takes one request.
      options = {'size': len(content), 'if_generation_match': condition, **self._how}
      blob.upload_from_file(io.BytesIO(content), **options)
    except self._errors.PreconditionFailed as error:
      raise Conflict(name) from error
    return str(blob.generation)

  def upload(self, path: pathlib.Path, name: str) -> None:
    self._bucket.blob(name).upload_from_filename(str(path), **self._how)

  def download(self, name: str, path: pathlib.Path) -> None:
    self._bucket.blob(name).download_to_filename(str(path), **self._how)

  def delete(self, names: Iterable[str]) -> None:
    for name in names:
      with contextlib.suppress(self._errors.NotFound):
        self._bucket.delete_blob(name, **self._how)

  def reason(self, error: Exception) -> str | None:
    errors = self._errors
    if isinstance(error, errors.NotFound):
      return 'there is no such bucket'
    if isinstance(error, errors.Forbidden | errors.Unauthorized):
      return f'no permission ({_line(error)})'
    if isinstance(error, self._auth.DefaultCredentialsError):
      return 'no credentials were found (gcloud auth application-default login)'
    if isinstance(error, self._auth.RefreshError):
      return f'the credentials are not accepted ({_line(error)})'
    if isinstance(error, errors.ClientError) and not isinstance(error, errors.TooManyRequests):
      return _line(error)
    return _of_disk(error)


class AmazonStore:
  """A bucket of Amazon S3; AWS_ENDPOINT_URL_S3 names another server."""

  def __init__(self, bucket: str):
    import boto3
    from botocore import config, exceptions

    self._errors = exceptions
    settings = config.Config(
      connect_timeout=_CONNECT_SECONDS,
      read_timeout=_READ_SECONDS,
      retries={'total_max_attempts': 1},  # `Bucket` tries again; it alone knows for how long
      max_pool_connections=32,
    )
    self._client = boto3.client('s3', config=settings)
    self._name = bucket

  def sizes(self, prefix: str) -> dict[str, int]:
    pages = self._client.get_paginator('list_objects_v2').paginate(Bucket=self._name, Prefix=prefix)
    return {found['Key']: found['Size'] for page in pages for found in page.get('Contents', ())}

  def read(self, name: str) -> Found | None:
    try:
      found = self._client.get_object(Bucket=self._name, Key=name)
    except self._errors.ClientError as error:
      if _code(error) == 'NoSuchKey':
        return None
      raise
    return Found(found['Body'].read(), found['ETag'])

  def write(self, name: str, content: bytes, expected: str | None = None) -> str:
    condition: Mapping[str, str] = {}
    if expected is not None:
      condition = {'IfMatch': expected} if expected else {'IfNoneMatch': '*'}
    try:
      done = self._client.put_object(Bucket=self._name, Key=name, Body=content, **condition)
    except self._errors.ClientError as error:
      lost = ('PreconditionFailed', 'ConditionalRequestConflict', 'NoSuchKey')
      if condition and _code(error) in lost:
        raise Conflict(name) from error
      raise
    return done['ETag']

  def upload(self, path: pathlib.Path, name: str) -> None:
    with open(path, 'rb') as file:
      self._client.upload_fileobj(file, self._name, name)

  def download(self, name: str, path: pathlib.Path) -> None:
    self._client.download_file(self._name, name, str(path))

  def delete(self, names: Iterable[str]) -> None:
    names = list(names)
    for start in range(0, len(names), 1000):
      objects = [{'Key': name} for name in names[start : start + 1000]]
      done = self._client.delete_objects(Bucket=self._name, Delete={'Objects': objects})
      for failed in done.get('Errors', ()):
        raise OSError(f'{failed["Key"]} cannot be deleted: {failed["Message"]}')

  def reason(self, error: Exception) -> str | None:
    missing = (self._errors.NoCredentialsError, self._errors.PartialCredentialsError)
    if isinstance(error, missing):
      return 'no credentials were found (AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or a profile)'
    if isinstance(error, self._errors.ClientError):
      code = _code(error)
      status = error.response.get('ResponseMetadata', {}).get('HTTPStatusCode', 0)
      if code == 'NoSuchBucket':
        return 'there is no such bucket'
      if status in (401, 403):
        return f'no permission ({code}: {error.response["Error"].get("Message", "")})'
      if 300 <= status < 500 and status not in (408, 409, 429):
        return _line(error)
    return _of_disk(error)


KINDS = {
  'gs': (GoogleStore, '"google-cloud-storage>=3,<4"'),
  's3': (AmazonStore, '"boto3>=1.43,<2"'),
}


def _code(error: Any) -> str:
  return error.response.get('Error', {}).get('Code', '')


def _line(error: Exception) -> str:
  return ' '.join(str(error).split())[:300]


def _of_disk(error: Exception) -> str | None:
  """Trouble with the file on this side, which no server mends."""
  known = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES)
  if isinstance(error, OSError) and error.errno in known:
    return f'{error.filename}: {error.strerror}' if error.filename else error.strerror
  return None
