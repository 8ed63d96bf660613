"""Which tests `-m "not slow"` leaves out: those that took long.

  python -m pytest --durations=0 -vv > durations.log
  python -m tests.slowest durations.log

writes their names to tests/slow.txt, which conftest.py reads.
"""

import collections
import pathlib
import re
import sys

LIST = pathlib.Path(__file__).parent / 'slow.txt'
SECONDS = 0.6  # of a test with its setup, on 2 cores with a test on each
_LINE = re.compile(r'^(\d+\.\d+)s (?:call|setup|teardown) +(tests/\S+\.py::.+)$', re.MULTILINE)


def listed() -> frozenset[str]:
  """Names of tests, such as tests/models/test_mae.py::test_shapes[tiny]."""
  return frozenset(LIST.read_text('utf-8').splitlines())


def main() -> None:
  seconds: dict[str, float] = collections.defaultdict(float)
  for took, name in _LINE.findall(pathlib.Path(sys.argv[1]).read_text('utf-8')):
    seconds[name] += float(took)
  slow = sorted(name for name, took in seconds.items() if took >= SECONDS)
  LIST.write_text('\n'.join(slow) + '\n', 'utf-8')
  quick = sum(took for took in seconds.values() if took < SECONDS)
  print(f'{len(slow)} of {len(seconds)} tests are slow; the others took {quick:.0f} s in all')


if __name__ == '__main__':
  main()
