"""Detection from the command line, in two buckets: files, evaluation, kills, devices."""

import json

import pytest
from PIL import Image
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from hivit_jax.data.coco import KINDS
from tests.data import coco_on_disk
from tests.data.scenes_on_disk import put
from tests.dense_runs import assert_same_after_a_kill, command_line
from tests.runs import metrics

CONFIG = 'configs/detect_hivit_t.py:debug'
# Images of three sizes, upright or not, end on one of two canvases, and so do those evaluated.
CANVASES = '((32,64),(64,32))'
PLURALS = {'box': 'boxes', 'mask': 'masks'}
SETTINGS = {
  'max_steps': 4,
  'seed': 1,  # both canvases come in these steps
  'batch_size': 4,
  'epochs': 4.0,  # of nine images with an object
  'ema_decay': 0.5,
  'checkpoint__every_epochs': 0.1,  # after every step
  'evaluation__every_epochs': 0.1,
  'pictures__every_epochs': 4.0,  # and at the start and the end
  'pictures__count': 2,
  'model__score_threshold': 0.0,  # nothing is learnt in so few steps, but much is found
  'detect__short_sides': '(24,32)',
  'detect__buckets': CANVASES,
  'detect__eval_short_side': 32,
  'detect__eval_buckets': CANVASES,
}


@pytest.fixture(scope='module')
def root(tmp_path_factory):
  """A folder with COCO's files."""
  return put(tmp_path_factory.mktemp('coco'), coco_on_disk.official(train=12, val=6))


@pytest.fixture(scope='module')
def command(root):
  """A function from a workdir and changed settings to the command of a run."""
  data = {'data__name': f'coco:{root}', 'data__train_split': 'train', 'data__eval_split': 'val'}

  def command(workdir, **changed) -> list[str]:
    return command_line(CONFIG, workdir, **SETTINGS | data | changed)

  return command


@pytest.fixture(scope='module')
def trained(runs, command, tmp_path_factory):
  """The workdir of a finished run."""
  workdir = tmp_path_factory.mktemp('detect') / 'run'
  done = runs.finish(command(workdir))
  assert done.returncode == 0, done.stderr
  for what in ('the training step', 'the evaluation'):
    for canvas in ('32x64 (1 of 2)', '64x32 (2 of 2)'):
      assert f'compiling {what} for {canvas}' in done.stderr
  return workdir


def test_results_files_have_the_metrics_and_an_evaluation_leaves_the_same(
  runs, command, trained, root
):
  last = metrics(trained)[-1]
  assert last['step'] == SETTINGS['max_steps']
  own = {key: value for key, value in last.items() if 'ema_' not in key and key[:5] == 'eval/'}
  files = {kind: trained / 'results' / f'eval_{name}.json' for kind, name in PLURALS.items()}
  truth = COCO(root / 'annotations' / 'instances_val2017.json')
  for kind, file in files.items():
    measured = COCOeval(truth, truth.loadRes(str(file)), KINDS[kind])
    measured.evaluate()
    measured.accumulate()
    measured.summarize()
    ours = [own[f'eval/{kind}_{metric}'] for metric in ('ap', 'ar_100')]
    assert [measured.stats[0], measured.stats[8]] == pytest.approx(ours, abs=1e-9)
  for step in (0, last['step']):
    with Image.open(trained / 'detections' / f'step_{step:08}.png') as picture:
      assert picture.width > 2 * 320
  before = {file: json.loads(file.read_text()) for file in files.values()}
  assert min(map(len, before.values())) > 10  # though after four steps none is right
  for file in files.values():
    file.unlink()
  done = runs.finish([*command(trained), '--mode=evaluate'])
  assert done.returncode == 0, done.stderr
  assert json.loads(done.stdout.splitlines()[-1]) == pytest.approx(own)
  assert {file: json.loads(file.read_text()) for file in files.values()} == before


def test_killed_in_a_save_it_ends_with_the_same_bits(runs, command, trained, tmp_path):
  workdir = tmp_path / 'run'
  assert_same_after_a_kill(runs, command(workdir), workdir, trained)


def test_two_processes_train_and_measure_as_one(runs, command, trained, tmp_path):
  """In the first step, gradient included: later, rounding decides about boxes.

  They measure on one canvas for all images: it changes nothing.
  """
  workdir = tmp_path / 'run'
  less = {'max_steps': 1, 'ema_decay': None, 'detect__eval_buckets': '((64,64),)'}
  less |= {'pictures__every_epochs': 0}  # process 0 draws what all have measured
  with runs.job(command(workdir, mesh__fsdp=2, **less)) as job:
    assert [process.wait() for process in job] == [0, 0], [process.output() for process in job]
    assert 'float32 on 4 x cpu' in job[0].output()
  ours, expected = ([row for row in metrics(w) if row['step'] == 1] for w in (workdir, trained))
  keys = [key for key in expected[0] if key.startswith(('train/', 'eval/')) and 'ema_' not in key]
  assert {'train/grad_norm', 'eval/box_ap', 'eval/mask_ar_100'} <= set(keys)
  assert [ours[0][k] for k in keys] == pytest.approx([expected[0][k] for k in keys], rel=1e-4)
