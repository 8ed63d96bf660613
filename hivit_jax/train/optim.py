"""Optimizers, and the rules that say what happens to which parameter."""

import re
from collections.abc import Sequence
from typing import Any

import jax
import optax

# The first rule whose pattern matches a parameter's path from its start decides. 'decay': weight
# decay applies; 'no_decay': it does not; 'frozen': the parameter is never changed.
Rules = Sequence[tuple[str, str]]

# As the official pretraining: everything with more than one dimension decays, the learned position
# embedding and the mask token included.
PRETRAIN_RULES: Rules = (
  ('decoder_pos_embed', 'frozen'),
  (r'(.*/)?(bias|scale)', 'no_decay'),
  (r'(.*/)?kernel', 'decay'),
  (r'absolute_pos_embed|mask_token|.*/relative_position_bias_table', 'decay'),
)


def path_name(path) -> str:
  """Key path of `jax.tree_util` -> 'blocks/0/mlp/fc1/kernel'."""
  return jax.tree_util.keystr(path, simple=True, separator='/')


def apply_rules(rules: Rules, params: Any) -> Any:
  """Labels every parameter.

  Args:
    rules: (pattern, label) pairs; a pattern must match the whole path, the first match decides.
    params: pytree of parameters.

  Returns:
    A pytree of labels, of the structure of `params`.

  Raises:
    ValueError: a parameter that no rule matches; a new parameter needs a decision, not a default.
  """

  def label(path, _):
    name = path_name(path)
    for pattern, value in rules:
      if re.fullmatch(pattern, name):
        return value
    raise ValueError(f'no rule says what the optimizer does with parameter "{name}"')

  return jax.tree_util.tree_map_with_path(label, params)


def adamw(
  params: Any,
  *,
  rules: Rules,
  b1: float,
  b2: float,
  eps: float,
  weight_decay: float,
  clip_norm: float | None,
) -> optax.GradientTransformation:
  """AdamW whose updates are still to be scaled by minus the learning rate.

  Args:
    params: pytree of parameters or their shapes, for the rules.
    rules: see `apply_rules`.
    b1, b2, eps: of Adam.
    weight_decay: decoupled, of the parameters labelled 'decay'.
    clip_norm: global norm to clip the gradients to, or None.
  """
  labels = apply_rules(rules, params)
  decay = jax.tree.map(lambda label: label == 'decay', labels)
  trained = optax.chain(
    optax.scale_by_adam(b1=b1, b2=b2, eps=eps),
    optax.add_decayed_weights(weight_decay, mask=lambda tree: _like(decay, tree)),
  )
  frozen = jax.tree.map(lambda label: 'frozen' if label == 'frozen' else 'trained', labels)
  transforms = {'trained': trained, 'frozen': optax.set_to_zero()}
  # Neither has a state, and the chain is there in any case: a run may go on with another clip_norm.
  clip = optax.identity() if clip_norm is None else optax.clip_by_global_norm(clip_norm)
  return optax.chain(clip, optax.partition(transforms, frozen))


def _like(labels: Any, masked: Any) -> Any:
  """Labels with the masked-out leaves that `optax.partition` puts into a tree."""
  is_masked = lambda leaf: isinstance(leaf, optax.MaskedNode)  # noqa: E731
  return jax.tree.map(
    lambda leaf, label: leaf if is_masked(leaf) else label, masked, labels, is_leaf=is_masked
  )
