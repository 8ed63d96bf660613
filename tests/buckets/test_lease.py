"""The lock of a workdir in a bucket, against real servers on this machine."""

import json
import re
import threading
import time

import pytest

from hivit_jax.buckets import lease
from hivit_jax.buckets.bucket import Bucket
from hivit_jax.buckets.lease import Lease
from hivit_jax.errors import UserError

SECONDS = 0.8


@pytest.fixture
def place(server, request):
  return Bucket(server.address(re.sub(r'\W', '_', request.node.name)))


def held_elsewhere(place, monkeypatch, **changes):
  """Leaves the lock of a run of another machine that was killed."""
  run = Lease(place, SECONDS)
  run._holder |= {'by': 'process 7 on elsewhere since long', 'kernel': 'another'} | changes
  run._take()
  return run


def test_a_second_run_is_refused_with_the_name_of_the_first_until_that_ends(place):
  with Lease(place, SECONDS):
    with pytest.raises(UserError) as told, Lease(place, SECONDS):
      pass
    assert re.fullmatch(
      rf'{place.address} is in use by another run, process \d+ on \S+ since 20.*; wait until it '
      'ends, stop it, or choose another --workdir',
      str(told.value),
    )
  assert place.read('lock').content == b''
  with Lease(place, SECONDS):
    pass


def test_what_a_killed_run_of_another_machine_left_ends_when_it_is_not_renewed(place, monkeypatch):
  held_elsewhere(place, monkeypatch)
  start = time.monotonic()
  with Lease(place, SECONDS):
    assert time.monotonic() - start >= SECONDS


def test_what_a_killed_process_of_this_machine_left_is_taken_at_once(place, monkeypatch):
  held_elsewhere(place, monkeypatch, kernel=lease._kernel(), pid=2**22 + 1, started='1')
  start = time.monotonic()
  with Lease(place, 60):
    assert time.monotonic() - start < 10


def test_a_run_that_was_away_for_too_long_stops_when_another_one_has_taken_over(place, monkeypatch):
  first = held_elsewhere(place, monkeypatch)
  with Lease(place, SECONDS):
    for _ in range(2):
      with pytest.raises(UserError, match=r'was taken over by another run, process .* stops'):
        first.check()
  # After it has ended, the first one must not begin again, either.
  with pytest.raises(UserError, match='was taken over'):
    first.check()
  assert place.read('lock').content == b''


def test_an_answer_that_is_lost_does_not_lose_the_lock(place, monkeypatch):
  run = held_elsewhere(place, monkeypatch)
  run._version = place.write('lock', run._content(), run._version)
  before = json.loads(place.read('lock').content)['beat']
  run._version = 'older' if place.address.startswith('s3') else '1'  # as if that had been lost
  run.check()
  run.check()
  assert json.loads(place.read('lock').content)['beat'] > before


def test_of_runs_that_start_together_one_begins(place):
  began, refused, together = [], [], threading.Barrier(4)

  def run():
    together.wait()
    try:
      with Lease(place, SECONDS):
        began.append(1)
        done.wait(20)
    except UserError:
      refused.append(1)
      if len(refused) == 3:
        done.set()

  done = threading.Event()
  threads = [threading.Thread(target=run) for _ in range(4)]
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join()
  assert (len(began), len(refused)) == (1, 3)
