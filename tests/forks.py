"""Runs programs in forks of a process that has imported already what they are slow to import.

Reads one JSON object a line: program and its arguments, environment, seconds that it may take,
files for stdout and stderr; answers with the exit status. Everything after the imports is as in a
process of its own: flags, JAX's devices, exit.
"""

import json
import os
import runpy
import signal
import sys
import traceback

import jax
import tensorflow_datasets  # noqa: F401

import hivit_jax.train.evaluation  # noqa: F401


def _run(job: dict) -> int:
  for number, file in ((1, job['stdout']), (2, job['stderr'])):
    os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
  os.environ.update(job['environment'])
  quick = os.environ.get('JAX_DISABLE_MOST_OPTIMIZATIONS') == '1'
  jax.config.update('jax_disable_most_optimizations', quick)  # JAX has read it before the fork
  signal.alarm(job['seconds'])
  program, *arguments = job['program']
  try:
    if program == '-m':
      module, *sys.argv[1:] = arguments
      runpy.run_module(module, run_name='__main__', alter_sys=True)
    else:
      sys.argv = job['program']
      runpy.run_path(program, run_name='__main__')
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
      sys.stdout.flush()
      sys.stderr.flush()
    finally:
      os._exit(status)
  print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
