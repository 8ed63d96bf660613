"""The page to play with: its answers, and what it refuses."""

import functools
import http.client
import io
import re
import shutil
import socket
import struct
import threading
import zlib

import numpy as np
import pytest
from playwright.sync_api import expect, sync_playwright
from werkzeug.test import Client

from hivit_jax.tasks.reconstruction import Reconstructor
from hivit_jax.tools import playground, playground_pages
from hivit_jax.tools.playground import Playground
from tests import patience
from tests.helpers import TINY_MAE, random_model
from tests.runs import error_of
from tests.tools.test_playground import OWN, decoded, encoded, photograph, state

SHALLOW = {'depths': (1, 1, 1), 'decoder_depth': 1}
UNITS = 16  # of an image of 64x64 pixels


@functools.cache
def autoencoder() -> Playground:
  return Playground(state('mae_hivit_tiny', **TINY_MAE | SHALLOW))


@pytest.fixture(scope='module')
def client():
  return Client(playground_pages.Pages(autoencoder(), '127.0.0.1'))


def posted(client: Client, path: str, data: bytes | None, **fields):
  form = fields | ({} if data is None else {'picture': (io.BytesIO(data), 'x.png')})
  answer = client.post(path, data=form)
  answer.request.environ['wsgi.input'].close()  # of a large form a file
  return answer


def test_a_picture_is_shown_as_the_model_sees_it_with_its_feature_maps(client):
  found = posted(client, '/look', photograph()).json
  assert decoded(found['seen']).shape == (64, 64, 3)
  shapes = [decoded(level['picture']).shape for level in found['levels']]
  assert shapes == [(16, 16, 3), (8, 8, 3), (4, 4, 3), (2, 2, 3)]
  assert found['levels'][1]['text'] == 'level 2: 8x8, 16 channels'
  assert found['found'] is None


def test_a_seed_draws_the_mask_and_gives_the_pictures_of_the_reconstruct_tool(client):
  found = posted(client, '/reconstruct', photograph(), ratio='0.5', seed='7').json
  graphdef, params = random_model('mae_hivit_tiny', **TINY_MAE | SHALLOW)
  seen = decoded(posted(client, '/look', photograph()).json['seen'])
  expected = Reconstructor(graphdef, mask_ratio=0.5, **OWN)(params, seen[None], seed=7)
  removed = np.array([unit == '1' for unit in found['mask']]).reshape(4, 4)
  assert removed.sum() == UNITS // 2
  removed = removed.repeat(16, axis=0).repeat(16, axis=1)
  np.testing.assert_array_equal(expected.masked[0], np.where(removed[..., None], 128, seen))
  for key in ('reconstruction', 'pasted'):
    difference = decoded(found[key]).astype(int) - getattr(expected, key)[0]
    assert np.abs(difference).max() <= 1, key


def test_painted_masks_of_every_count_need_no_new_program(client):
  pictures = {}
  for count in (1, 9, UNITS - 1):
    mask = '1' * count + '0' * (UNITS - count)
    found = posted(client, '/reconstruct', photograph(), mask=mask).json
    assert found['mask'] == mask
    pictures[count] = decoded(found['pasted'])
  assert autoencoder()._reconstructor._predict._cache_size() == 1
  seen = decoded(posted(client, '/look', photograph()).json['seen'])
  np.testing.assert_array_equal(pictures[1][:, 16:], seen[:, 16:])
  assert (pictures[1][:16, :16] != seen[:16, :16]).any()
  assert (pictures[9] != pictures[UNITS - 1])[:16, :16].any()


def bomb(width: int, height: int) -> bytes:
  """A PNG of a few bytes that says it is so large."""
  header = struct.pack('>IIBBBBB', width, height, 8, 2, 0, 0, 0)
  chunks = [
    struct.pack('>I', len(data)) + kind + data + struct.pack('>I', zlib.crc32(kind + data))
    for kind, data in ((b'IHDR', header), (b'IDAT', zlib.compress(bytes(99))))
  ]
  return b'\x89PNG\r\n\x1a\n' + b''.join(chunks)


def archive() -> bytes:
  file = io.BytesIO()
  np.savez_compressed(file, image=np.zeros((64, 64, 3), np.uint8))
  return file.getvalue()


@pytest.mark.parametrize(
  ('data', 'status', 'line'),
  [
    (b'', 415, r'cannot read the picture: not an image \(0 bytes'),
    (b'<html>nothing</html>', 415, 'not an image'),
    (photograph()[:900], 415, 'cannot read the picture: .*truncated'),
    (bomb(8000, 8000), 415, '8000x8000 pixels; at most 50000000 are read'),
    (bomb(30_000, 30_000), 415, 'exceeds limit of'),
    (
      encoded(np.zeros((2, 60, 3), np.uint8)),
      415,
      '60x2 pixels; the longer side may',
    ),
    (archive(), 415, 'an array, not a picture'),
    (bytes(playground_pages.MAX_BYTES), 413, 'the picture has more than 32 MB'),
    (None, 400, 'picture: expected a file'),
  ],
)
@pytest.mark.parametrize('path', ['/look', '/reconstruct'])
def test_what_is_no_picture_gets_a_line(client, path, data, status, line):
  answer = posted(client, path, data, mask='10' * 8)
  assert answer.status_code == status
  assert re.search(line, answer.json['error'])


@pytest.mark.parametrize(
  ('fields', 'line'),
  [
    ({'mask': '01'}, '^mask: expected 16 characters, each 0 or 1$'),
    ({'mask': '2' * 16}, '^mask: expected 16 characters'),
    ({'mask': '[0, 1, 0, 1, 0, 1'}, '^mask: expected 16 characters'),
    ({'mask': '0' * 16}, 'mask must keep the same number of units, 1 to 15'),
    ({'mask': '1' * 16}, 'mask must keep the same number of units, 1 to 15'),
    ({'mask': '1' * 200_000}, 'the picture has more than'),
    ({'ratio': 'half'}, '^ratio=half: expected a number of at least 0$'),
    ({'ratio': 'nan'}, '^ratio=nan: expected'),
    ({'ratio': '0.99'}, 'mask_ratio 0.99 keeps 0 of 16 units'),
    ({'seed': '-1'}, '^seed=-1: expected'),
    ({'seed': '9' * 5000}, '^seed=99999999999999999999: expected'),
  ],
)
def test_a_mask_that_does_not_fit_gets_a_line(client, fields, line):
  answer = posted(client, '/reconstruct', photograph(), **fields)
  assert 400 <= answer.status_code < 500
  assert re.search(line, answer.json['error'])


def test_a_broken_form_gets_a_line(client):
  answer = client.post('/look', data=b'\0' * 99, content_type='multipart/form-data; boundary=x')
  assert answer.status_code == 400
  answer = client.post('/look', data=b'{"picture": [', content_type='application/json')
  assert (answer.status_code, answer.json) == (
    400,
    {'error': 'picture: expected a file in a form (multipart/form-data)'},
  )


@pytest.mark.parametrize(
  ('path', 'options', 'status'),
  [
    ('/', {}, 200),
    ('/page.js', {}, 200),
    ('/examples/0', {}, 200),
    ('/about', {'headers': {'Host': 'localhost:8000'}}, 200),
    ('/about', {'headers': {'Host': '[::1]:8000'}}, 200),
    ('/about', {'headers': {'Host': 'a.site.example'}}, 403),
    ('/about', {'headers': {'Host': ''}}, 403),
    ('/about', {'headers': {'Host': '[broken'}}, 403),
    ('/about', {'headers': {'Origin': 'https://a.site.example'}}, 403),
    ('/about', {'headers': {'Origin': 'http://localhost', 'Host': 'localhost'}}, 200),
    ('/about', {'method': 'POST'}, 405),
    ('/look', {}, 405),
    ('/../serve.py', {}, 404),
    ('/%2e%2e/serve.py', {}, 404),
    ('/page/index.html', {}, 404),
    ('/examples/99', {}, 404),
  ],
)
def test_only_this_page_is_served_and_only_to_itself(client, path, options, status):
  answer = client.open(path, **options)
  assert answer.status_code == status
  assert "default-src 'none'" in answer.headers['Content-Security-Policy']
  assert not any(name.startswith('Access-Control') for name, _ in answer.headers)
  assert status == 200 or re.fullmatch('.+', answer.json['error'])


def test_a_bug_is_a_line_and_the_server_goes_on(client, monkeypatch, caplog):
  monkeypatch.setattr(playground, '_url', lambda pixels: 1 / 0)
  answer = posted(client, '/look', photograph())
  assert answer.status_code == 500
  assert answer.json == {'error': 'this failed; the terminal of the server says why'}
  assert 'ZeroDivisionError' in caplog.text
  monkeypatch.undo()
  assert posted(client, '/look', photograph()).status_code == 200


@pytest.fixture(scope='module')
def address():
  """Host and port of a server that runs."""
  listening = socket.create_server(('127.0.0.1', 0))
  pages = playground_pages.Pages(autoencoder(), '127.0.0.1')
  with listening, playground_pages.server(pages, listening) as server:
    thread = threading.Thread(target=server.serve_forever, kwargs={'poll_interval': 0.01})
    thread.start()
    yield listening.getsockname()
    server.shutdown()
    thread.join()


def test_over_a_socket_a_huge_upload_gets_its_line_and_the_next_one_an_answer(address):
  for size, status in ((3 * playground_pages.MAX_BYTES, 413), (10, 400)):
    connection = http.client.HTTPConnection(*address)
    connection.request('POST', '/look', bytes(size), {'Content-Type': 'multipart/form-data'})
    assert connection.getresponse().status == status
    connection.close()


BROWSERS = ('chromium', 'chromium-browser', 'google-chrome')
QUIET = (  # for a browser that root runs and that asks nobody for updates
  *('--no-sandbox', '--disable-gpu', '--disable-quic', '--no-first-run', '--disable-sync'),
  *('--disable-background-networking', '--disable-component-update'),
)


@pytest.fixture
def browser_page(address):
  """The page in a browser, when it has shown its first example."""
  found = next(filter(None, map(shutil.which, BROWSERS)), None)
  if found is None:
    pytest.skip(f'none of {", ".join(BROWSERS)} is installed: apt-get install chromium')
  milliseconds = 1000 * patience.limit(60)
  with sync_playwright() as playwright:
    launch = functools.partial(playwright.chromium.launch, timeout=milliseconds)
    with launch(executable_path=found, args=QUIET) as browser:
      page = browser.new_page(reduced_motion='reduce')
      page.set_default_timeout(milliseconds)
      expect.set_options(timeout=milliseconds)
      with page.expect_response('**/reconstruct'):
        page.goto('http://{}:{}'.format(*address))
      expect(page.locator('#pasted')).to_have_attribute('src', re.compile('^data:'))
      yield page


def test_in_a_browser_one_uploads_paints_and_reads_what_went_wrong(browser_page, tmp_path):
  page, result = browser_page, browser_page.locator('#pasted')

  def upload(data: bytes) -> None:
    (tmp_path / 'x.png').write_bytes(data)
    page.set_input_files('#file', tmp_path / 'x.png')

  def unit(row: int, column: int) -> tuple[float, float]:
    box = page.locator('#mask').bounding_box()
    return box['x'] + (column + 0.5) * box['width'] / 4, box['y'] + (row + 0.5) * box['height'] / 4

  before = result.get_attribute('src')
  with page.expect_response('**/reconstruct') as answer:
    upload(photograph())
  expect(result).not_to_have_attribute('src', before)
  assert page.locator('#levels figure').count() == 4
  mask, before = answer.value.json()['mask'], result.get_attribute('src')

  with page.expect_response('**/reconstruct') as answer:
    page.mouse.click(*unit(1, 2))
  painted = [kept if i != 6 else str(1 - int(kept)) for i, kept in enumerate(mask)]
  assert answer.value.json()['mask'] == ''.join(painted)
  expect(result).not_to_have_attribute('src', before)
  expect(page.locator('#count')).to_contain_text(f'{painted.count("1")} of 16 units hidden')
  before = result.get_attribute('src')

  line = page.locator('#error')
  for data, wrong in ((b'no picture', 'not an image'), (bytes(33 << 20), 'more than 32 MB')):
    upload(data)
    expect(line).to_contain_text(wrong)
    assert result.get_attribute('src') == before
  page.click('#another')
  expect(result).not_to_have_attribute('src', before)
  expect(line).to_be_hidden()


@pytest.mark.parametrize(
  ('flags', 'message'),
  [
    ([], "which model? Either a run's --workdir=DIRECTORY or --weights=FILE"),
    (['--weights=x', 'a.png'], 'a.png: there is nothing to name; pictures are chosen on'),
    (['--weights=x', '--port=70000'], '--port=70000'),
    (
      ['--weights=x', '--host=no.invalid'],
      'cannot listen on --host=no.invalid',
    ),
    (
      ['--weights=x', '--port={taken}'],
      '--port={taken}: Address already in use; --port=0 takes',
    ),
    (['--weights=x', '--port=0'], 'x does not exist; give a .pth or .safetensors file'),
  ],
)
def test_mistakes_are_one_line(forks, flags, message):
  with socket.create_server(('127.0.0.1', 0)) as taken:
    fill = functools.partial(str.format, taken=taken.getsockname()[1])
    assert fill(message) in error_of(forks('hivit_jax/tools/serve.py', *map(fill, flags)))
