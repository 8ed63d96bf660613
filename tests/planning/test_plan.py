"""Plans: what a compiled step is said to need is what it needs."""

import dataclasses
import importlib.util
import json
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec

from configs import detect_hivit_t, mae_hivit_t, segment_hivit_t
from hivit_jax.errors import UserError
from hivit_jax.planning import plan, roofline
from hivit_jax.planning.collectives import collectives
from hivit_jax.tools.plan import format_report
from hivit_jax.train import assemble, optim, sharding, step, synthetic
from tests import patience

ROOT = pathlib.Path(__file__).parents[2]


# --- programs that XLA has compiled, for eight simulated devices


def compiled_collectives() -> dict:
  """Kind -> bytes, sent, count, devices of a function's collectives."""
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
  rows = collectives(text, 8)
  assert all(row['complete'] for row in rows)
  return {row['kind']: [row[key] for key in ('bytes', 'sent', 'count', 'devices')] for row in rows}


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
  done = subprocess.run(
    [sys.executable, '-c', code],
    cwd=ROOT, capture_output=True, text=True, timeout=patience.limit(300),
  )  # fmt: skip
  assert done.returncode == 0, done.stderr
  return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
def test_collectives_of_a_function(eight):
  whole, part = 4 * 1000, 4 * 250
  assert eight['collectives'] == {
    'all-reduce': [whole, whole, 1, 2],
    'collective-permute': [whole, whole, 1, 2],
    'all-to-all': [whole, 3 * part, 1, 4],
    'reduce-scatter': [whole, 3 * part, 1, 4],
    'all-gather': [5 * whole, 5 * 3 * part, 5, 4],
  }


@pytest.mark.slow
def test_data_parallel_steps_send_the_gradients_once(eight):
  report = eight['fsdp=1']
  assert {row['kind'] for row in report['collectives']} == {'all-reduce'}
  payload = sum(row['bytes'] for row in report['collectives'])
  assert 0 <= payload - eight['gradients'] < 64  # and the loss
  assert sum(row['sent'] for row in report['collectives']) == payload * 2 * 7 / 8
  assert all(row['devices'] == 8 and row['complete'] for row in report['collectives'])


@pytest.mark.slow
def test_split_state_is_a_part_of_the_whole(eight):
  one, four = eight['fsdp=1'], eight['fsdp=4']
  assert one['memory']['parameters'] == one['memory']['average'] > eight['gradients']
  for part in ('parameters', 'optimizer', 'average'):
    assert 1 / 4 < four['memory'][part] / one['memory'][part] < 0.3, part  # biases stay whole
  assert four['memory']['batch'] == one['memory']['batch'] == 2 * (32 * 32 * 3 + 4)
  assert four['matmul_flops'] == one['matmul_flops'] > 0
  parts = ('parameters', 'optimizer', 'average')
  state = [sum(report['memory'][part] for part in parts) for report in (one, four)]
  # The products move the same; of the state a device reads and writes its part.
  assert one['memory_traffic'] - four['memory_traffic'] == 2 * (state[0] - state[1])
  assert four['memory_traffic'] > 2 * state[1]
  (gathered,) = (row for row in four['collectives'] if row['kind'] == 'all-gather')
  assert gathered['devices'] == 4  # those that share the state


@pytest.mark.slow
def test_memory_adds_up(eight):
  memory = eight['fsdp=4']['memory']
  assert sum(memory.values()) == 2 * memory['total']
  assert memory['temporaries'] > 0
  assert memory['padding'] < 10_000  # also the metrics


@pytest.mark.slow
def test_reports_of_cpus_have_no_times(eight):
  report = {'topology': 'cpu:8'} | eight['fsdp=4']
  assert 'estimate' not in report
  text = format_report(report)
  assert 'mae_hivit_tiny 32x32, mae, batch 16 (2 a device), float32' in text
  assert 'depends on the machine' in text
  assert 'all-gather' in text
  assert 'Compiled, not run' in text


@pytest.mark.slow
def test_reports_of_what_does_not_fit(eight):
  refusal = 'RESOURCE_EXHAUSTED: Ran out of memory on HBM'
  missing = {'fits': False, 'refusal': refusal, 'helps': 'more devices'}
  report = {'topology': 'v5e:4x2'} | eight['fsdp=4'] | missing
  text = format_report(report)
  assert f'NO: {refusal}' in text
  assert text.endswith('what helps         more devices, a smaller batch')


# --- text as the TPU compiler writes it


def program(body: str, *others: str) -> str:
  entry = f'ENTRY %main (p: bf16[8,128]) -> bf16[8,128] {{\n{body}\n}}'
  return '\n\n'.join(['HloModule jit_step', *others, entry])


def only(program: str) -> dict:
  (found,) = collectives(program, 16)
  return found


@pytest.mark.parametrize(
  ('groups', 'devices'),
  [
    ('{{0,1,2,3},{4,5,6,7}}', 4),
    ('[2,4]<=[8]', 4),
    ('[4,2]<=[2,4]T(1,0)', 2),
    ("mesh['a'=4,'b'=2] {'a'}", 4),
    ("mesh['a'=4,'b'=2] {'a','b'}", 8),
    ("mesh['a'=2,'b'=4], device_ids=([4,2]T(1,0)) {'b'}", 4),
    ("mesh['a'=8] {'a':(2)2}", 2),
    ('{}', 16),
  ],
)
def test_groups_of_devices(groups, devices):
  text = f'  %r = f32[10]{{0}} all-reduce(%p), channel_id=1, replica_groups={groups}, to_apply=%add'
  found = only(program(text, '%add (x: f32[]) -> f32[] {\n}'))
  assert (found['devices'], found['bytes']) == (devices, 40)
  assert found['sent'] == pytest.approx(2 * 40 * (devices - 1) / devices)


def test_groups_of_one_send_nothing():
  text = '  %r = f32[10]{0} all-reduce(%p), replica_groups=[8,1]<=[8], to_apply=%add'
  assert collectives(program(text, '%add (x: f32[]) -> f32[] {\n}'), 8) == []


def test_unknown_groups_are_an_error():
  with pytest.raises(ValueError, match='unknown form of groups'):
    collectives(program('  %r = f32[10]{0} all-reduce(%p), replica_groups=other[3]'), 16)


def test_a_start_and_its_done_are_one():
  text = """
  %s = (bf16[2,128]{1,0:T(8,128)(2,1)}, bf16[8,128]{1,0:T(8,128)(2,1)S(1)}) all-gather-start(%p), \
channel_id=3, replica_groups=[4,4]<=[16], dimensions={0}
  ROOT %d = bf16[8,128]{1,0:T(8,128)(2,1)S(1)} all-gather-done(%s)"""
  found = only(program(text))
  assert [found[key] for key in ('kind', 'bytes', 'count')] == ['all-gather', 2 * 8 * 128, 1]


def test_pieces_of_a_fused_collective_are_one():
  gather = (
    '  ROOT %g = bf16[8,128]{1,0} all-gather(%q), channel_id=7, replica_groups=[4,4]<=[16], '
    'dimensions={0}'
  )
  pieces = [f'%piece.{i} (q: bf16[2,128]) -> bf16[8,128] {{\n{gather}\n}}' for i in range(3)]
  calls = [
    f'  %f.{i} = bf16[8,128]{{1,0}} fusion(%p), kind=kCustom, calls=%piece.{i}' for i in range(3)
  ]
  assert only(program('\n'.join(calls), *pieces))['bytes'] == 2 * 8 * 128


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
  found = only(two)
  assert (found['kind'], found['count'], found['bytes']) == ('reduce-scatter', 2, 2 * 2 * 8 * 128)


LOOP = """%condition (x: (f32[4], u32[])) -> pred[] {
  ROOT %test = pred[] compare(%n.0, %limit), direction=LT
}

%body (x: (f32[4], u32[])) -> (f32[4], u32[]) {
  %moved = f32[4]{0} collective-permute(%value), channel_id=1, source_target_pairs={{0,1},{1,0}}
  ROOT %result = (f32[4]{0}, u32[]) tuple(%moved, %next)
}"""


@pytest.mark.parametrize(('known', 'count'), [(7, 7), (None, 1)])
def test_loops_count_with_their_length_if_the_compiler_tells_it(known, count):
  text = '  ROOT %w = (f32[4]{0}, u32[]) while(%start), condition=%condition, body=%body'
  if known:
    text += f', backend_config={{"known_trip_count":{{"n":"{known}"}}}}'
  found = only(program(text, LOOP))
  assert found == {
    'kind': 'collective-permute', 'devices': 2, 'count': count, 'bytes': 16 * count,
    'sent': 16 * count, 'complete': known is not None,
  }  # fmt: skip


@pytest.mark.slow
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


def test_estimates_by_hand():
  chip = roofline.Chip(flops=100.0, hbm=0.0, hbm_bandwidth=10.0, ici_bandwidth=5.0, pod=1)
  estimate = roofline.estimate(chip, flops=300.0, traffic=50.0, sent=5.0)
  assert estimate == {
    'products': 3.0, 'memory': 5.0, 'network': 1.0, 'limiter': 'memory',
    'overlapped': 5.0, 'serial': 9.0,
  }  # fmt: skip


# --- mistakes


@pytest.mark.parametrize(
  ('topology', 'message'),
  [
    ('v9:2x2', r'expected a kind \(v4, .*, h200\) and a shape, such as v5e:4x4'),
    ('v5e', 'expected a kind'),
    ('v5e:4x', 'expected a kind'),
    ('cpu:0', 'expected a kind'),
    ('h200:2x2', 'expected a number of GPUs in one machine, of 8 h200 at most; several have'),
    ('h200:9', 'expected a number of GPUs in one machine, of 8 h200 at most'),
    ('v5e:32x32', 'expected a slice, of 256 v5e at most; several have a slower network'),
  ],
)
def test_topologies_that_there_are_not(topology, message):
  with pytest.raises(UserError, match=f'--topology={topology}: {message}'):
    plan.find_devices(topology)


def test_without_a_compiler(monkeypatch):
  monkeypatch.setattr(importlib.util, 'find_spec', lambda name: None)
  with pytest.raises(UserError, match=r'needs a compiler: pip install "jax\[cuda13\]"; or'):
    plan.find_devices('h200:8')
  with pytest.raises(UserError, match=r'needs a compiler: pip install "jax\[tpu\]"; or'):
    plan.find_devices('v5e:4x4')


# --- batches without data


def test_the_batch_of_a_plan_is_what_the_task_takes_on_its_largest_canvas():
  mesh = sharding.make_mesh(1, 1, jax.devices()[:1])
  config = detect_hivit_t.get_config()
  config.batch_size = 2
  assert synthetic.canvas(config) == (800, 1344)
  batch = synthetic.abstract_batch(config, mesh)
  assert batch['image'].shape == (2, 800, 1344, 3)
  assert batch['masks'].shape == (2, 100, 112, 112)
  config.detect.buckets = ((96, 64), (32, 64))
  found = synthetic.batch(config, mesh)
  assert {key: (x.shape, x.dtype) for key, x in found.items()} == {
    key: (x.shape, x.dtype) for key, x in synthetic.abstract_batch(config, mesh).items()
  }
  assert found['size'].tolist() == [[96, 64]] * 2  # the images fill the canvas
  config = segment_hivit_t.get_config('512')
  assert synthetic.canvas(config) == (512, 512)
  assert synthetic.abstract_batch(config, mesh)['label_map'].shape == (16, 512, 512)
