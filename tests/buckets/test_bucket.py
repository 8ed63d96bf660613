"""Buckets against real servers on this machine: objects, errors, patience."""

import re
import threading
import time
from http import HTTPStatus

import pytest

from hivit_jax.buckets import bucket as buckets
from hivit_jax.buckets.bucket import Bucket
from hivit_jax.buckets.stores import Conflict
from hivit_jax.errors import UserError


@pytest.fixture
def place(server, request):
  yield Bucket(server.address(re.sub(r'\W', '_', request.node.name)))
  server.before = None


def test_objects_come_back_as_they_were_written(place, tmp_path):
  content = bytes(range(256)) * 33 + b'\r\n--==0==\n'
  (tmp_path / 'a').write_bytes(content)
  (tmp_path / 'empty').write_bytes(b'')
  place.upload({'checkpoints/1/a': tmp_path / 'a', 'b': tmp_path / 'empty'})
  assert place.sizes() == {'checkpoints/1/a': len(content), 'b': 0}
  assert place.sizes('checkpoints/') == {'checkpoints/1/a': len(content)}
  place.download({'checkpoints/1/a': tmp_path / 'new' / 'a', 'b': tmp_path / 'new' / 'b'})
  assert (tmp_path / 'new' / 'a').read_bytes() == content
  assert (tmp_path / 'new' / 'b').read_bytes() == b''
  assert place.read('checkpoints/1/a').content == content
  place.delete(['checkpoints/1/a', 'never there'])
  assert place.sizes() == {'b': 0}
  assert place.read('checkpoints/1/a') is None


def test_a_conditional_write_is_done_only_over_the_version_that_it_names(place):
  first = place.write('lock', b'1', '')
  with pytest.raises(Conflict):
    place.write('lock', b'2', '')
  second = place.write('lock', b'2', first)
  with pytest.raises(Conflict):
    place.write('lock', b'3', first)
  assert place.read('lock') == (b'2', second)


def test_of_many_that_create_one_object_one_succeeds(place):
  won = []

  def create(i):
    try:
      place.write('one', b'%d' % i, '')
      won.append(b'%d' % i)
    except Conflict:
      pass

  threads = [threading.Thread(target=create, args=(i,)) for i in range(6)]
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join()
  assert won == [place.read('one').content]


def test_a_server_that_is_away_for_a_while_is_waited_for(place, server, caplog):
  server.stop()
  threading.Timer(0.8, server.start).start()
  place.write('a', b'1')
  assert place.read('a').content == b'1'


def test_a_server_that_stays_away_is_told_in_one_line(place, server, monkeypatch):
  monkeypatch.setattr(buckets, 'PATIENCE', 0.2)
  server.stop()
  start = time.monotonic()
  with pytest.raises(UserError) as told:
    place.sizes()
  assert time.monotonic() - start < 5
  server.start()
  assert str(told.value).startswith(f'{place.address}: the server could not be reached for ')
  assert 'start the same command again' in str(told.value)
  assert '\n' not in str(told.value)


def test_without_permission_a_line_says_so_at_once_and_trouble_of_the_server_is_waited_for(
  place, server
):
  asked = []

  def refuse(method, path):
    if 'prefix=' in path:  # Google's client asks for the bucket as well, in a thread of its own
      asked.append(method)
    return HTTPStatus.SERVICE_UNAVAILABLE if len(asked) < 3 else HTTPStatus.FORBIDDEN

  server.before = refuse
  with pytest.raises(UserError, match=rf'^{place.address}: no permission \('):
    place.sizes()
  assert len(asked) == 3


def test_a_bucket_that_is_not_there_is_told_at_once(server):
  address = server.address('run').replace('://bucket', '://no-such-bucket')
  with pytest.raises(UserError, match=f'^{address}: there is no such bucket$'):
    Bucket(address).sizes()


def test_addresses_that_name_no_place_are_refused():
  for address in ('s3://', 's3://bucket', 'gs://bucket/', 's3://bucket/../x'):
    with pytest.raises(UserError, match='name a place in the bucket, such as'):
      Bucket(address)
  with pytest.raises(UserError, match=r'az://x/y: buckets are gs://BUCKET/PATH and s3://BUCKET'):
    Bucket('az://x/y')
