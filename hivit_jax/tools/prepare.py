"""Prepares a data set as ArrayRecord files in the TFDS layout.

  python -m hivit_jax.tools.prepare imagenet2012 --train_tar=... --val_tar=... [--data_dir=...]
  python -m hivit_jax.tools.prepare imagenet2012 --source_dir=FOLDER [--data_dir=...]
  python -m hivit_jax.tools.prepare ade20k --archive=ADEChallengeData2016.zip|--source_dir=FOLDER
  python -m hivit_jax.tools.prepare coco --train_zip=... --val_zip=... --annotations_zip=...
  python -m hivit_jax.tools.prepare coco --source_dir=FOLDER [--data_dir=...]
  python -m hivit_jax.tools.prepare photo_tiles|photo_scenes|digits [--data_dir=...]

You may stop or kill it at any time: the same command continues where it was.
"""

from absl import flags

from hivit_jax import cli
from hivit_jax.errors import Stopped, UserError, suggest
from hivit_jax.reporting.console import setup_logging

_DATA_DIR = flags.DEFINE_string(
  'data_dir', None, 'Folder of prepared data sets; default: TFDS_DATA_DIR or ~/tensorflow_datasets.'
)
_TARS = (
  flags.DEFINE_string('train_tar', None, 'ILSVRC2012_img_train.tar, a tar of 1000 tars.'),
  flags.DEFINE_string('val_tar', None, 'ILSVRC2012_img_val.tar. One of the two tars is enough.'),
)
_ARCHIVE = flags.DEFINE_string('archive', None, 'ADEChallengeData2016.zip.')
_ZIPS = (
  flags.DEFINE_string('train_zip', None, 'train2017.zip of COCO.'),
  flags.DEFINE_string('val_zip', None, 'val2017.zip of COCO. One of the two zips is enough.'),
  flags.DEFINE_string('annotations_zip', None, 'annotations_trainval2017.zip of COCO.'),
)
_SHARED = (
  flags.DEFINE_string(
    'source_dir',
    None,
    'Folder with train/<synset>/*.JPEG, val/<synset>/*.JPEG or val/*.JPEG; of ade20k: with images/ '
    'and annotations/; of coco: with train2017/, val2017/ and annotations/.',
  ),
  flags.DEFINE_bool('allow_other_counts', False, 'Accept a part of the data set.'),
  flags.DEFINE_integer('examples_per_shard', None, 'Images per file, roughly; default 2500.'),
)
_FLAGS_OF = {
  'imagenet2012': (*_TARS, *_SHARED),
  'ade20k': (_ARCHIVE, *_SHARED),
  'coco': (*_ZIPS, *_SHARED),
}


def main(argv: list[str]) -> None:
  # Imported here: --help and a mistyped flag answer at once.
  from hivit_jax.data import builders
  from hivit_jax.data.builders.ade20k import Ade20k
  from hivit_jax.data.builders.coco import Coco
  from hivit_jax.data.builders.imagenet import ImageNet2012

  known = {'imagenet2012': ImageNet2012, 'ade20k': Ade20k, 'coco': Coco, **builders.EMBEDDED}
  if len(argv) != 2 or argv[1] not in known:
    given = ' '.join(argv[1:])
    raise UserError(
      f'cannot prepare "{given}"{suggest(given, known)}; name one of: {", ".join(known)} (other '
      'data sets of TFDS: docs/guide/data.md)'
    )
  options = {}
  takes = {name: [flag.name for flag in own] for name, own in _FLAGS_OF.items()}
  for flag in (*_TARS, _ARCHIVE, *_ZIPS, *_SHARED):
    if flag.name in takes.get(argv[1], ()):
      options[flag.name] = flag.value
    elif flag.present:
      fitting = ', '.join(name for name, own in takes.items() if flag.name in own)
      raise UserError(f'--{flag.name} is for {fitting} only, not for {argv[1]}')
  setup_logging()
  try:
    builder = known[argv[1]](data_dir=_DATA_DIR.value, **options)
    was_ready = builder.is_ready()
    builder.download_and_prepare()
  except OSError as error:  # a disk that is full, or a file that may not be read
    raise UserError(f'{argv[1]}: {error}; fix that, then the same command continues') from error
  except KeyboardInterrupt:
    raise Stopped('stopped; the same command continues from here') from None
  counts = ', '.join(f'{s}: {info.num_examples} images' for s, info in builder.info.splits.items())
  state = 'was prepared before' if was_ready else 'is prepared'
  print(f'{argv[1]} {state} in {builder.data_dir} ({counts})')


if __name__ == '__main__':
  cli.run(main)
