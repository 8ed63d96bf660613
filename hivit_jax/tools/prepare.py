"""Prepares a data set as ArrayRecord files in the TFDS layout.

  python -m hivit_jax.tools.prepare imagenet2012 --train_tar=... --val_tar=... [--data_dir=...]
  python -m hivit_jax.tools.prepare imagenet2012 --source_dir=FOLDER [--data_dir=...]
  python -m hivit_jax.tools.prepare photo_tiles|digits [--data_dir=...]

May be stopped or killed at any time: the same command goes on from there.
"""

from absl import flags

from hivit_jax import cli
from hivit_jax.errors import Stopped, UserError, suggest
from hivit_jax.reporting.console import setup_logging

_DATA_DIR = flags.DEFINE_string(
  'data_dir', None, 'Folder of prepared data sets; default: TFDS_DATA_DIR or ~/tensorflow_datasets.'
)
_IMAGENET_FLAGS = (
  flags.DEFINE_string('train_tar', None, 'ILSVRC2012_img_train.tar, a tar of 1000 tars.'),
  flags.DEFINE_string('val_tar', None, 'ILSVRC2012_img_val.tar. One of the two tars is enough.'),
  flags.DEFINE_string(
    'source_dir', None, 'Folder with train/<synset>/*.JPEG, val/<synset>/*.JPEG or val/*.JPEG.'
  ),
  flags.DEFINE_bool('allow_other_counts', False, 'Take a part of ImageNet, too.'),
  flags.DEFINE_integer('examples_per_shard', None, 'About how many images a file; default 2500.'),
)


def main(argv: list[str]) -> None:
  # Imported here: --help and a mistyped flag answer at once.
  from hivit_jax.data import builders
  from hivit_jax.data.builders.imagenet import ImageNet2012

  known = {'imagenet2012': ImageNet2012, **builders.EMBEDDED}
  if len(argv) != 2 or argv[1] not in known:
    given = ' '.join(argv[1:])
    raise UserError(
      f'cannot prepare "{given}"{suggest(given, known)}; name one of: {", ".join(known)} (other '
      'data sets of TFDS: docs/guide/data.md)'
    )
  options = {}
  for flag in _IMAGENET_FLAGS:
    if argv[1] == 'imagenet2012':
      options[flag.name] = flag.value
    elif flag.present:
      raise UserError(f'--{flag.name} is for imagenet2012 only, not for {argv[1]}')
  setup_logging()
  try:
    builder = known[argv[1]](data_dir=_DATA_DIR.value, **options)
    was_ready = builder.is_ready()
    builder.download_and_prepare()
  except OSError as error:  # a disk that is full, or a file that may not be read
    raise UserError(f'{argv[1]}: {error}; mend that, then the same command goes on') from error
  except KeyboardInterrupt:
    raise Stopped('stopped; the same command goes on from here') from None
  counts = ', '.join(f'{s}: {info.num_examples} images' for s, info in builder.info.splits.items())
  state = 'was prepared before' if was_ready else 'is prepared'
  print(f'{argv[1]} {state} in {builder.data_dir} ({counts})')


if __name__ == '__main__':
  cli.run(main)
