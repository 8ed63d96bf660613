"""Recipes: what the published runs, and those derived from them, change in `base.py`.

Rates are per 256 images of a batch: 2.5e-4 at a batch of 1024 is the paper's 1e-3. Where each
number comes from is in docs/results/reproduce.md.
"""

import ml_collections

from hivit_jax.configs import base
from hivit_jax.configs.variants import debug, unknown, with_variant

# Model -> settings of its finetuning. Of HiViT only B is published: T and S have B's recipe with
# less drop path, L has MAE's of ViT-L.
_FINETUNING = {
  'hivit_tiny': {'drop_path': 0.1, 'lr': 5e-4, 'layer_decay': 0.85, 'epochs': 100, 'group': 64},
  'hivit_small': {'drop_path': 0.1, 'lr': 5e-4, 'layer_decay': 0.85, 'epochs': 100, 'group': 64},
  'hivit_base': {'drop_path': 0.2, 'lr': 5e-4, 'layer_decay': 0.85, 'epochs': 100, 'group': 64},
  'hivit_large': {'drop_path': 0.2, 'lr': 1e-3, 'layer_decay': 0.84, 'epochs': 50, 'group': 64},
  'vit_base': {'drop_path': 0.1, 'lr': 5e-4, 'layer_decay': 0.65, 'epochs': 100, 'group': 32},
  'vit_large': {'drop_path': 0.2, 'lr': 1e-3, 'layer_decay': 0.75, 'epochs': 50, 'group': 32},
}

# Model -> settings of its supervised training, with the images that share a draw of mixup: those
# of one GPU and accumulation step. The ladder from Swin-B to HiViT-B has Swin-B's recipe.
_SUPERVISED = {
  'hivit_tiny': {'drop_path': 0.05, 'clip': None, 'group': 128},
  'hivit_small': {'drop_path': 0.3, 'clip': None, 'group': 128},
  'hivit_base': {'drop_path': 0.5, 'clip': None, 'group': 128},
  'vit_base': {'drop_path': 0.1, 'clip': None, 'group': 128},  # not published: HiViT-B's recipe
  'swin_tiny': {'drop_path': 0.2, 'clip': 5.0, 'group': 128},
  'swin_small': {'drop_path': 0.3, 'clip': 5.0, 'group': 128},
  'swin_base': {'drop_path': 0.5, 'clip': 5.0, 'group': 64},
  'swin_base_three_stages': {'drop_path': 0.5, 'clip': 5.0, 'group': 64},
  'swin_base_global': {'drop_path': 0.5, 'clip': 5.0, 'group': 64},
  'swin_base_mlp_stem': {'drop_path': 0.5, 'clip': 5.0, 'group': 64},
}

# Model -> settings of its segmenter, with crops of 512 and 160 000 steps of 16; from
# mmsegmentation's configs/mae/mae-base_upernet_8xb2-amp-160k_ade20k-512x512.py and
# configs/swin/swin-base-patch4-window7-in1k-pre_upernet_8xb2-160k_ade20k-512x512.py.
_SEGMENTATION_BASELINES = {
  'vit_base': {'init': 'mae_vit_b', 'head': 768, 'drop_path': 0.1, 'lr': 1e-4, 'layer_decay': 0.65,
               'weight_decay': 0.05},
  'swin_base': {'init': 'supervised_swin_b', 'head': 512, 'drop_path': 0.3, 'lr': 6e-5,
                'layer_decay': None, 'weight_decay': 0.01},
}  # fmt: skip

# Model -> drop path and layer decay of its detector; ViT's are ViTDet's (arXiv 2203.16527), Swin's
# those of the official Cascade Mask R-CNN, see configs/detect_swin_b.py.
_DETECTION = {
  'hivit_tiny': (0.1, 0.9),
  'hivit_small': (0.1, 0.9),
  'hivit_base': (0.2, 0.9),
  'vit_base': (0.1, 0.7),
  'swin_base': (0.3, None),
}


def mae(model: str, variant: str | None = None) -> ml_collections.ConfigDict:
  """MAE pretraining: HiViT of arXiv 2205.14949, ViT of arXiv 2111.06377.

  Args:
    model: a HiViT or ViT, such as hivit_base.
    variant: epochs ('300', '800', '1600'), 'debug', or None for 300 epochs.
  """
  config = base.get_config()
  config.model.update(name=f'mae_{model}', mask_ratio=0.75, norm_pix_loss=True)
  if model.startswith('hivit'):
    config.model.hifeat = True
  config.batch_size = 4096
  config.optim.base_lr = 1.5e-4 if model.startswith('vit') or model == 'hivit_large' else 1e-4
  config.optim.update(warmup_epochs=40.0, b2=0.95, weight_decay=0.05)
  return with_variant(config, variant, '300', '800', '1600')


def continue_mae(model: str, variant: str | None = None) -> ml_collections.ConfigDict:
  """MAE pretraining from given weights on 1 000 to 50 000 images. Ours; nobody has published one.

  Half of the published rate, a batch that few images fill, and about as many steps for any number
  of images. What is measured needs no labels.

  Args:
    model: a HiViT, such as hivit_base.
    variant: epochs ('400', '100', '1600'), 'debug', or None for 400 epochs.
  """
  config = mae(model)
  config.batch_size = 256
  config.optim.base_lr = 5e-5
  config.checkpoint.update(every_epochs=20.0, keep_every_epochs=0.0)
  config.log_every_steps = 20
  config.knn.every_epochs = 0.0
  config.rankme.every_epochs = 20.0
  config = with_variant(config, variant, '400', '100', '1600')
  if variant != 'debug':
    config.optim.warmup_epochs = config.epochs / 20
  return config


def simmim(model: str, variant: str | None = None) -> ml_collections.ConfigDict:
  """SimMIM pretraining (arXiv 2111.09886), with windows of 6 at 192 pixels.

  The two lengths are two recipes: 800 epochs with one step of the rate, 100 with a cosine.

  Args:
    model: a Swin, such as swin_base.
    variant: epochs ('100', '800'), 'debug', or None for 800 epochs.
  """
  config = base.get_config()
  config.task = 'simmim'
  config.model.update(name=f'simmim_{model}', mask_ratio=0.6, window_size=6)
  config.image_size = (192, 192)
  config.augment.update(crop_scale=(0.67, 1.0), interpolation='bilinear')
  config.batch_size = 2048
  config.optim.update(warmup_epochs=10.0, b2=0.999, clip_norm=5.0)
  if variant == '100':  # 8e-4, 4e-5 and 4e-6
    config.optim.update(base_lr=1e-4, base_end_lr=5e-6, base_warmup_start_lr=5e-7)
    config.optim.warmup_prefix = False
  else:  # 4e-4 and 2e-6
    config.optim.update(base_lr=5e-5, base_warmup_start_lr=2.5e-7)
    config.optim.update(schedule='step', milestones=(700.0,))
  return with_variant(config, variant, '800', '100')


def classify(model: str, *, augment: bool = True) -> ml_collections.ConfigDict:
  """What supervised training and finetuning share.

  Args:
    model: a classifier, such as hivit_base.
    augment: with the published augmentation, which is for large data and long training.
  """
  config = base.get_config()
  config.task = 'classify'
  config.model.name = model
  config.batch_size = 1024
  if augment:
    config.augment.update(crop_scale=(0.08, 1.0), rand_augment='rand-m9-mstd0.5-inc1', erase=0.25)
    config.augment.update(mixup=0.8, cutmix=1.0, label_smoothing=0.1)
  config.optim.b2 = 0.999
  config.checkpoint.keep_every_epochs = 0.0
  config.knn.every_epochs = 0.0
  return config


def supervised(model: str, variant: str | None = None) -> ml_collections.ConfigDict:
  """Training from scratch: Table 2 of arXiv 2205.14949, and the recipe of Swin, which it follows.

  The Swin recipe is that of the code behind the published weights: since October 2022 its cosine
  starts after the warmup (`config.optim.warmup_prefix`).

  Args:
    model: a classifier in the table above.
    variant: 'debug' or None.
  """
  config = classify(model)
  numbers = _SUPERVISED[model]
  config.model.drop_path_rate = numbers['drop_path']
  config.augment.mix_group = numbers['group']
  config.epochs = 300.0
  # 1e-3, 1e-5 and 1e-6
  config.optim.update(base_lr=2.5e-4, base_end_lr=2.5e-6, base_warmup_start_lr=2.5e-7)
  config.optim.update(warmup_epochs=20.0, warmup_prefix=False, clip_norm=numbers['clip'])
  return with_variant(config, variant)


def finetune(model: str, variant: str | None = None) -> ml_collections.ConfigDict:
  """Finetuning after MAE, by default from the weights that `mae_*.py` left.

  Args:
    model: a classifier in the table above.
    variant: 'debug' or None.
  """
  config = classify(model)
  numbers = _FINETUNING[model]
  config.init = f'workdirs/mae_{_short(model)}'
  config.model.update(drop_path_rate=numbers['drop_path'], head_std=2e-5)
  config.augment.mix_group = numbers['group']
  config.epochs = float(numbers['epochs'])
  config.optim.update(base_lr=numbers['lr'], end_lr=1e-6, warmup_epochs=5.0)
  config.optim.layer_decay = numbers['layer_decay']
  return with_variant(config, variant)


def finetune_simmim(model: str, variant: str | None = None) -> ml_collections.ConfigDict:
  """Finetuning at 224 pixels, by default from the weights that `simmim_*.py` left.

  Args:
    model: a Swin, such as swin_base.
    variant: epochs of the pretraining ('100', '800'), 'debug', or None for 800 epochs.
  """
  config = classify(model)
  config.init = f'workdirs/simmim_{_short(model)}'
  config.augment.mix_group = 128
  config.model.drop_path_rate = 0.1
  config.batch_size = 2048
  # 5e-3, 1e-6 and 1e-6: layers differ in their peak alone.
  config.optim.update(base_lr=6.25e-4, base_end_lr=1.25e-7, base_warmup_start_lr=1.25e-7)
  config.optim.update(warmup_epochs=20.0, warmup_prefix=False, clip_norm=5.0)
  config.optim.update(layer_decay=0.9 if variant == '100' else 0.8, layer_decay_of='peak')
  config = with_variant(config, variant, '800', '100')
  if variant != 'debug':
    config.epochs = 100.0  # after pretraining of any length
    config.init += f'_{variant}' if variant else ''  # a pretraining's workdir has its variant
  return config


def segment(model: str, variant: str | None = None) -> ml_collections.ConfigDict:
  """UPerNet on ADE20K, by default from the weights that `finetune_*.py` left.

  The numbers are those of the published HiViT-B: crops of 640, 80 000 steps of 32 images. With 512,
  twice as many steps of half as many images, as in the other recipes of mmsegmentation; HiViT was
  not published so, and its rate is halved with the batch. ViT and Swin have their own numbers,
  in the table above. `linear` starts from pretraining, with an optimizer of our own choice.

  Args:
    model: a HiViT, ViT or Swin, such as hivit_base.
    variant: '512' (HiViT alone), 'linear', 'debug' or None.
  """
  config = base.get_config()
  baseline = _SEGMENTATION_BASELINES.get(model)
  known = ('linear', 'debug') if baseline else ('512', 'linear', 'debug')
  if variant and variant not in known:
    raise unknown(variant, *known)
  config.task = 'segment'
  config.init = f'workdirs/finetune_{_short(model)}'
  config.model.update(name=f'segment_{model}', drop_path_rate=0.1)
  config.data.update(name='ade20k', train_split='train', eval_split='validation')
  config.image_size = (640, 640)
  config.batch_size = 32
  config.steps = 80_000
  config.segment.reduce_zero_label = True
  config.optim.update(lr=1e-3, warmup_start_lr=1e-9, warmup_steps=750, schedule='poly', b2=0.999)
  config.optim.layer_decay = 0.75
  if model.startswith('swin'):
    config.model.window_size = 8  # instead of 7: divides all maps
  if variant == 'linear':
    _linear_pixels(config, model)
  elif baseline:
    config.init = f'workdirs/{baseline["init"]}'
    config.model.update(head_channels=baseline['head'], drop_path_rate=baseline['drop_path'])
    _crops_of_512(config, steps=160_000, lr=baseline['lr'])
    config.optim.update({key: baseline[key] for key in ('layer_decay', 'weight_decay')})
  elif variant == '512':
    _crops_of_512(config, steps=160_000, lr=5e-4)
  config.checkpoint.keep_every_epochs = 0.0
  config.evaluation.update(every_epochs=12.5, batch_size=16)  # about 8000 steps of 32
  config.knn.every_epochs = 0.0
  config.pictures.every_epochs = 12.5
  return debug(config) if variant == 'debug' else config


def _linear_pixels(config: ml_collections.ConfigDict, model: str) -> None:
  """A linear classifier on what pretraining left; HiViT's fourth level is its third, pooled."""
  config.task = 'segment_linear'
  config.init = f'workdirs/{"simmim" if model.startswith("swin") else "mae"}_{_short(model)}'
  levels = (1, 2, 3) if model.startswith('hivit') else (1, 2, 3, 4)
  config.model.update(drop_path_rate=0.0, linear_levels=levels)
  _crops_of_512(config, steps=40_000, lr=1e-3)
  config.optim.update(weight_decay=1e-4, layer_decay=None)


def _crops_of_512(config: ml_collections.ConfigDict, *, steps: int, lr: float) -> None:
  config.image_size = (512, 512)
  config.batch_size = 16
  config.steps = steps
  config.segment.update(scale=(2048, 512), stride=(341, 341))
  config.optim.update(lr=lr, warmup_start_lr=1e-6 * lr, warmup_steps=1500)


def linear(model: str, variant: str | None = None) -> ml_collections.ConfigDict:
  """Linear probe after MAE: the recipe of arXiv 2111.06377.

  Args:
    model: a classifier, such as hivit_base.
    variant: 'debug' or None.
  """
  config = base.get_config()
  config.task = 'linear'
  config.init = f'workdirs/mae_{_short(model)}'
  config.model.update(name=model, head_std=0.01, head_batch_norm=True)
  config.epochs = 90.0
  config.batch_size = 16384
  config.augment.update(crop_scale=(0.08, 1.0), crop_clamp=True)
  config.optim.update(name='lars', base_lr=0.1, weight_decay=0.0, warmup_epochs=10.0)
  config.checkpoint.keep_every_epochs = 0.0
  config.knn.every_epochs = 0.0
  return with_variant(config, variant)


def detect(model: str, variant: str | None = None) -> ml_collections.ConfigDict:
  """Mask R-CNN on COCO, 36 epochs ("3x") of DETR's augmentation, after MAE.

  Only HiViT-B is published; the others use its recipe, except for the numbers in the table above.
  A batch is on one of eight canvases; the official runs pad each pair of images to its own.

  Args:
    model: a HiViT, ViT or Swin, such as hivit_base.
    variant: 'cascade' (arXiv 1712.00726), 'lsj' (ViTDet's recipe; not for Swin, whose windows do
      not divide its canvas), 'debug' or None.
  """
  config = base.get_config()
  drop_path, layer_decay = _DETECTION[model]
  config.task = 'detect'
  config.init = f'workdirs/mae_{_short(model)}'
  config.model.update(name=f'detect_{model}', drop_path_rate=drop_path)
  config.data.update(name='coco', eval_split='validation')
  config.image_size = (1344, 1344)  # for data whose sizes are not known before they are read
  config.detect.buckets = _and_upright((544, 832), (672, 1024), (800, 1088), (800, 1344))
  config.detect.eval_buckets = _and_upright((800, 1088), (800, 1216), (800, 1344))
  config.epochs = 36.0
  config.batch_size = 16
  config.optim.update(lr=1e-4, warmup_start_lr=1e-7, warmup_epochs=0.0, warmup_steps=500, b2=0.999)
  config.optim.update(schedule='step', milestones=(27.0, 33.0))
  config.optim.layer_decay = layer_decay
  config.evaluation.batch_size = 16
  config.checkpoint.keep_every_epochs = 0.0
  config.knn.every_epochs = 0.0
  if variant == 'cascade':
    config.model.cascade = True
  elif variant == 'lsj' and not model.startswith('swin'):
    _large_scale_jitter(config)
  elif variant and variant != 'debug':
    raise unknown(variant, 'cascade', *(() if model.startswith('swin') else ('lsj',)), 'debug')
  return debug(config) if variant == 'debug' else config


def _large_scale_jitter(config: ml_collections.ConfigDict) -> None:
  """ViTDet's recipe for B (arXiv 2203.16527, and detectron2's mask_rcnn_vitdet_b_100ep.py)."""
  config.image_size = (1024, 1024)
  config.detect.update(scale_jitter=(0.1, 2.0), buckets=(), eval_buckets=())
  config.detect.update(eval_short_side=1024, long_side=1024)
  config.model.drop_path_rate = 0.1
  config.batch_size = 64
  config.steps = 184_375  # 100 epochs of 118 000 images
  config.optim.update(weight_decay=0.1, layer_decay=0.7, warmup_steps=250)
  config.optim.milestones = (163_889, 177_546)


def _and_upright(*wide: tuple[int, int]) -> tuple[tuple[int, int], ...]:
  """Canvases (height, width), and the same with their sides exchanged."""
  return (*wide, *((width, height) for height, width in wide))


def _short(model: str) -> str:
  """hivit_base -> hivit_b, as the files and their workdirs are named."""
  family, size = model.split('_')
  return f'{family}_{size[0]}'
