"""Runs `main.py` in forks of a process that has imported already what it is slow to import.

Reads one JSON object a line: arguments, environment, file for stderr; answers with the exit status.
Everything after the imports is as in a process of its own: flags, JAX's devices, exit.
"""

import json
import os
import runpy
import signal
import sys
import traceback

import tensorflow_datasets  # noqa: F401

import hivit_jax.train.experiment  # noqa: F401


def _run(job: dict) -> int:
  os.dup2(os.open(job['stderr'], os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 2)
  os.dup2(2, 1)
  os.environ.update(job['environment'])
  signal.alarm(120)
  sys.argv = ['main.py', *job['arguments']]
  try:
    runpy.run_path('main.py', run_name='__main__')
  except SystemExit as stop:
    return stop.code or 0
  except BaseException:
    traceback.print_exc()
    return 1
  return 0


for line in sys.stdin:
  child = os.fork()
  if not child:
    status = 1
    try:
      status = _run(json.loads(line))
      sys.stderr.flush()
    finally:
      os._exit(status)
  print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
