"""Memory of the CPU backend."""

import ctypes
import importlib.util
import sys

import jax

# Parameters of glibc's mallopt, from its malloc.h.
_TRIM_THRESHOLD, _MMAP_MAX, _ARENA_MAX = -1, -4, -8
_NEVER = -1  # as glibc documents it


def keep_freed_memory(*, one_arena: bool) -> bool:
  """Makes malloc keep large blocks for the next step instead of giving them back; on CPUs only.

  XLA's CPU backend allocates its temporaries anew at every step. By default glibc gets blocks of
  that size from the kernel and gives them back at once, and then every step pays for the kernel's
  clearing of every page. Does nothing where the C library is another one, or where JAX may find an
  accelerator. Call it before JAX looks for devices: threads that have begun keep arenas of their
  own. Measurements are in docs/benchmarks.md.

  Args:
    one_arena: all threads allocate from one arena. Others cannot hold blocks above 64 MB, which
      then go back to the kernel after all; but threads wait for each other, which costs small
      models more than it saves.

  Returns:
    Whether it took effect.
  """
  if not sys.platform.startswith('linux') or _accelerator_expected():
    return False
  libc = ctypes.CDLL(None)
  if not hasattr(libc, 'gnu_get_libc_version'):
    return False
  settings = ((_MMAP_MAX, 0), (_TRIM_THRESHOLD, _NEVER)) + ((_ARENA_MAX, 1),) * one_arena
  return all(libc.mallopt(parameter, value) for parameter, value in settings)


def _accelerator_expected() -> bool:
  platforms = jax.config.values['jax_platforms']
  if platforms:
    return platforms != 'cpu'
  return any(importlib.util.find_spec(name) for name in ('jax_plugins', 'libtpu'))
