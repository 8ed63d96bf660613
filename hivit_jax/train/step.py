"""The jitted training step: the same for every task."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh

from hivit_jax.train import sharding

State = dict[str, Any]  # step: () int32; params, opt_state: pytrees


def abstract_state(
  create: Callable[[], nnx.Module], make_optimizer: Callable, mesh: Mesh
) -> tuple[nnx.GraphDef, optax.GradientTransformation, State]:
  """What training needs to know before there is a parameter.

  Args:
    create: builds the model.
    make_optimizer: parameters (or their shapes) -> `optax.GradientTransformation`.
    mesh: the devices.

  Returns:
    graphdef: the model's static half, for `nnx.merge(graphdef, params)`.
    tx: the optimizer.
    abstract: the state as `jax.ShapeDtypeStruct`s with shardings.
  """
  graphdef, params = nnx.split(nnx.eval_shape(create))
  params = nnx.to_pure_dict(params)
  tx = make_optimizer(params)
  state = {
    'step': jax.ShapeDtypeStruct((), jnp.int32),
    'params': params,
    'opt_state': jax.eval_shape(tx.init, params),
  }
  everywhere = sharding.replicated(mesh)
  place = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=everywhere)  # noqa: E731
  return graphdef, tx, jax.tree.map(place, state)


def init_state(
  create: Callable[[], nnx.Module], tx: optax.GradientTransformation, mesh: Mesh
) -> State:
  """The state at step 0, on the mesh.

  The parameters are made one by one: compiled as one program they take several times as long.
  """
  everywhere = sharding.replicated(mesh)
  params = jax.device_put(nnx.to_pure_dict(nnx.state(create())), everywhere)
  opt_state = jax.jit(tx.init, out_shardings=everywhere)(params)
  step = jax.device_put(np.zeros((), np.int32), everywhere)
  return {'step': step, 'params': params, 'opt_state': opt_state}


def make_train_step(
  graphdef: nnx.GraphDef,
  task: Any,
  tx: optax.GradientTransformation,
  schedule: Callable,
  *,
  epochs_per_step: float,
  seed: int,
  accumulate_steps: int = 1,
  compiler_options: Mapping[str, str] | None = None,
) -> Callable[[State, dict], tuple[State, dict]]:
  """Builds `step(state, batch) -> state, metrics`, jitted, the state donated.

  Args:
    graphdef: from `abstract_state`.
    task: has `prepare(model, batch, rng)` and `loss(model, batch)`, see `tasks.mae`.
    tx: from `abstract_state`; its updates are scaled by minus the learning rate here.
    schedule: fractional epoch -> learning rate.
    epochs_per_step: batch size / examples in an epoch.
    seed: all randomness is a function of it and of the step.
    accumulate_steps: parts that a batch is computed in, one after the other. The result is that of
      the whole batch up to rounding: random numbers are drawn for the whole batch before.
    compiler_options: see `sharding.compiler_options`.

  Returns:
    The step; its metrics are `loss`, `learning_rate`, `grad_norm`, `param_norm` (of the new
    parameters) and the task's, () float32.
  """

  def loss(params, batch):
    value, metrics = task.loss(nnx.merge(graphdef, params), batch)
    return value, {'loss': value, **metrics}

  def mean_gradients(params, batch):
    if accumulate_steps == 1:
      return jax.grad(loss, has_aux=True)(params, batch)
    # Part i takes examples i, i + A, ...: each device splits its own examples, none move.
    parts = jax.tree.map(
      lambda x: x.reshape(-1, accumulate_steps, *x.shape[1:]).swapaxes(0, 1), batch
    )

    def add(total, part):
      result = jax.grad(loss, has_aux=True)(params, part)
      return jax.tree.map(lambda t, r: t + r / accumulate_steps, total, result), None

    shapes = jax.eval_shape(
      jax.grad(loss, has_aux=True), params, jax.tree.map(lambda x: x[0], parts)
    )
    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
    return jax.lax.scan(add, zeros, parts)[0]

  def step(state: State, batch: dict) -> tuple[State, dict]:
    params = state['params']
    rng = jax.random.fold_in(jax.random.key(seed), state['step'])
    batch = task.prepare(nnx.merge(graphdef, params), batch, rng)
    grads, metrics = mean_gradients(params, batch)
    updates, opt_state = tx.update(grads, state['opt_state'], params)
    lr = schedule(state['step'] * epochs_per_step)
    params = jax.tree.map(lambda p, u: p - lr * u, params, updates)
    metrics |= {
      'learning_rate': lr,
      'grad_norm': optax.tree.norm(grads),
      'param_norm': optax.tree.norm(params),  # tells whether the new state is sound
    }
    return {'step': state['step'] + 1, 'params': params, 'opt_state': opt_state}, metrics

  return jax.jit(step, donate_argnums=0, compiler_options=dict(compiler_options or {}))
