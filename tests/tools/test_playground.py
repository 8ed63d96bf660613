"""What models show of pictures, each kind its own."""

import base64
import io

import numpy as np
import pytest
from PIL import Image

from hivit_jax.data import class_lists, coco
from hivit_jax.errors import UserError
from hivit_jax.interop import exporter, files
from hivit_jax.tools import predict_objects
from hivit_jax.tools.playground import Playground
from tests.helpers import TINY, random_model
from tests.models.test_mask_rcnn import DETECTOR
from tests.tools.test_predict_pixels import MODEL as SEGMENTER

OWN = {'mean': (0.6, 0.4, 0.5), 'std': (0.2, 0.3, 0.4)}


def state(name: str, **options) -> files.StateDict:
  """Weights of a random model that carry their model."""
  arrays = exporter.named_arrays(random_model(name, **options)[1])
  metadata = {'model': {'name': name, 'arguments': options}, 'image_size': options['image_size']}
  return files.StateDict(arrays, 'x.safetensors', metadata | {'data': OWN})


def encoded(pixels: np.ndarray, form: str = 'PNG') -> bytes:
  file = io.BytesIO()
  Image.fromarray(pixels).save(file, form)
  return file.getvalue()


def photograph(height: int = 80, width: int = 120) -> bytes:
  return encoded(np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8))


def decoded(url: str) -> np.ndarray:
  kind, _, data = url.partition(',')
  assert kind == 'data:image/png;base64'
  return np.asarray(Image.open(io.BytesIO(base64.b64decode(data))))


def test_a_classifier_tells_classes_and_does_not_reconstruct():
  names = [f'class {i}' for i in range(7)]
  weights = state('hivit_tiny', **TINY | {'depths': (1, 1, 1), 'num_classes': 7})
  weights.metadata['class_names'] = names
  shown = Playground(weights)
  assert shown.about()['units'] is None
  found = shown.look(photograph())['found']
  assert (found['title'], found['picture'], len(found['rows'])) == ('Classes', None, 5)
  shares = [row['share'] for row in found['rows']]
  assert shares == sorted(shares, reverse=True)
  assert {row['label'] for row in found['rows']} < set(names)
  with pytest.raises(UserError, match='hivit_tiny does not reconstruct pixels'):
    shown.reconstruct(photograph())


def drawn_on_the_whole_picture(name: str, options: dict, title: str) -> list[dict]:
  """The rows of what a segmenter or detector finds in a picture of 40x70 pixels."""
  weights = state(name, **options)
  shown = Playground(weights).look(photograph(40, 70))
  assert decoded(shown['seen']).shape == (40, 70, 3)
  assert len(shown['levels']) == 4
  found = shown['found']
  assert found['title'] == title
  drawn = decoded(found['picture'])
  assert drawn.shape[1] / drawn.shape[0] == 70 / 40
  return found['rows']


def test_a_segmenter_colours_the_whole_picture():
  rows = drawn_on_the_whole_picture('segment_hivit_tiny', SEGMENTER, 'Classes of pixels')
  assert sum(row['share'] for row in rows) == pytest.approx(1)
  colours = class_lists.distinct_colours(SEGMENTER['num_classes'])
  assert [row['colour'] for row in rows] == [colours[int(row['label'])].tolist() for row in rows]


def test_a_detector_draws_what_it_finds_but_for_low_scores(monkeypatch):
  def detector(graphdef, task):
    mask = coco.encode(np.ones((40, 70), np.uint8))
    one = {'category_id': 1, 'bbox': [0.0, 0.0, 70.0, 40.0], 'segmentation': mask}
    return lambda params, image: [one | {'score': score} for score in (0.75, 0.25)]

  monkeypatch.setattr(predict_objects, 'Detector', detector)
  title = 'Objects with a score of at least 0.3'
  (row,) = drawn_on_the_whole_picture('detect_hivit_tiny', DETECTOR, title)
  assert (row['label'], row['share'], len(row['colour'])) == ('1', 0.75, 3)


def test_models_of_other_images_are_refused():
  with pytest.raises(UserError, match='is for images of 4 channels of uint8; this tool shows RGB'):
    Playground(state('hivit_tiny', **TINY | {'channels': 4, 'num_classes': 3}))
