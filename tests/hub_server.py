"""A server on this machine that speaks as much of the Hugging Face Hub as its client needs.

Repositories with branches, commits, regular and LFS files, downloads; one token may write.
"""

import base64
import hashlib
import http.server
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

TOKEN = 'hf_of_the_tests'
Files = dict[str, bytes]


class Hub:
  """What the server has.

  Attributes:
    commits: files by repository and commit.
    branches: commit by repository and branch.
    asked: every request, as 'GET /path'.
    url: for HF_ENDPOINT.
  """

  def __init__(self):
    self.commits: dict[str, dict[str, Files]] = {}
    self.branches: dict[str, dict[str, str]] = {}
    self.asked: list[str] = []
    self.lfs: dict[str, bytes] = {}
    self.url = ''

  def commit(self, repo: str, files: Files, branch: str = 'main') -> str:
    """Adds files to a branch; returns the commit."""
    commits, branches = self.commits.setdefault(repo, {}), self.branches.setdefault(repo, {})
    known = commits.get(branches.get(branch, ''), {}) | files
    content = ''.join(f'{name}{hashlib.sha1(data).hexdigest()}' for name, data in known.items())
    name = hashlib.sha1(f'{repo}{len(commits)}{content}'.encode()).hexdigest()
    commits[name], branches[branch] = known, name
    return name

  def file(self, repo: str, revision: str, name: str) -> tuple[str, bytes] | str:
    """A file and its commit, or the Hub's word for what is missing."""
    if repo not in self.commits:
      return 'RepoNotFound'
    commit = self.branches[repo].get(revision, revision)
    if commit not in self.commits[repo]:
      return 'RevisionNotFound'
    data = self.commits[repo][commit].get(name)
    return 'EntryNotFound' if data is None else (commit, data)


@contextmanager
def serve() -> Iterator[Hub]:
  """Runs a server on a free port as long as the block."""
  hub = Hub()
  server = http.server.ThreadingHTTPServer(
    ('127.0.0.1', 0), type('Bound', (_Handler,), {'hub': hub})
  )
  hub.url = f'http://127.0.0.1:{server.server_port}'
  thread = threading.Thread(target=server.serve_forever, daemon=True)
  thread.start()
  try:
    yield hub
  finally:
    server.shutdown()
    server.server_close()
    thread.join()


class _Handler(http.server.BaseHTTPRequestHandler):
  hub: Hub
  protocol_version = 'HTTP/1.1'

  def log_message(self, format: str, *args: Any) -> None:
    pass

  def _answer(self, content: Any = b'', status: int = 200, **headers: str) -> None:
    data = content if isinstance(content, bytes) else json.dumps(content).encode()
    self.send_response(status)
    for name, value in ({'Content-Length': str(len(data))} | headers).items():
      self.send_header(name.replace('_', '-'), value)
    self.end_headers()
    if self.command != 'HEAD':
      self.wfile.write(data)

  def _body(self) -> bytes:
    self.hub.asked.append(f'{self.command} {self.path}')
    return self.rfile.read(int(self.headers.get('Content-Length', 0)))

  def do_GET(self) -> None:
    self._body()
    match = re.fullmatch(r'/([\w.-]+/[\w.-]+)/resolve/([^/]+)/([\w./-]+)', self.path)
    found = self.hub.file(*match.groups()) if match else 'EntryNotFound'
    if isinstance(found, str):
      return self._answer(status=404, X_Error_Code=found)
    commit, data = found
    tag = f'"{hashlib.sha256(data).hexdigest()}"'
    return self._answer(data, ETag=tag, X_Repo_Commit=commit)

  do_HEAD = do_GET

  def do_PUT(self) -> None:
    data = self._body()
    self.hub.lfs[hashlib.sha256(data).hexdigest()] = data
    self._answer()

  def do_POST(self) -> None:
    body = self._body()
    if self.headers.get('Authorization') != f'Bearer {TOKEN}':
      return self._answer({'error': 'no such token'}, 401)
    if self.path == '/api/validate-yaml':  # the header of a card
      return self._answer({'errors': [], 'warnings': []})
    if self.path == '/api/repos/create':
      asked = json.loads(body)
      repo = f'{asked["organization"]}/{asked["name"]}'
      new = repo not in self.hub.commits
      if new:
        self.hub.commit(repo, {'.gitattributes': b''})
      return self._answer({'url': f'{self.hub.url}/{repo}'}, 200 if new else 409)
    if self.path.endswith('/objects/batch'):
      objects = json.loads(body)['objects']
      for known in objects:
        known['actions'] = {'upload': {'href': f'{self.hub.url}/lfs/{known["oid"]}'}}
      return self._answer({'transfer': 'basic', 'objects': objects})
    match = re.fullmatch(
      r'/api/models/([\w.-]+/[\w.-]+)/(preupload|commit|branch)/([\w.-]+)', self.path
    )
    assert match, self.path
    repo, action, revision = match.groups()
    if action == 'preupload':
      files = [
        {'path': file['path'], 'shouldIgnore': False,
         'uploadMode': 'lfs' if file['path'].endswith('.safetensors') else 'regular'}
        for file in json.loads(body)['files']
      ]  # fmt: skip
      return self._answer({'files': files})
    if action == 'branch':
      branches = self.hub.branches[repo]
      status = 409 if revision in branches else 201
      branches.setdefault(revision, branches['main'])
      return self._answer({}, status)
    commit = self.hub.commit(repo, dict(self._committed(body)), revision)
    url = f'{self.hub.url}/{repo}/commit/{commit}'
    return self._answer({'commitUrl': url, 'commitOid': commit, 'hookOutput': ''})

  def _committed(self, body: bytes) -> Iterator[tuple[str, bytes]]:
    for line in map(json.loads, body.splitlines()):
      value = line['value']
      if line['key'] == 'file':
        yield value['path'], base64.b64decode(value['content'])
      elif line['key'] == 'lfsFile':
        yield value['path'], self.hub.lfs[value['oid']]
