"""Curves of runs: what is drawn is what the metrics say."""

import functools
import importlib
import json

import numpy as np
import pytest
from PIL import Image

from hivit_jax.errors import UserError
from hivit_jax.tools import curves, rates
from tests.helpers import GOLDEN
from tests.runs import STEPS, error_of

CONFIG = '--config=configs/simmim_swin_b.py'


def lines(figure) -> dict[str, dict[str, tuple[list, list]]]:
  """Panel -> 'RUN METRIC' -> x and y of what is drawn."""
  return {
    axis.get_title(): {
      line.get_gid(): (list(line.get_xdata()), list(line.get_ydata())) for line in axis.lines
    }
    for axis in figure.axes
  }


def write(workdir, *rows, end: str = ''):
  workdir.mkdir(parents=True)
  text = ''.join(json.dumps(row) + '\n' for row in rows)
  (workdir / 'metrics.jsonl').write_text(text + end)
  return workdir


def trained(step: int, loss: float | None, **more: float) -> dict:
  return {'step': step, 'train/loss': loss, 'train/epoch': step / 4} | more


def test_the_curves_of_a_run_are_its_metrics(finished):
  figure = curves.draw({'it': curves.read_metrics(finished.workdir)})
  text = (finished.workdir / 'metrics.jsonl').read_text()
  rows = [json.loads(line) for line in text.splitlines()]
  memory = ('train/device_memory_mb', 'train/host_memory_mb')
  panels = {m: (m,) for m in ('train/loss', 'eval/knn_top1', 'train/learning_rate')}
  expected = {
    panel: {
      f'it {metric}': (
        [row['step'] / 4 for row in rows if metric in row],
        [row[metric] for row in rows if metric in row],
      )
      for metric in metrics
    }
    for panel, metrics in (panels | {'memory (MB)': memory}).items()
  }
  assert lines(figure) == expected
  assert expected['eval/knn_top1']['it eval/knn_top1'][0] == [0, 2.5, 5, 7.5, 10]
  assert {axis.get_xlabel() for axis in figure.axes} == {'epoch'}
  assert {(axis.get_xscale(), axis.get_yscale()) for axis in figure.axes} == {('linear', 'linear')}
  assert figure.get_suptitle() == 'it'


def test_of_a_step_that_is_there_twice_the_last_value_counts_and_half_lines_do_not(tmp_path):
  workdir = write(
    tmp_path / 'run',
    trained(4, 1.0), trained(8, 0.5), trained(8, 0.7), trained(12, None), trained(16, 0.4),
    end='{"step": 20, "train/lo',
  )  # fmt: skip
  rows = curves.read_metrics(workdir)
  assert [(step, row['train/loss']) for step, row in rows.items() if step != 12] == [
    (4, 1.0), (8, 0.7), (16, 0.4),
  ]  # fmt: skip
  assert np.isnan(rows[12]['train/loss'])  # a gap in the curve


def test_metrics_of_one_kind_share_a_panel_and_others_have_their_own(tmp_path):
  evaluation = ['top1', 'top5', 'ema_top1', 'ema_top5', 'knn_top1', 'loss', 'ema_loss', 'ece']
  values = {f'eval/{name}': i / 10 for i, name in enumerate(evaluation)}
  row = trained(4, 1.0, **values) | {'train/learning_rate': 0.1, 'train/grad_norm': 3.0}
  figure = curves.draw({'r': curves.read_metrics(write(tmp_path / 'run', row))})
  assert {panel: [gid.split()[1] for gid in found] for panel, found in lines(figure).items()} == {
    'loss': ['train/loss', 'eval/loss', 'eval/ema_loss'],
    'accuracy': ['eval/knn_top1', 'eval/top1', 'eval/top5', 'eval/ema_top1', 'eval/ema_top5'],
    'train/learning_rate': ['train/learning_rate'],
    'eval/ece': ['eval/ece'],
  }
  for axis in figure.axes[:2]:
    names = [text.get_text() for text in axis.get_legend().get_texts()]
    colors = [handle.get_color() for handle in axis.get_legend().get_lines()]
    assert [(f'r {n}', c) for n, c in zip(names, colors, strict=True)] == [
      (line.get_gid(), line.get_color()) for line in axis.lines
    ]
    assert len(set(colors)) == len(colors)


@pytest.mark.parametrize('count', [2, 12])
def test_of_several_runs_the_colour_tells_the_run_and_the_dashes_tell_the_metric(tmp_path, count):
  runs = {
    str(i): curves.read_metrics(write(tmp_path / str(i), trained(4, i, **{'eval/loss': -i})))
    for i in range(count)
  }
  figure = curves.draw(runs)
  (axis,) = figure.axes
  assert lines(figure)['loss'] == {
    f'{i} {metric}': ([1], [sign * i])
    for metric, sign in (('train/loss', 1), ('eval/loss', -1))
    for i in range(count)
  }
  colors = {line.get_gid().split()[0]: tuple(line.get_color()) for line in axis.lines}
  styles = {line.get_gid().split()[1]: line.get_linestyle() for line in axis.lines}
  assert len({(tuple(li.get_color()), li.get_linestyle()) for li in axis.lines}) == 2 * count
  (legend,) = figure.legends
  shown = zip(legend.get_texts(), legend.get_lines(), strict=True)
  assert {text.get_text(): tuple(line.get_color()) for text, line in shown} == colors
  shown = zip(axis.get_legend().get_texts(), axis.get_legend().get_lines(), strict=True)
  assert {text.get_text(): line.get_linestyle() for text, line in shown} == styles


def test_steps_are_the_axis_unless_every_run_tells_epochs(tmp_path):
  told = curves.read_metrics(write(tmp_path / 'a', trained(4, 1.0), {'step': 6, 'eval/top1': 0.5}))
  # An evaluation after the last line of training metrics, as a kill may leave it.
  assert lines(curves.draw({'a': told}))['eval/top1'] == {'a eval/top1': ([1.5], [0.5])}
  untold = curves.read_metrics(write(tmp_path / 'b', {'step': 8, 'train/loss': 2.0}))
  figure = curves.draw({'a': told, 'b': untold})
  assert lines(figure)['train/loss'] == {'a train/loss': ([4], [1.0]), 'b train/loss': ([8], [2.0])}
  assert {axis.get_xlabel() for axis in figure.axes} == {'step'}


@pytest.mark.parametrize(
  ('workdirs', 'names'),
  [
    (['/r/a'], ['a']),
    (['/r/a', '/r/b/'], ['a', 'b']),
    (['/r/a/run', '/r/b/run'], ['a', 'b']),
    (['/r/a/1/run', '/r/a/2/run', '/r/b/1/run'], ['a/1', 'a/2', 'b/1']),
    (['/r/a', '/r/a/a'], ['r', 'a']),
  ],
)
def test_runs_are_called_by_what_tells_them_apart(workdirs, names):
  assert curves.short_names(workdirs) == names


def test_metrics_without_anything_to_draw(tmp_path):
  rows = curves.read_metrics(write(tmp_path / 'x', {'step': 1, 'train/grad_norm': 1.0}))
  with pytest.raises(UserError, match='x: nothing to draw'):
    curves.draw({'x': rows})


# The command


@pytest.fixture(scope='module')
def plot(forks):
  return functools.partial(forks, 'hivit_jax/tools/plot.py')


def test_the_picture_of_two_runs(plot, finished, tmp_path):
  other = write(tmp_path / 'other', trained(STEPS, 0.5))
  out = tmp_path / 'two.png'
  assert plot(str(finished.workdir), str(other), f'--out={out}') == (0, '', f'wrote {out}\n')
  with Image.open(out) as picture:
    assert picture.width > picture.height > 300
    assert len(np.unique(np.asarray(picture).reshape(-1, 4), axis=0)) > 50


@pytest.mark.parametrize('name', ['simmim_finetune_swin_base_after_100', 'mae_hivit_base_finetune'])
def test_the_rate_of_a_config_at_given_epochs(plot, name):
  golden = json.loads((GOLDEN / 'recipes.json').read_text())['recipes'][name]
  file = 'finetune_swin_b.py:100' if 'swin' in name else 'finetune_hivit_b.py'
  epochs = ','.join(map(repr, golden['epoch']))
  status, stderr, stdout = plot(f'--config=configs/{file}', f'--epochs={epochs}', '--json')
  assert (status, stderr) == (0, '')
  result = json.loads(stdout.splitlines()[-1])
  assert result.keys() == {'epoch', 'learning_rate', 'first_layer'}
  assert result['epoch'] == golden['epoch']
  np.testing.assert_allclose(result['learning_rate'], golden['lr']['head'], rtol=1e-9)
  np.testing.assert_allclose(result['first_layer'], golden['lr']['first'], rtol=1e-9)


def test_settings_change_the_rate_and_epochs_are_not_rounded(plot):
  epochs = '--epochs=699.999999999,700,700.5'
  milestones = '--config.optim.milestones=600,700'
  ended = plot(CONFIG, epochs, milestones, '--config.batch_size=1024', '--json')
  result = json.loads(ended.stdout.splitlines()[-1])
  assert result['epoch'] == [699.999999999, 700, 700.5]
  np.testing.assert_allclose(result['learning_rate'], [2e-5, 2e-6, 2e-6], rtol=1e-12)
  assert 'first_layer' not in result
  table = plot(CONFIG, epochs).stdout.splitlines()
  assert table[0].split() == ['epoch', 'learning_rate']
  assert [line.split() for line in table[1:]] == [
    ['699.999999999', '0.0004'], ['700', '4e-05'], ['700.5', '4e-05'],
  ]  # fmt: skip


def test_steps_and_epochs_of_the_same_config(plot):
  """Ten steps are an epoch."""
  data = ('--config.data.train_split=train[:1000]', '--config.batch_size=100')
  digits = ('--config=configs/demo.py:digits', *data, '--json')
  printed = lambda *flags: json.loads(plot(*digits, *flags).stdout.splitlines()[-1])  # noqa: E731
  epochs = [0, 0.3, 1.5, 30.3]
  for own in ('--config.optim.warmup_steps=7', '--config.steps=600'):
    by_epochs = printed(own, f'--epochs={",".join(map(str, epochs))}')
    by_steps = printed(own, '--steps=0,3,15,303')
    assert by_steps['step'] == [0, 3, 15, 303]
    np.testing.assert_allclose(by_steps['learning_rate'], by_epochs['learning_rate'], rtol=1e-12)
    assert len(set(by_steps['learning_rate'])) == 4


def test_the_picture_of_a_config_in_steps():
  config = importlib.import_module('configs.mae_hivit_b').get_config()
  config.update(steps=1000)
  config.optim.update(warmup_steps=100, schedule='step', milestones=(700.0,))
  steps = rates.grid(config)
  assert {0.0, 100.0, 700.0, np.nextafter(700.0, 0.0), 1000.0} <= set(steps)
  values = rates.learning_rates(config, steps)
  figure = curves.draw_rates('it', steps, values, unit=rates.unit(config))
  assert [axis.get_xlabel() for axis in figure.axes] == ['step']
  assert values['learning_rate'][-1] == pytest.approx(0.1 * values['learning_rate'].max())


def test_the_picture_of_a_config(plot, tmp_path):
  out = tmp_path / 'rate.png'
  assert plot(CONFIG, f'--out={out}') == (0, '', f'wrote {out}\n')
  with Image.open(out) as picture:
    assert len(np.unique(np.asarray(picture).reshape(-1, 4), axis=0)) > 20


def test_what_is_drawn_of_a_config():
  config = importlib.import_module('configs.finetune_swin_b').get_config()
  epochs = rates.grid(config)
  assert {0.0, 20.0, np.nextafter(20.0, 0.0), 100.0} <= set(epochs)
  values = rates.learning_rates(config, epochs)
  figure = curves.draw_rates('it', epochs, values)
  drawn = {line.get_gid(): line.get_xydata().T for a in figure.axes for line in a.lines}
  assert drawn.keys() == {'learning_rate', 'first_layer'}
  for key, (x, y) in drawn.items():
    np.testing.assert_array_equal(x, epochs)
    np.testing.assert_array_equal(y, values[key])
  assert [axis.get_title() for axis in figure.axes] == [
    'learning rate of the head', 'of the first layer',
  ]  # fmt: skip
  assert figure.get_suptitle() == 'it'


@pytest.mark.parametrize(
  ('arguments', 'message'),
  [
    ([], 'whose curves? python -m hivit_jax.tools.plot WORKDIR..., or --config=FILE'),
    (['--epochs=1'], '--epochs of what? --config=configs/mae_hivit_b.py'),
    (['--json'], '--json of what? --config=configs/mae_hivit_b.py'),
    (['{tmp}/run', CONFIG], '"{tmp}/run" and --config: give runs or a config, not both'),
    ([CONFIG, '--json'], '--json: at which epochs? --epochs=0,1.5,20'),
    (
      [CONFIG, '--epochs=1,x'],
      '--epochs: "x" is not an epoch; expected numbers from 0 on: 0,1.5,20',
    ),
    ([CONFIG, '--epochs=-1'], '--epochs: "-1" is not an epoch'),
    ([CONFIG, '--epochs=nan'], '--epochs: "nan" is not an epoch'),
    ([CONFIG, '--epochs='], '--epochs is empty'),
    ([CONFIG, '--steps=x'], '--steps: "x" is not a step'),
    ([CONFIG, '--steps=1', '--epochs=1'], '--epochs and --steps: give one of them'),
    ([CONFIG, '--config.optim.schedule=line'], 'config.optim.schedule=line: expected one of cos'),
    (
      [CONFIG, '--config.epochs=100', '--epochs=1'],
      'config.optim.milestones=(700.0,): config.optim.schedule=step takes epochs before the '
      'end, config.epochs=100.0; for a short run: --config.optim.milestones=87.5, or',
    ),
    ([CONFIG, '--out={tmp}/no/x.png'], 'cannot write --out={tmp}/no/x.png: No such file or'),
    (['{tmp}/run', '{tmp}'], 'cannot read {tmp}/metrics.jsonl: No such file or directory; give'),
    (['{tmp}/empty'], '{tmp}/empty/metrics.jsonl has no metrics yet'),
    (['{tmp}/run', '--out={tmp}/no/x.png'], '--out={tmp}/no/x.png: No such file or directory'),
    (['{tmp}/run', '--out={tmp}/run'], 'cannot write --out={tmp}/run: Is a directory'),
    (['{tmp}/run', '--out={tmp}/x.doc'], "--out={tmp}/x.doc: Format 'doc' is not supported"),
  ],
)
def test_mistakes_are_one_line_and_write_nothing(plot, tmp_path, arguments, message):
  write(tmp_path / 'run', trained(4, 1.0))
  write(tmp_path / 'empty')
  fill = functools.partial(str.format, tmp=tmp_path)
  assert fill(message) in error_of(plot(*map(fill, arguments)))
  assert sorted(p.name for p in tmp_path.iterdir()) == ['empty', 'run']
