"""Runs programs in forks of a process that has imported already what they are slow to import.

Reads one JSON object a line and answers each with a number. A program, with its arguments, its
environment, the seconds that it may take (0: any) and files for stdout and stderr: the process that
runs it. `{"wait": PID, "blocking": ...}`: its exit status, null while it runs. Everything after the
imports is as in a process of its own: flags, JAX's devices, signals, exit.
"""

import contextlib
import importlib
import json
import os
import runpy
import signal
import sys
import traceback

import jax

# What programs import on their way, some of them late.
for module in (
  *('hivit_jax.train.run', 'hivit_jax.configs.recipes', 'hivit_jax.configs.variants'),
  *('hivit_jax.data.builders', 'tensorflow_datasets', 'pycocotools.cocoeval', 'scipy.interpolate'),
  *('tensorboard.compat.proto.event_pb2', 'tensorboard.summary.writer.record_writer', 'torch'),
):
  with contextlib.suppress(ModuleNotFoundError):  # programs say what they miss
    importlib.import_module(module)


def _run(job: dict) -> int:
  os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
  for number, file in ((1, job['stdout']), (2, job['stderr'])):
    os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
  os.environ.update(job['environment'])
  for key in ('jax_disable_most_optimizations', 'jax_enable_compilation_cache'):
    if value := os.environ.get(key.upper()):  # JAX has read it before the fork
      jax.config.update(key, value in ('1', 'true'))
  signal.alarm(job['seconds'])
  program, *arguments = job['program']
  try:
    if program == '-m':
      module, *sys.argv[1:] = arguments
      runpy.run_module(module, run_name='__main__', alter_sys=True)
    elif program == '-c':
      code, *arguments = arguments
      sys.argv = ['-c', *arguments]
      exec(code, {'__name__': '__main__'})
    else:
      sys.argv = job['program']
      runpy.run_path(program, run_name='__main__')
  except SystemExit as stop:
    return stop.code or 0
  except BaseException:
    traceback.print_exc()
    return 1
  return 0


def _start(job: dict) -> int:
  child = os.fork()
  if child:
    return child
  status = 1
  try:
    status = _run(job)
    sys.stdout.flush()
    sys.stderr.flush()
  finally:
    os._exit(status)


def _wait(job: dict) -> int | None:
  child, status = os.waitpid(job['wait'], 0 if job['blocking'] else os.WNOHANG)
  return os.waitstatus_to_exitcode(status) if child else None


for line in sys.stdin:
  job = json.loads(line)
  print(json.dumps(_wait(job) if 'wait' in job else _start(job)), flush=True)
