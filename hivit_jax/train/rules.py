"""Rules by path: what to do with each leaf of a tree."""

import re
from collections.abc import Sequence
from typing import Any

import jax

# (pattern, label) pairs: the first whose pattern matches a leaf's whole path decides.
Rules = Sequence[tuple[str, str]]


def path_name(path) -> str:
  """Key path of `jax.tree_util` -> 'blocks/0/mlp/fc1/kernel'."""
  return jax.tree_util.keystr(path, simple=True, separator='/')


def apply_rules(rules: Rules, tree: Any) -> Any:
  """Labels every leaf.

  Args:
    rules: (pattern, label) pairs; a pattern must match the whole path, the first match decides.
    tree: of parameters, of a training state.

  Returns:
    A pytree of labels, of the structure of `tree`.

  Raises:
    ValueError: a leaf that no rule matches; a new parameter needs a decision, not a default.
  """

  def label(path, _):
    name = path_name(path)
    for pattern, value in rules:
      if re.fullmatch(pattern, name):
        return value
    raise ValueError(f'no rule says what to do with "{name}"')

  return jax.tree_util.tree_map_with_path(label, tree)
