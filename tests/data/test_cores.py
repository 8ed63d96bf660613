"""Who loads data on machines of any size."""

import pytest

from hivit_jax.data.cores import crew, more_workers


@pytest.mark.parametrize(
  ('cores', 'devices', 'expected'),
  [
    (1, 1, (1, 0)),
    (2, 8, (2, 0)),  # Cores are fewer than devices: CPUs that pretend to be several.
    (16, 8, (16, 0)),
    (100, 1, (16, 0)),  # One device needs no more.
    (24, 2, (8, 3)),
    (100, 8, (8, 12)),
    (256, 8, (8, 16)),  # 16 cores a device.
  ],
)
def test_small_machines_have_threads_and_large_ones_processes_for_all_their_cores(
  cores, devices, expected
):
  chosen = crew(cores, devices)
  assert chosen == expected
  assert chosen.cores <= cores


def test_no_machine_starves_or_is_overcrowded():
  for cores in range(1, 300):
    for devices in (1, 2, 4, 8):
      chosen = crew(cores, devices)
      wanted = min(cores, 16 * devices)
      assert 0.7 * wanted <= chosen.cores <= wanted, (cores, devices, chosen)


def test_what_is_given_is_taken_and_the_other_fits_it():
  assert crew(100, 8, workers=0) == (16, 0)
  assert crew(100, 8, workers=4) == (16, 4)
  assert crew(100, 8, workers=50) == (2, 50)
  assert crew(100, 8, threads=3) == (3, 0)
  assert crew(2, 1, threads=3, workers=5) == (3, 5)


def test_more_workers_are_more():
  assert more_workers(96, 0) == 12
  assert more_workers(96, 12) == 13
  assert more_workers(4, 0) == 1


def test_a_crew_says_who_it_is():
  assert [str(crew(*size)) for size in ((1, 1), (4, 1), (100, 8))] == [
    '1 thread', '4 threads', '12 processes of 8 threads'
  ]  # fmt: skip
