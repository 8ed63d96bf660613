"""Optimizers, and which parameters they train and decay."""

import math
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import optax

from hivit_jax.train.rules import Rules, apply_rules, path_name

TRUST_COEFFICIENT = 1e-3  # of LARS


class Optimizer(NamedTuple):
  """What makes updates, and of which parameters.

  Attributes:
    tx: over the trained parameters, as `split` returns them; its updates are still to be scaled by
      minus the learning rate.
    trained: tree of bools, for `split`.
    scales: factors of the learning rate, a tree over the trained parameters, see `layer_scales`;
      None: 1 for all.
  """

  tx: optax.GradientTransformation
  trained: Any
  scales: Any = None


def split(params: Any, trained: Any) -> tuple[Any, Any]:
  """Two trees of the structure of `params`: the trained leaves, the others; None elsewhere."""
  pick = lambda wanted: jax.tree.map(lambda x, t: x if t == wanted else None, params, trained)  # noqa: E731
  return pick(True), pick(False)


def join(trained: Any, others: Any) -> Any:
  """Inverse of `split`."""
  is_none = lambda x: x is None  # noqa: E731
  return jax.tree.map(lambda x, y: y if x is None else x, trained, others, is_leaf=is_none)


_PLACE = re.compile(r'(blocks/\d+|layers/\d+/(?:blocks/\d+|downsample))/')
_FIRST = ('patch_embed', 'absolute_pos_embed', 'pos_embed', 'cls_token')


def layer_scales(
  params: Any,
  decay: float,
  encoder: str = '',
  stem_is_one_layer: bool = False,
  merges_are_layers: bool = False,
) -> Any:
  """Factors of the learning rate that fall towards the input ("layer-wise decay").

  As in BEiT (arXiv 2106.08254): `decay ** (L + 1 - layer)`, L residual blocks in all. Patch and
  position embedding are layer 0, block i is layer i + 1, a merge goes with the block before it,
  and what follows the blocks is layer L + 1, with a factor of 1.

  Args:
    params: pytree of the parameters of a model with one flat list `blocks`, or with `layers` that
      have `blocks` and a `downsample`, as Swin.
    decay: in (0, 1].
    encoder: beginning of the paths of the encoder, such as 'backbone/'; all others are of the last
      layer.
    stem_is_one_layer: blocks without attention and their merges are of layer 0, and L counts the
      others, as in the published segmenter.
    merges_are_layers: each merge is a layer of its own, as in Fast-iTPN's code.

  Returns:
    A pytree of floats, of the structure of `params`.
  """
  paths = [path_name(path) for path, _ in jax.tree_util.tree_leaves_with_path(params)]
  paths = [path.removeprefix(encoder) for path in paths if path.startswith(encoder)]
  places = {match[1] for path in paths if (match := _PLACE.match(path))}
  merges = {place for place in places if any(p.startswith(f'{place}/reduction') for p in paths)}
  if stem_is_one_layer:
    attending = {place for place in places if any(p.startswith(f'{place}/attn') for p in paths)}
  else:
    attending = places
  layers: dict[str, int] = {}
  count = 0
  for place in sorted(places, key=_numbers):
    count += place in attending and (merges_are_layers or place not in merges)
    layers[place] = count

  def scale(path, _):
    name = path_name(path)
    if not name.startswith(encoder):
      return 1.0
    name = name.removeprefix(encoder)
    match = _PLACE.match(name)
    last = 0 if name.split('/')[0] in _FIRST else count + 1
    return decay ** (count + 1 - (layers[match[1]] if match else last))

  return jax.tree_util.tree_map_with_path(scale, params)


def _numbers(place: str) -> list[float]:
  """Sorts 'layers/0/blocks/2', 'layers/0/blocks/10', 'layers/0/downsample', 'layers/1/blocks/0'."""
  parts = (part for part in place.split('/') if part not in ('blocks', 'layers'))
  return [float(part) if part.isdigit() else math.inf for part in parts]


def adamw(
  params: Any, *, b1: float, b2: float, eps: float, weight_decay: float, **options: Any
) -> Optimizer:
  """AdamW.

  Args:
    params: pytree of parameters or their shapes, for the rules.
    b1, b2, eps: of Adam.
    weight_decay: decoupled, of the parameters labelled 'decay'.
    **options: see `_optimizer`.
  """

  def update(decayed: Any) -> list[optax.GradientTransformation]:
    return [
      optax.scale_by_adam(b1=b1, b2=b2, eps=eps),
      optax.add_decayed_weights(weight_decay, mask=decayed),
    ]

  return _optimizer(params, update, **options)


def lars(params: Any, *, momentum: float, weight_decay: float, **options: Any) -> Optimizer:
  """LARS (arXiv 1708.03888) as in MAE's linear probe: only matrices decay and get a trust ratio.

  Args:
    params: pytree of parameters or their shapes, for the rules.
    momentum: of the updates before the learning rate.
    weight_decay: of the parameters labelled 'decay', part of the update that is scaled.
    **options: see `_optimizer`.
  """

  def update(decayed: Any) -> list[optax.GradientTransformation]:
    return [
      optax.add_decayed_weights(weight_decay, mask=decayed),
      optax.masked(optax.scale_by_trust_ratio(trust_coefficient=TRUST_COEFFICIENT), decayed),
      optax.trace(momentum),
    ]

  return _optimizer(params, update, **options)


def _optimizer(
  params: Any,
  update: Callable[[Any], list[optax.GradientTransformation]],
  *,
  rules: Rules,
  clip_norm: float | None = None,
  layer_decay: float | None = None,
  encoder: str = '',
  stem_is_one_layer: bool = False,
  merges_are_layers: bool = False,
) -> Optimizer:
  """What all optimizers have in common.

  Args:
    params: pytree of parameters or their shapes, for the rules.
    update: from a tree of bools, which of the trained parameters decay, to the steps from gradients
      to updates.
    rules: see `rules.apply_rules`.
    clip_norm: global norm to clip the gradients to, or None.
    layer_decay: see `layer_scales`; None: the same rate for all.
    encoder, stem_is_one_layer, merges_are_layers: see `layer_scales`.
  """
  labels = apply_rules(rules, params)
  trained = jax.tree.map(lambda label: label != 'frozen', labels)
  decayed = split(jax.tree.map(lambda label: label == 'decay', labels), trained)[0]
  # Neither has a state, and one is there in any case: a run may go on with another clip_norm.
  clip = optax.identity() if clip_norm is None else optax.clip_by_global_norm(clip_norm)
  scales = None
  if layer_decay is not None:
    place = encoder, stem_is_one_layer, merges_are_layers
    scales = split(layer_scales(params, layer_decay, *place), trained)[0]
  return Optimizer(optax.chain(clip, *update(decayed)), trained, scales)
