"""Plans: what a compiled step is said to need is what it needs."""

import dataclasses
import importlib.util
import json
import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from configs import mae_hivit_t
from hivit_jax.errors import UserError
from hivit_jax.planning import costs, hlo, plan, roofline
from hivit_jax.planning.collectives import Collective, collectives
from hivit_jax.tools.plan import format_report
from hivit_jax.train import assemble, optim, sharding, step
from tests import patience

ROOT = pathlib.Path(__file__).parents[2]
MESH = {'data': 2, 'fsdp': 4}


# --- programs that XLA has compiled, for eight simulated devices


def compiled_collectives() -> dict:
  """Kind -> size, sent, count, axes of a function's collectives."""
  mesh = sharding.make_mesh(2, 4)

  def communicate(x):  # (1000,) on each device
    x = jax.lax.psum(x, 'data')
    shifted = jax.lax.ppermute(x, 'fsdp', [(i, (i + 1) % 4) for i in range(4)])
    exchanged = jax.lax.all_to_all(shifted.reshape(4, 250), 'fsdp', 0, 0).reshape(1000)
    scattered = jax.lax.psum_scatter(exchanged, 'fsdp', tiled=True)
    gather = lambda x, _: (jax.lax.all_gather(x, 'fsdp', tiled=True)[:250] + 1, None)  # noqa: E731
    return jax.lax.scan(gather, scattered, None, length=5)[0]

  spec = PartitionSpec(('data', 'fsdp'))
  function = jax.shard_map(communicate, mesh=mesh, in_specs=spec, out_specs=spec)
  text = jax.jit(function).lower(jnp.zeros(8000)).compile().as_text()
  return {
    c.kind: [c.size, c.sent, c.count, list(c.axes(mesh.shape))]
    for c in collectives(hlo.Program(text), 8)
  }


def plans() -> dict:
  """The plans of two ways to split a tiny step over eight devices."""
  config = mae_hivit_t.get_config('debug')
  config.model.update(embed_dim=16, depths=(1, 1, 1))
  config.ema_decay = 0.9
  reports = {}
  for fsdp in (1, 4):
    config.mesh.fsdp = fsdp
    reports[f'fsdp={fsdp}'] = plan.plan(config, jax.devices())
  graphdef, optimizer, abstract = step.abstract_state(
    assemble.model_creator(config), assemble.optimizer(config), sharding.make_mesh(1)
  )
  del graphdef
  trained, _ = optim.split(abstract['params'], optimizer.trained)
  return reports | {'gradients': sum(4 * x.size for x in jax.tree.leaves(trained))}


@pytest.fixture(scope='module')
def eight():
  """What a process with eight devices finds."""
  code = (
    'import json; from hivit_jax.planning import plan; plan.find_devices("cpu:8"); '
    'from tests.planning.test_plan import compiled_collectives, plans; '
    'print(json.dumps({"collectives": compiled_collectives()} | plans()))'
  )
  environment = os.environ | {'XLA_FLAGS': '--xla_backend_optimization_level=0'}  # compiles faster
  done = subprocess.run(
    [sys.executable, '-c', code],
    cwd=ROOT, env=environment, capture_output=True, text=True, timeout=patience.limit(300),
  )  # fmt: skip
  assert done.returncode == 0, done.stderr
  return json.loads(done.stdout.splitlines()[-1])


def test_collectives_of_a_function(eight):
  whole, part = 4 * 1000, 4 * 250
  assert eight['collectives'] == {
    'all-reduce': [whole, whole, 1, ['data']],
    'collective-permute': [whole, whole, 1, ['fsdp']],
    'all-to-all': [whole, 3 * part, 1, ['fsdp']],
    'reduce-scatter': [whole, 3 * part, 1, ['fsdp']],
    'all-gather': [whole, 3 * part, 5, ['fsdp']],
  }


def test_data_parallel_steps_send_the_gradients_once(eight):
  report = eight['fsdp=1']
  assert {row['kind'] for row in report['collectives']} == {'all-reduce'}
  payload = sum(row['bytes'] for row in report['collectives'])
  assert 0 <= payload - eight['gradients'] < 64  # and the loss
  assert sum(row['sent'] for row in report['collectives']) == payload * 2 * 7 / 8
  assert all(row['devices'] == 8 and row['complete'] for row in report['collectives'])


def test_split_state_is_a_part_of_the_whole(eight):
  one, four = eight['fsdp=1'], eight['fsdp=4']
  assert one['memory']['parameters'] == one['memory']['average'] > eight['gradients']
  for part in ('parameters', 'optimizer', 'average'):
    assert 1 / 4 < four['memory'][part] / one['memory'][part] < 0.3, part  # biases stay whole
  assert four['memory']['batch'] == one['memory']['batch'] == 2 * (32 * 32 * 3 + 4)
  assert four['matmul_flops'] == one['matmul_flops'] > 0
  gathered = [row for row in four['collectives'] if row['kind'] == 'all-gather']
  assert {(tuple(row['axes']), row['devices']) for row in gathered} == {(('fsdp',), 4)}


def test_memory_adds_up(eight):
  memory = eight['fsdp=4']['memory']
  assert sum(memory.values()) == 2 * memory['total']
  assert memory['temporaries'] > 0
  assert memory['padding'] < 10_000  # also the metrics


def test_reports_of_cpus_have_no_times(eight):
  report = {'topology': 'cpu:8'} | eight['fsdp=4']
  assert 'estimate' not in report
  text = format_report(report)
  assert 'mae_hivit_tiny 32x32, mae, batch 16 (2 a device), float32' in text
  assert 'depends on the machine' in text
  assert 'all-gather' in text
  assert 'Compiled, not run' in text


def test_reports_of_what_does_not_fit(eight):
  refusal = 'RESOURCE_EXHAUSTED: Ran out of memory on HBM'
  report = {'topology': 'v5e:4x2'} | eight['fsdp=4'] | {'fits': False, 'refusal': refusal}
  text = format_report(report)
  assert f'NO: {refusal}' in text
  assert '--config.model.remat=True' in text


# --- text as the TPU compiler writes it


def program(body: str, *others: str) -> hlo.Program:
  entry = f'ENTRY %main (p: bf16[8,128]) -> bf16[8,128] {{\n{body}\n}}'
  return hlo.Program('\n\n'.join(['HloModule jit_step', *others, entry]))


def only(program: hlo.Program) -> Collective:
  (found,) = collectives(program, 16)
  return found


@pytest.mark.parametrize(
  ('groups', 'expected'),
  [
    ('{{0,1,2,3},{4,5,6,7}}', [[0, 1, 2, 3], [4, 5, 6, 7]]),
    ('[2,4]<=[8]', [[0, 1, 2, 3], [4, 5, 6, 7]]),
    ('[4,2]<=[2,4]T(1,0)', [[0, 4], [1, 5], [2, 6], [3, 7]]),
    ("mesh['a'=4,'b'=2] {'a'}", [[0, 2, 4, 6], [1, 3, 5, 7]]),
    ("mesh['a'=4,'b'=2] {'a','b'}", [[0, 1, 2, 3, 4, 5, 6, 7]]),
    ("mesh['a'=2,'b'=4], device_ids=([4,2]T(1,0)) {'b'}", [[0, 2, 4, 6], [1, 3, 5, 7]]),
    ("mesh['a'=8] {'a':(2)2}", [[0, 2], [1, 3], [4, 6], [5, 7]]),
    ('{}', [list(range(16))]),
  ],
)
def test_groups_of_devices(groups, expected):
  text = f'  %r = f32[10]{{0}} all-reduce(%p), channel_id=1, replica_groups={groups}, to_apply=%add'
  found = only(program(text, '%add (x: f32[]) -> f32[] {\n}'))
  assert sorted(sorted(group) for group in found.groups.tolist()) == expected
  assert found.size == 40


def test_unknown_groups_are_an_error():
  with pytest.raises(ValueError, match='unknown form of groups'):
    collectives(program('  %r = f32[10]{0} all-reduce(%p), replica_groups=other[3]'), 16)


def test_a_start_and_its_done_are_one():
  text = """
  %s = (bf16[2,128]{1,0:T(8,128)(2,1)}, bf16[8,128]{1,0:T(8,128)(2,1)S(1)}) all-gather-start(%p), \
channel_id=3, replica_groups=[4,4]<=[16], dimensions={0}
  ROOT %d = bf16[8,128]{1,0:T(8,128)(2,1)S(1)} all-gather-done(%s)"""
  found = only(program(text))
  assert (found.kind, found.size, found.count) == ('all-gather', 2 * 8 * 128, 1)


def test_pieces_of_a_fused_collective_are_one():
  gather = (
    '  ROOT %g = bf16[8,128]{1,0} all-gather(%q), channel_id=7, replica_groups=[4,4]<=[16], '
    'dimensions={0}'
  )
  pieces = [f'%piece.{i} (q: bf16[2,128]) -> bf16[8,128] {{\n{gather}\n}}' for i in range(3)]
  calls = [
    f'  %f.{i} = bf16[8,128]{{1,0}} fusion(%p), kind=kCustom, calls=%piece.{i}' for i in range(3)
  ]
  assert only(program('\n'.join(calls), *pieces)).size == 2 * 8 * 128


def test_fused_reductions_and_slices_are_reduce_scatters():
  """Each its own: the compiler gives those that it has put together the same channel."""
  fused = """%all-reduce-scatter.{0} (q: bf16[8,128]) -> bf16[2,128] {{
  %r = bf16[8,128]{{1,0}} all-reduce(%q), channel_id=1, replica_groups=[4,4]<=[16], to_apply=%add
}}"""
  call = '  %f.{0} = bf16[2,128]{{1,0}} fusion(%p), kind=kCustom, calls=%all-reduce-scatter.{0}'
  two = program(
    '\n'.join(call.format(i) for i in (1, 2)),
    *(fused.format(i) for i in (1, 2)),
    '%add (x: bf16[]) -> bf16[] {\n}',
  )
  assert [(c.kind, c.size) for c in collectives(two, 16)] == [('reduce-scatter', 2 * 8 * 128)] * 2


LOOP = """%condition (x: (f32[4], u32[])) -> pred[] {
  %x.0 = (f32[4]{0}, u32[]) parameter(0)
  %limit = u32[]{:T(128)} constant(8)
  %n.0 = u32[]{:T(128)} get-tuple-element(%x.0), index=1
  ROOT %test = pred[] compare(%n.0, %limit), direction=LT
}

%body (x: (f32[4], u32[])) -> (f32[4], u32[]) {
  %x.1 = (f32[4]{0}, u32[]) parameter(0)
  %two = u32[] constant(2)
  %n.1 = u32[] get-tuple-element(%x.1), index=1
  %next = u32[] add(%n.1, %two)
  %value = f32[4]{0} get-tuple-element(%x.1), index=0
  %moved = f32[4]{0} collective-permute(%value), channel_id=1, source_target_pairs={{0,1},{1,0}}
  ROOT %result = (f32[4]{0}, u32[]) tuple(%moved, %next)
}"""


@pytest.mark.parametrize(
  ('first', 'known', 'count'),
  [
    ('constant(0)', '', 4),
    ('constant(1)', '', 4),
    ('constant(3)', '', 3),
    ('add(%a, %b)', '', None),
    ('add(%a, %b)', ', backend_config={"known_trip_count":{"n":"7"}}', 7),
  ],
)
def test_loops_count_with_their_length(first, known, count):
  text = f"""
  %first = u32[] {first}
  %copied = u32[] copy(%first)
  %start = (f32[4]{{0}}, u32[]) tuple(%p, %copied)
  ROOT %w = (f32[4]{{0}}, u32[]) while(%start), condition=%condition, body=%body{known}"""
  found = only(program(text, LOOP))
  assert (found.kind, found.size, found.sent, found.count) == ('collective-permute', 16, 16, count)


def test_only_main_memory_counts_with_its_tiles():
  assert hlo.size('(bf16[3,5]{1,0}, pred[7], f32[], u8[2])') == 30 + 7 + 4 + 2
  assert hlo.size_in_memory('f32[10,100]{1,0:T(8,128)}') == 4 * 16 * 128
  assert hlo.size_in_memory('bf16[10,100]{0,1:T(8,128)(2,1)}') == 2 * 104 * 128
  assert hlo.size_in_memory('f32[10,100]{1,0:T(8,128)S(1)}') == 0
  assert hlo.size_in_memory('f32[10,100]{1,0}') == 4000


def test_memory_traffic_of_a_program():
  slicing = """%fused (a: f32[100,4], b: f32[4]) -> f32[100,4] {
  %a = f32[100,4]{1,0} parameter(0)
  %b = f32[1,4]{1,0} parameter(1)
  %i = u32[] constant(3)
  ROOT %u = f32[100,4]{1,0} dynamic-update-slice(%a, %b, %i, %i)
}"""
  text = """
  %p = f32[100,4]{1,0} parameter(0)
  %x = f32[100,4]{1,0} negate(%p), backend_config={"estimated_cycles":"30"}
  %core = f32[100,4]{1,0:S(1)} negate(%x), backend_config={"estimated_cycles":"12"}
  %row = f32[1,4]{1,0} dynamic-slice(%core, %i, %i), dynamic_slice_sizes={1,4}
  %i = u32[] constant(3)
  %s = ((f32[100,4]{1,0}), f32[50,4]{1,0:S(1)}, s32[]{:S(2)}) slice-start(%x), slice={[0:50], [0:4]}
  %half = f32[50,4]{1,0:S(1)} slice-done(%s)
  ROOT %f = f32[100,4]{1,0} fusion(%x, %row), kind=kLoop, calls=%fused, unknown"""
  text = text.replace('unknown', 'backend_config={"estimated_cycles":"9223372036854775807"}')
  array, row = 4 * 400, 4 * 4
  expected = 2 * array + array + 2 * row + array // 2 + (row + row)
  assert costs.memory_traffic(program(text, slicing)) == expected
  assert costs.core_cycles(program(text, slicing)) == (42, 1)


def test_kernels_take_what_they_compute_or_move():
  product = """%product (a: bf16[64,32], b: bf16[3,32,48]) -> bf16[3,64,48] {
  %a = bf16[3,64,32]{2,1,0} parameter(0)
  %b = bf16[3,32,48]{2,1,0} parameter(1)
  ROOT %d = bf16[3,64,48]{2,1,0} dot(%a, %b), lhs_batch_dims={0}, lhs_contracting_dims={2}, rhs_batch_dims={0}, rhs_contracting_dims={1}
}

%add (m: bf16[], n: bf16[]) -> bf16[] {
  %m = bf16[] parameter(0)
  %n = bf16[] parameter(1)
  ROOT %o = bf16[] add(%m, %n)
}"""  # noqa: E501
  text = """
  %p = bf16[3,64,32]{2,1,0} parameter(0)
  %q = bf16[3,32,48]{2,1,0} parameter(1)
  %x = bf16[3,64,48]{2,1,0} fusion(%p, %q), kind=kCustom, calls=%product
  %s = bf16[3,64,48]{2,1,0} all-reduce(%x), channel_id=1, replica_groups={}, to_apply=%add
  ROOT %y = bf16[3,64,48]{2,1,0} negate(%s)"""
  flops = 2 * 3 * 64 * 48 * 32
  result = 2 * 3 * 64 * 48
  moved = result + 2 * 3 * 32 * (64 + 48)
  compiled = program(text, product)
  assert costs.kernel_seconds(compiled, flops=1.0, bandwidth=1e9) == pytest.approx(flops, rel=1e-3)
  slow = costs.kernel_seconds(compiled, flops=1e18, bandwidth=1.0)
  assert slow == pytest.approx(moved + 2 * result)


def test_what_a_gpu_has_no_memory_for():
  config = mae_hivit_t.get_config('debug')
  config.model.update(embed_dim=16, depths=(1, 1, 1))
  chip = dataclasses.replace(roofline.CHIPS['h200'], hbm=2**16)
  report = plan.plan(config, jax.devices()[:1], chip)
  assert not report['fits']
  total = report['memory']['total']
  assert total > chip.hbm
  text = format_report(report | {'topology': 'h200:1'})
  assert f'fits               NO: {total / 2**30:.2f} of 0.00 GiB' in text
  assert 'what helps         --config.accumulate_steps=2' in text


# --- arithmetic


@pytest.mark.parametrize(
  ('kind', 'sent'),
  [('all-reduce', 1500), ('all-gather', 750), ('reduce-scatter', 750), ('all-to-all', 750)],
)
def test_bytes_sent_in_a_ring(kind, sent):
  assert Collective(kind, 1000, np.arange(8).reshape(2, 4), 1).sent == sent


def test_axes_of_groups():
  along = lambda groups: Collective('all-reduce', 1, np.array(groups), 1).axes(MESH)  # noqa: E731
  assert along([[0, 1, 2, 3], [4, 5, 6, 7]]) == ('fsdp',)
  assert along([[0, 4], [1, 5], [2, 6], [3, 7]]) == ('data',)
  assert along([[0, 1, 2, 3, 4, 5, 6, 7]]) == ('data', 'fsdp')


def test_estimates_by_hand():
  chip = roofline.Chip(
    flops=100.0, hbm=0.0, hbm_bandwidth=10.0, ici_bandwidth=5.0, pod=1, clock=2.0
  )
  estimate = roofline.estimate(chip, flops=300.0, traffic=50.0, sent=5.0, schedule=11.0)
  assert estimate == {
    'products': 3.0, 'memory': 5.0, 'network': 1.0, 'limiter': 'memory',
    'overlapped': 5.0, 'serial': 9.0, 'schedule': 11.0,
  }  # fmt: skip


# --- mistakes


@pytest.mark.parametrize(
  ('topology', 'message'),
  [
    ('v9:2x2', r'expected a kind \(v4, .*, h200\) and a shape, such as v5e:4x4'),
    ('v5e', 'expected a kind'),
    ('v5e:4x', 'expected a kind'),
    ('cpu:0', 'expected a kind'),
    ('h200:2x2', 'a number of GPUs in one machine, 1 to 8; more are several machines'),
    ('h200:9', 'a number of GPUs in one machine, 1 to 8'),
    ('v5e:32x32', 'the largest slice of v5e has 256 chips; more are several slices'),
  ],
)
def test_topologies_that_there_are_not(topology, message):
  with pytest.raises(UserError, match=f'--topology={topology}: {message}'):
    plan.find_devices(topology)


def test_without_a_compiler(monkeypatch):
  monkeypatch.setattr(importlib.util, 'find_spec', lambda name: None)
  with pytest.raises(UserError, match=r'takes the CUDA compiler: pip install "jax\[cuda12\]"; or'):
    plan.find_devices('h200:8')
  with pytest.raises(UserError, match=r'takes the TPU compiler: pip install "jax\[tpu\]"; or'):
    plan.find_devices('v5e:4x4')
