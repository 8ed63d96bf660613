"""Data sets on disk in the TFDS layout, read from ArrayRecord files without TensorFlow."""

import dataclasses
import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from array_record.python.array_record_data_source import ArrayRecordDataSource
from tensorflow_datasets.core import dataset_builder
from tensorflow_datasets.core.utils import file_utils, version
from tensorflow_datasets.proto import tf_example_pb2

from hivit_jax.data.sources import splits
from hivit_jax.data.sources.tensors import StoredArray, is_image
from hivit_jax.errors import UserError

INFO_FILE = 'dataset_info.json'
SCENES_FILE = 'scenes-{split}.npy'  # beside it, for `base.Source.scenes`
LABEL_MAPS = ('segmentation', 'segmentation_mask', 'segmentation_label', 'annotation')
_NAME = re.compile(r'(?P<name>\w+)(/(?P<config>[\w.\-]+))?(:(?P<version>[\d*]+\.[\d*]+\.[\d*]+))?')


@dataclasses.dataclass(frozen=True)
class DatasetName:
  """The parts of `name`, `name/config`, `name:1.0.0` or `name/config:1.*.*`."""

  name: str
  config: str | None = None
  version: str | None = None

  @classmethod
  def parse(cls, text: str) -> 'DatasetName':
    """Parses the name of a data set; raises UserError if it is none."""
    match = _NAME.fullmatch(text)
    if not match:
      raise UserError(
        f'{text!r} is not the name of a data set; write a TFDS name such as imagenet2012, '
        'cifar10:3.0.2 or name/config:1.0.0, folder:/path/to/root, coco:/path/to/root, or '
        'package.module:Name'
      )
    return cls(match['name'], match['config'], match['version'])

  def __str__(self) -> str:
    config = f'/{self.config}' if self.config else ''
    return self.name + config + (f':{self.version}' if self.version else '')


@dataclasses.dataclass(slots=True)
class _ShardRange:
  """Records [skip, skip + take) of one file, in the form that ArrayRecordDataSource reads."""

  filename: str
  skip: int
  take: int
  examples_in_shard: int


def data_dirs(data_dir: str | os.PathLike | None) -> list[Path]:
  """Returns the folders to look in: the one given, or TFDS's defaults (TFDS_DATA_DIR)."""
  return [Path(folder).expanduser() for folder in file_utils.list_data_dirs(data_dir)]


def file_formats(folder: Path) -> set[str]:
  """Returns the formats of the prepared data set in `folder`; empty if there is none."""
  try:
    info = json.loads((folder / INFO_FILE).read_text())
  except (FileNotFoundError, NotADirectoryError):
    return set()
  except (OSError, ValueError) as error:
    raise UserError(f'cannot read {folder / INFO_FILE}: {error}') from None
  return {info.get('fileFormat', 'tfrecord'), *info.get('alternativeFileFormats', [])}


def find_prepared(wanted: DatasetName, data_dir: str | os.PathLike | None) -> Path | None:
  """Finds a data set that TFDS or our builders prepared.

  Args:
    wanted: the data set; without a version, the highest one is taken.
    data_dir: folder to look in; None for TFDS's defaults.

  Returns:
    The folder with its files in ArrayRecord, or None if the set is not there in any format.

  Raises:
    UserError: if it is there as TFRecord only, or in several configs of which none was named.
  """
  unusable = []
  for root in data_dirs(data_dir):
    base = root / wanted.name
    if wanted.config:
      base /= wanted.config
    elif not version.list_all_versions(base):
      base = _only_config(wanted, base)
    for number in reversed(version.list_all_versions(base)):
      if wanted.version and not number.match(wanted.version):
        continue
      formats = file_formats(base / str(number))
      if 'array_record' in formats:
        return base / str(number)
      if formats:
        unusable.append((base / str(number), formats))
  if unusable:
    folder, formats = unusable[0]
    raise UserError(
      f'{wanted} in {folder} is stored as {"/".join(sorted(formats))}, which has no random '
      'access without TensorFlow; prepare it as ArrayRecord in another folder and give that one as '
      f'--config.data.data_dir: {preparation(wanted, "/path/to/other/folder")}'
    )
  return None


def _only_config(wanted: DatasetName, base: Path) -> Path:
  """Returns the folder of the config to read when none was named."""
  if not base.is_dir():
    return base
  configs = sorted(c.name for c in base.iterdir() if version.list_all_versions(c))
  default = dataset_builder.load_default_config_name(tfds.core.Path(base))
  if default in configs:
    return base / default
  if len(configs) > 1:
    names = ', '.join(f'{wanted.name}/{config}' for config in configs)
    raise UserError(f'{wanted.name} is prepared in several configs; name one: {names}')
  return base / configs[0] if configs else base


def preparation(wanted: DatasetName, folder: str | os.PathLike) -> str:
  """Returns the commands that prepare a data set of TFDS, which is not embedded, in `folder`."""
  if wanted.name == 'imagenet2012':
    return (
      'python -m hivit_jax.tools.prepare imagenet2012 --train_tar=ILSVRC2012_img_train.tar '
      f'--val_tar=ILSVRC2012_img_val.tar --data_dir={folder} (the files are on image-net.org '
      'after a free registration; --source_dir=... takes extracted folders instead)'
    )
  if wanted.name == 'ade20k':
    return (
      'python -m hivit_jax.tools.prepare ade20k --archive=ADEChallengeData2016.zip '
      f'--data_dir={folder} (from http://sceneparsing.csail.mit.edu; --source_dir=... takes the '
      'extracted folder instead)'
    )
  if wanted.name == 'coco':
    return (
      'python -m hivit_jax.tools.prepare coco --train_zip=train2017.zip --val_zip=val2017.zip '
      f'--annotations_zip=annotations_trainval2017.zip --data_dir={folder} (from '
      'https://cocodataset.org; --source_dir=... takes extracted folders instead)'
    )
  return (
    'pip install tensorflow tensorflow-datasets importlib-resources (in an environment of its '
    'own: only this step needs TensorFlow), then there: python -c "import tensorflow_datasets as '
    f"tfds; tfds.builder('{wanted}', data_dir='{folder}')"
    ".download_and_prepare(file_format='array_record')\""
  )


class TfdsSource:
  """One split of a prepared data set. Images stay encoded: decoding is the pipeline's work.

  Safe to read from several threads; cheap to pickle (files are opened again where it arrives).

  Attributes:
    name: the data set as the user named it.
    split: the split as the user gave it.
    class_names: names of the classes, by label.
    palette: uint8 (classes, 3), colours of the classes; None where the set has none.
    category_ids: ids of the classes in result files; None where the set has none.
    scenes: int32 (n, 3), see `base.Source`; None where the set does not have them.
  """

  def __init__(self, name: str, split: str, folder: Path):
    """Reads the description of the data set; opens no data file.

    Args:
      name: the data set, for messages.
      split: in the grammar of `splits.parse_split`.
      folder: as `find_prepared` gives it.

    Raises:
      UserError: for an unknown split, a missing file, or a set that has no image, or neither a
        label nor a label map.
    """
    self.name = name
    self.split = split
    try:
      info = tfds.builder_from_directory(folder, file_format='array_record').info
    except (OSError, ValueError) as error:
      reason = str(error).strip().splitlines()[0]
      raise UserError(f'{folder} has no readable description of a data set: {reason}') from None
    features: Any = info.features  # a FeaturesDict, which TFDS's annotations do not say
    self._object_keys = _object_keys(dict(features).get('objects'))
    maps = [key for key in LABEL_MAPS if key in features]
    self._map_key = next((m for m in maps if isinstance(features[m], tfds.features.Image)), None)
    self._image_key, self._label_key = _image_and_label(
      name, features, info.supervised_keys, needs_label=not (self._map_key or self._object_keys)
    )
    self._array = StoredArray.of(self._image_key, features[self._image_key])
    self._file_name_key = next((k for k in ('file_name', 'filename') if k in features), None)
    key = self._label_key or self._map_key
    named = features[key] if key else features['objects'].feature['classes']
    self.class_names = tuple(getattr(named, 'names', None) or ())
    palette = (info.metadata or {}).get('palette')
    self.category_ids = (info.metadata or {}).get('category_ids')
    self.palette = None if palette is None else np.array(palette, np.uint8)
    self._has_instances = isinstance(dict(features).get('instances'), tfds.features.Image)
    shapes = {'image_id': (), 'size': (2,)}
    self._facts = [key for key in shapes if _is_whole(dict(features).get(key), shapes[key])]
    sizes = {key: value.num_examples for key, value in info.splits.items()}
    self.scenes = _scenes(folder, splits.parse_split(name, split, sizes, sizes.__getitem__))
    ranges = [
      _ShardRange(os.fspath(r.filename), r.skip, r.take, r.examples_in_shard)
      for r in info.splits[split].file_instructions
    ]
    present = set(os.listdir(folder))
    missing = [r.filename for r in ranges if os.path.basename(r.filename) not in present]
    if missing:
      raise UserError(
        f'{name}: {len(missing)} of {len(ranges)} files of split {split!r} are missing, the first '
        f'is {missing[0]}; copy them again, or delete {folder} and prepare it again'
      )
    _allow_open_files(len(ranges))
    self._records = ArrayRecordDataSource(ranges)

  @property
  def num_classes(self) -> int:
    return len(self.class_names)

  def _features(self, index: int):
    if not 0 <= index < len(self):
      raise IndexError(f'{self.name}/{self.split} has {len(self)} examples, asked for {index}')
    example = tf_example_pb2.Example()  # pyright: ignore[reportAttributeAccessIssue]
    record = self._records[index]
    if not record:  # is all that array_record says
      raise OSError('empty record: its file was truncated while it was open')
    example.ParseFromString(record)
    return example.features.feature

  def __len__(self) -> int:
    return len(self._records)

  def __getitem__(self, index: int) -> dict:
    """Returns what there is of the keys of `base.Source`; images are encoded files, or arrays."""
    features = self._features(index)
    example: dict[str, Any] = {}
    if self._array is None:
      example['image'] = features[self._image_key].bytes_list.value[0]
    else:
      example['image'] = self._array.read(features)
    if self._label_key:
      example['label'] = features[self._label_key].int64_list.value[0]
    if self._map_key:
      example['segmentation'] = features[self._map_key].bytes_list.value[0]
    if self._has_instances:
      example['instances'] = features['instances'].bytes_list.value[0]
    if self._object_keys:
      example['objects'] = {key: _rows(features[f'objects/{key}']) for key in self._object_keys}
      example['objects']['boxes'] = example['objects']['boxes'].reshape(-1, 4)
    for key in self._facts:
      numbers = np.array(features[key].int64_list.value, np.int64)
      example[key] = numbers if len(numbers) > 1 else int(numbers[0])
    return example

  def example_name(self, index: int) -> str:
    """Returns `name/split[index]`, and the file name where the set has one."""
    name = f'{self.name}/{self.split}[{index}]'
    if self._file_name_key:
      file_name = self._features(index)[self._file_name_key].bytes_list.value[0]
      name += f' ({file_name.decode(errors="replace")})'
    return name


def _is_whole(feature: Any, shape: tuple[int, ...]) -> bool:
  """Whether a feature is integers of a shape."""
  if not isinstance(feature, tfds.features.Tensor) or feature.shape != shape:
    return False
  dtype: Any = feature.np_dtype
  return np.issubdtype(dtype, np.integer)


def _object_keys(feature: Any) -> tuple[str, ...]:
  """Names of what is known of each object, where boxes are in the form of ours."""
  if not isinstance(feature, tfds.features.Sequence) or 'boxes' not in feature:
    return ()
  objects: Any = feature.feature
  return tuple(sorted(objects))


def _scenes(folder: Path, parts: list[tuple[str, int, int]]) -> np.ndarray | None:
  """What is known of all examples of some parts of splits, if it is known."""
  paths = [folder / SCENES_FILE.format(split=name) for name, _, _ in parts]
  if not all(path.exists() for path in paths):
    return None
  known = zip(paths, parts, strict=True)
  return np.concatenate([np.load(path)[start:stop] for path, (_, start, stop) in known])


def _rows(feature: Any) -> Any:
  """What a feature has for each object: bytes, or numbers as float32 or int64."""
  if feature.WhichOneof('kind') == 'bytes_list':
    return list(feature.bytes_list.value)
  if feature.WhichOneof('kind') == 'int64_list':
    return np.array(feature.int64_list.value, np.int64)
  return np.array(feature.float_list.value, np.float32)


def _image_and_label(
  name: str, features: Any, supervised_keys: Any, *, needs_label: bool
) -> tuple[str, str | None]:
  """Returns the keys of the image and of its class."""
  keys: list = list(supervised_keys or ())[:2]
  if len(keys) < 2 or not all(isinstance(key, str) and key in features for key in keys):
    keys = [None, None]

  def find(fits: Callable[[Any], bool], usual: str, supervised: str | None) -> str | None:
    found = [k for k, v in features.items() if fits(v) and supervised in (None, k)]
    return usual if usual in found else found[0] if len(found) == 1 else None

  def encoded(feature: Any) -> bool:
    return isinstance(feature, tfds.features.Image)

  image = find(encoded, 'image', keys[0]) or find(is_image, 'image', keys[0])
  label = find(lambda v: isinstance(v, tfds.features.ClassLabel), 'label', keys[1])
  if image and (label or not needs_label):
    return image, label
  listing = ', '.join(f'{key} ({type(value).__name__})' for key, value in features.items())
  raise UserError(
    f'{name} is not an image classification data set: it needs one Image, or one Tensor of '
    '(height, width, channels), and one ClassLabel, a '
    f'label map ({", ".join(LABEL_MAPS)}), or objects with boxes, and has {listing}'
  )


def _allow_open_files(count: int) -> None:
  """Raises the soft limit on open files, for child processes too: every shard stays open."""
  import resource

  soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
  wanted = count + 1024
  if soft != resource.RLIM_INFINITY and soft < wanted:
    allowed = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, allowed), hard))
