"""The command that draws reconstructions: its pictures, and mistakes on its command line."""

import functools
import os
import shutil

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from hivit_jax.train.checkpoint import Checkpoints
from tests.runs import BEFORE_LAST, STEPS, content, error_of

CELL = 160 + 8  # the tiny run's 32 pixels five times, and a margin


@pytest.fixture(scope='module')
def reconstruct(forks):
  return functools.partial(forks, 'hivit_jax/tools/reconstruct.py')


@pytest.fixture
def workdir(finished, tmp_path):
  """A workdir of one's own in which a finished run lies."""
  return shutil.copytree(finished.workdir, tmp_path / 'run')


@pytest.fixture(scope='module')
def untouched(finished):
  """A workdir with a finished run in it, which must be as it was when all mistakes were made."""
  before = content(finished.workdir)
  yield finished.workdir
  assert content(finished.workdir) == before


@pytest.fixture
def photographs(tmp_path):
  rng = np.random.default_rng(0)
  files = [tmp_path / 'a.jpg', tmp_path / 'b c.png']
  for file, size in zip(files, [(60, 40, 3), (30, 30)], strict=True):
    Image.fromarray(rng.integers(0, 256, size, np.uint8)).save(file)
  return files


def panels(path) -> np.ndarray:
  """Every image's four panels in a written picture: (B, 4, 32, 32, 3)."""
  with Image.open(path) as picture:
    pixels = np.asarray(picture)
  rows = (len(pixels) - 48) // CELL
  return np.stack(
    [
      [pixels[48 + row * CELL :, 8 + column * CELL :][:160:5, :160:5] for column in range(4)]
      for row in range(rows)
    ]
  )


def test_images_of_ones_own_are_drawn_with_the_mask_ratio_asked_for(
  reconstruct, untouched, photographs, tmp_path
):
  out, first, second = tmp_path / 'out.png', *map(str, photographs)
  done = reconstruct(
    f'--workdir={untouched}', f'--images={first}', second, '--mask_ratio=0.5', f'--out={out}'
  )
  assert done == (0, '', f'wrote {out}\n')
  result = panels(out)
  assert len(result) == 2
  for original, masked, reconstruction, pasted in result:
    assert original.std() > 20
    grey = (masked == 128).all(axis=-1)
    assert grey.mean() == pytest.approx(0.5, abs=0.01)
    np.testing.assert_array_equal(masked[~grey], original[~grey])
    np.testing.assert_array_equal(pasted[~grey], original[~grey])
    np.testing.assert_array_equal(pasted[grey], reconstruction[grey])
    assert (reconstruction[~grey] == 128).all()
    assert (reconstruction[grey] != original[grey]).any()


def test_without_images_evaluation_images_of_the_run_are_drawn(reconstruct, workdir, finished):
  done = reconstruct(f'--workdir={workdir}', '--count=2')
  assert done == (0, '', f'wrote {workdir}/reconstruction.png\n')
  originals = panels(workdir / 'reconstruction.png')[:, 0]
  assert len(originals) == 2
  by_the_run = panels(finished.workdir / f'reconstructions/step_{STEPS:08d}.png')[:, 0]
  np.testing.assert_array_equal(originals, by_the_run)


@pytest.mark.parametrize('below', ['checkpoints', f'checkpoints/{BEFORE_LAST}'])
def test_a_checkpoint_given_directly_stays_as_it_is(reconstruct, workdir, photographs, below):
  before = content(workdir)
  done = reconstruct(f'--workdir={workdir}/{below}', f'--images={photographs[0]}')
  assert done == (0, '', f'wrote {workdir}/reconstruction.png\n')
  after = content(workdir)
  assert after.pop('reconstruction.png')
  assert after == before


def test_a_checkpoint_outside_of_a_run_gets_its_picture_beside_it(
  reconstruct, finished, photographs, tmp_path
):
  shutil.copytree(finished.workdir / f'checkpoints/{STEPS}', tmp_path / 'copy' / '7')
  done = reconstruct(f'--workdir={tmp_path}/copy/7', f'--images={photographs[0]}')
  assert done == (0, '', f'wrote {tmp_path}/copy/reconstruction.png\n')


@pytest.mark.parametrize(
  ('flags', 'message'),
  [
    ([], 'give --workdir=DIRECTORY, the --workdir of a pretraining run'),
    (['--workdir={tmp}/nope'], '{tmp}/nope does not exist; give the --workdir of a training run'),
    (['--workdir={tmp}/file'], '{tmp}/file is not a directory; give the --workdir'),
    (['--workdir={tmp}/empty'], 'there is no checkpoint in {tmp}/empty; give the --workdir'),
    (['--workdir={run}/checkpoints/7'], '{run}/checkpoints/7 does not exist'),
    (['--workdir={run}', '--images={tmp}/no.jpg'], 'image {tmp}/no.jpg: No such file or directory'),
    (['--workdir={run}', '--images={tmp}'], 'cannot read the image {tmp}: Is a directory'),
    (['--workdir={run}', '{tmp}/file'], 'image {tmp}/file: not an image (4 bytes'),
    (['--workdir={run}', '--images={tmp}/cut.jpg'], 'cannot read the image {tmp}/cut.jpg: '),
    (['--workdir={run}', '--mask_ratio=1.5'], 'strictly between 0 and 1, got 1.5'),
    (['--workdir={run}', '--mask_ratio=nan'], 'strictly between 0 and 1, got nan'),
    (['--workdir={run}', '--mask_ratio=0.8'], 'mask_ratio 0.8 keeps 0 of 4 units'),
    (['--workdir={run}', '--mask_ratio=half'], '--mask_ratio=half: could not convert'),
    (['--workdir={run}', '--count=0'], '--count=0: 0 is not a positive integer'),
    (['--workdir={run}', '--out={tmp}/no/x.png'], '--out={tmp}/no/x.png: No such file or'),
    (['--workdir={run}', '--out={tmp}/empty'], 'cannot write --out={tmp}/empty: '),
    (['--workdir={run}', '--out={tmp}/x.doc'], '--out={tmp}/x.doc: unknown file extension: .doc'),
  ],
)
def test_mistakes_are_one_line_and_write_nothing(
  reconstruct, untouched, photographs, tmp_path, flags, message
):
  (tmp_path / 'file').write_text('mine')
  (tmp_path / 'cut.jpg').write_bytes(photographs[0].read_bytes()[:900])
  (tmp_path / 'empty').mkdir()
  before = sorted(os.listdir(tmp_path))
  fill = functools.partial(str.format, tmp=tmp_path, run=untouched)
  assert fill(message) in error_of(reconstruct(*map(fill, flags)))
  assert sorted(os.listdir(tmp_path)) == before


@pytest.mark.parametrize(
  ('metadata', 'found'),
  [
    ({'config': {'task': 'classify'}}, 'was trained with config.task="classify"'),
    ({'model': {'name': 'mae_hivit_tiny'}}, 'was converted, not trained'),
  ],
)
def test_weights_that_are_not_of_a_pretraining_run(reconstruct, tmp_path, metadata, found):
  with Checkpoints(tmp_path / 'checkpoints') as checkpoints:
    checkpoints.save(1, {'params': {'a': jnp.zeros(1)}}, metadata)
  error = error_of(reconstruct(f'--workdir={tmp_path}'))
  assert error == f'--workdir={tmp_path} {found}; give the --workdir of a pretraining run'
