"""The jitted training step: the same for every task."""

import re
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh

from hivit_jax.train import optim, rules, sharding

# `step`: () int32; `params`; `opt_state`; with an average of the parameters, `ema`.
State = dict[str, Any]


def abstract_state(
  create: Callable[[], nnx.Module], make_optimizer: Callable, mesh: Mesh, *, ema: bool = False
) -> tuple[nnx.GraphDef, optim.Optimizer, State]:
  """What training needs to know before any parameter exists.

  Args:
    create: builds the model.
    make_optimizer: parameters (or their shapes) and the rules that come before all others ->
      `optim.Optimizer`.
    mesh: the devices.
    ema: the state has an average of the parameters, too.

  Returns:
    graphdef: the model's static half, for `nnx.merge(graphdef, params)`.
    optimizer: from `make_optimizer`.
    abstract: the state as `jax.ShapeDtypeStruct`s with shardings.
  """
  model = nnx.eval_shape(create)
  graphdef, params = nnx.split(model)
  params = nnx.to_pure_dict(params)
  optimizer = make_optimizer(params, _frozen_statistics(model))
  state = {
    'step': jax.ShapeDtypeStruct((), jnp.int32),
    'params': params,
    'opt_state': jax.eval_shape(optimizer.tx.init, optim.split(params, optimizer.trained)[0]),
  }
  if ema:
    state['ema'] = params
  place = lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s)  # noqa: E731
  abstract = jax.tree.map(place, state, sharding.state_shardings(state, mesh))
  return graphdef, optimizer, abstract


def init_state(
  create: Callable[[], nnx.Module], optimizer: optim.Optimizer, abstract: State
) -> State:
  """The state at step 0, on the devices.

  The parameters are made one by one: compiled as one program they take several times as long.

  Args:
    create: builds the model.
    optimizer, abstract: from `abstract_state`.
  """
  shardings = _shardings(abstract)
  params = sharding.put(nnx.to_pure_dict(nnx.state(create())), shardings['params'])
  trained, _ = optim.split(params, optimizer.trained)
  state = {
    'step': sharding.put(np.zeros((), np.int32), shardings['step']),
    'params': params,
    'opt_state': jax.jit(optimizer.tx.init, out_shardings=shardings['opt_state'])(trained),
  }
  if 'ema' in abstract:
    # One program: called outside of one, `jnp.copy` compiles for every shape.
    copy = jax.jit(lambda tree: jax.tree.map(jnp.copy, tree), out_shardings=shardings['ema'])
    state['ema'] = copy(params)
  return state


def make_train_step(
  graphdef: nnx.GraphDef,
  task: Any,
  optimizer: optim.Optimizer,
  schedule: Callable,
  *,
  seed: int,
  abstract: State | None = None,
  accumulate_steps: int = 1,
  ema_decay: float | None = None,
  compiler_options: Mapping[str, str] | None = None,
) -> Callable[[State, dict], tuple[State, dict]]:
  """Builds `step(state, batch) -> state, metrics`, jitted, the state donated.

  Args:
    graphdef: from `abstract_state`.
    task: see `tasks.task.Task`.
    optimizer: from `abstract_state`.
    schedule: step, from 0 on -> learning rate; with `optimizer.scales`, `(step, scale)`, see
      `schedules.Schedule`.
    seed: all randomness is a function of it and of the step.
    abstract: from `abstract_state`: the state stays where this says; None: on one device.
    accumulate_steps: parts that a batch is computed in, one after the other. The result is that of
      the whole batch up to rounding: random numbers and normalisers are those of the whole batch.
      Batch statistics alone are of parts: each starts from the old ones, and their mean is kept.
    ema_decay: share of the old average in the new one, for a state with `ema`; None: no average.
    compiler_options: see `ops.barriers.compiler_options`.

  Returns:
    The step; its metrics are `loss`, `learning_rate` (of layers whose factor is 1), `grad_norm`,
    `param_norm` (of the new parameters) and the task's, () float32.
  """

  places = None if abstract is None else _shardings(abstract['params'])

  def loss(trained, others, batch):
    model = nnx.merge(graphdef, optim.join(trained, others))
    value, metrics = task.loss(model, batch)
    statistics = nnx.to_pure_dict(nnx.state(model, nnx.BatchStat))  # as the batch has changed them
    return value, ({'loss': value, **metrics}, statistics)

  def gradients(trained, others, batch):
    params = sharding.use_whole(optim.join(trained, others), places)
    grads, aux = jax.grad(loss, has_aux=True)(*optim.split(params, optimizer.trained), batch)
    return sharding.keep_parts(grads, places and optim.split(places, optimizer.trained)[0]), aux

  def summed_gradients(trained, others, batch):
    if accumulate_steps == 1:
      return gradients(trained, others, batch)
    whole = {key: x for key, x in batch.items() if jnp.ndim(x) == 0}  # normalisers
    # Part i takes examples i, i + A, ...: each device splits its own examples, none move.
    parts = {
      key: x.reshape(-1, accumulate_steps, *x.shape[1:]).swapaxes(0, 1)
      for key, x in batch.items()
      if key not in whole
    }

    def add(total, part):
      grads, (metrics, statistics) = gradients(trained, others, part | whole)
      statistics = jax.tree.map(lambda s: s / accumulate_steps, statistics)
      return jax.tree.map(jnp.add, total, (grads, (metrics, statistics))), None

    first = jax.tree.map(lambda x: x[0], parts) | whole
    shapes = jax.eval_shape(gradients, trained, others, first)
    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
    return jax.lax.scan(add, zeros, parts)[0]

  def step(state: State, batch: dict) -> tuple[State, dict]:
    rng = jax.random.fold_in(jax.random.key(seed), state['step'])
    batch = task.prepare(nnx.merge(graphdef, state['params']), batch, rng)
    trained, others = optim.split(state['params'], optimizer.trained)
    grads, (metrics, statistics) = summed_gradients(trained, others, batch)
    updates, opt_state = optimizer.tx.update(grads, state['opt_state'], trained)
    lr = schedule(state['step'])
    if optimizer.scales is None:
      trained = jax.tree.map(lambda p, u: p - lr * u, trained, updates)
    else:
      lowest = schedule(state['step'], 0.0)  # the rate is an affine function of the layer's factor
      trained = jax.tree.map(
        lambda p, u, scale: p - (lowest + scale * (lr - lowest)) * u,
        trained,
        updates,
        optimizer.scales,
      )
    params = _overlay(optim.join(trained, others), statistics)
    metrics |= {
      'learning_rate': lr,
      'grad_norm': optax.tree.norm(grads),
      'param_norm': optax.tree.norm(params),  # tells whether the new state is sound
    }
    new = {'step': state['step'] + 1, 'params': params, 'opt_state': opt_state}
    if ema_decay is not None:
      new['ema'] = jax.tree.map(lambda e, p: p + ema_decay * (e - p), state['ema'], params)
    return new, metrics

  shardings = None
  if abstract is not None:
    shardings = _shardings(abstract), sharding.replicated(abstract['step'].sharding.mesh)
  return jax.jit(
    step,
    donate_argnums=0,
    out_shardings=shardings,
    compiler_options=dict(compiler_options or {}),
  )


def _shardings(abstract: Any) -> Any:
  return jax.tree.map(lambda leaf: leaf.sharding, abstract)


def _frozen_statistics(model: nnx.Module) -> rules.Rules:
  """No gradient tells how to change batch statistics, whatever they are called."""
  statistics = nnx.to_pure_dict(nnx.state(model, nnx.BatchStat))
  paths = [rules.path_name(path) for path, _ in jax.tree_util.tree_leaves_with_path(statistics)]
  return tuple((re.escape(path), 'frozen') for path in paths)


def _overlay(params: dict, values: dict) -> dict:
  """`params` with the leaves that `values` has."""
  nested = {
    key: _overlay(params[key], value) if isinstance(value, dict) else value
    for key, value in values.items()
  }
  return params | nested
