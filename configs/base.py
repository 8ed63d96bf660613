"""Every setting with its default. Nothing is read that is not here; recipes are in recipes.py."""

import ml_collections
from ml_collections import config_dict


def get_config() -> ml_collections.ConfigDict:
  """Returns the defaults; the files beside this one change what differs."""
  config = ml_collections.ConfigDict()

  config.seed = 0  # decides parameters, data order, augmentation, masks
  # What is trained. mae: masked autoencoding; simmim; classify; linear: train the last layer
  # alone; segment; segment_linear: train its head alone; detect; or one of your own,
  # package.module:Name. model.name, data.name and evaluators also accept such a name.
  config.task = 'mae'
  config.image_size = (224, 224)  # (height, width) in pixels, multiples of 16
  config.channels = 3  # of the images: 3 (RGB), 1 (greyscale), or up to 64 as they are stored
  config.epochs = 300.0  # length of the run and of the learning rate's schedule
  config.steps = config_dict.placeholder(int)  # the same in steps; instead of epochs
  config.max_steps = config_dict.placeholder(int)  # end here; the schedule stays as it is

  # Any argument of the model's class; None means the named model's value.
  config.model = ml_collections.ConfigDict()
  config.model.name = config_dict.placeholder(str)  # see hivit_jax.list_models()
  config.model.embed_dim = config_dict.placeholder(int)  # channels; Swin: of the first stage
  config.model.depth = config_dict.placeholder(int)  # blocks of ViT
  config.model.depths = config_dict.placeholder(tuple)  # blocks of HiViT and Swin, stage by stage
  config.model.window_size = config_dict.placeholder(int)  # Swin: in patches; detectors: in units
  config.model.mlp_stages = config_dict.placeholder(int)  # first stages of Swin without attention
  config.model.num_heads = config_dict.placeholder(int)  # of every attention
  config.model.stem_blocks = config_dict.placeholder(tuple)  # MLPs of the first two stages (iTPN)
  config.model.rpe = config_dict.placeholder(bool)  # relative position bias
  config.model.layer_scale = config_dict.placeholder(float)  # initial (as in iTPN-CLIP); 0: none
  config.model.fpn_dim = config_dict.placeholder(int)  # channels of iTPN's pyramid
  config.model.fpn_depth = config_dict.placeholder(int)  # its blocks
  config.model.drop_path_rate = 0.0  # of the last block; rises linearly from 0
  config.model.num_classes = config_dict.placeholder(int)  # None: as many as the data set has
  config.model.head_std = config_dict.placeholder(float)  # of the weights of a head drawn anew
  config.model.head_batch_norm = config_dict.placeholder(bool)  # BatchNorm before it (linear probe)
  config.model.decoder_embed_dim = config_dict.placeholder(int)  # channels of MAE's decoder
  config.model.decoder_depth = config_dict.placeholder(int)  # its blocks
  config.model.decoder_num_heads = config_dict.placeholder(int)  # its heads
  config.model.mask_ratio = config_dict.placeholder(float)  # share of the units removed
  config.model.norm_pix_loss = config_dict.placeholder(bool)  # predict pixels normalised per unit
  config.model.target = config_dict.placeholder(str)  # pixels; saratrx, saratrx_v2: of SAR images
  config.model.hifeat = config_dict.placeholder(bool)  # decode from all three stages
  config.model.position_image_size = config_dict.placeholder(tuple)  # of segmenters' embeddings
  config.model.global_blocks = config_dict.placeholder(tuple)  # of detectors; others have windows
  config.model.neck_channels = config_dict.placeholder(int)  # of detectors' pyramid and heads
  config.model.hidden = config_dict.placeholder(int)  # of their box head
  config.model.cascade = config_dict.placeholder(bool)  # three box heads, one after the other
  config.model.anchor_scale = config_dict.placeholder(float)  # side of anchors, in strides: 8
  config.model.nms_pre = config_dict.placeholder(tuple)  # proposals a level: training, evaluation
  config.model.proposals = config_dict.placeholder(int)  # of an image
  config.model.detections = config_dict.placeholder(int)  # of an image
  config.model.candidates = config_dict.placeholder(int)  # boxes of all classes before the last NMS
  config.model.score_threshold = config_dict.placeholder(float)  # that a detection exceeds
  config.model.head_channels = config_dict.placeholder(int)  # of UPerNet
  config.model.auxiliary_channels = config_dict.placeholder(int)  # of its second head; 0: none
  # Levels of the encoder, 1 (finest) to 4, for a linear head instead of UPerNet.
  config.model.linear_levels = config_dict.placeholder(tuple)
  config.model.dropout_rate = config_dict.placeholder(float)  # before the classifiers of pixels
  config.model.dtype = 'auto'  # of computations: float32 or bfloat16; auto: float32 on CPUs
  config.model.attention = 'auto'  # on NVIDIA GPUs the fastest for each shape; cudnn; xla
  config.model.ops = 'fast'  # plain: by definition, to tell a kernel's fault from a model's
  config.model.remat = False  # recompute activations: less memory, about a third more time
  # HiViT and ViT: compile the main block once, not once a layer; slower on CPUs.
  config.model.scan = config_dict.placeholder(bool)

  config.init = config_dict.placeholder(str)  # to start from: a weight file, checkpoint, workdir
  config.init_ema = False  # use the averaged weights of init
  config.init_channels = 'repeat'  # what RGB weights become for other channels; or mean, copy

  config.data = ml_collections.ConfigDict()
  config.data.name = 'imagenet2012'  # a TFDS name, an embedded set, folder:/path, coco:/path
  config.data.data_dir = config_dict.placeholder(str)  # None: TFDS_DATA_DIR or TFDS's default
  config.data.train_split = 'train'  # may be cut: train[:90%]; see docs/guide/data.md
  config.data.eval_split = 'validation'  # for accuracies and pictures
  # Share of the sides that the central crop of an evaluation keeps; None: 7/8 up to 224 pixels.
  config.data.eval_crop = config_dict.placeholder(float)  # 1: the whole image
  config.data.dtype = 'uint8'  # of stored pixels; uint16: both scaled to [0, 1]; float32: not
  config.data.mean = (0.485, 0.456, 0.406)  # per channel, of scaled pixels; tools.statistics
  config.data.std = (0.229, 0.224, 0.225)  # the same
  # Threads and processes that decode; None: chosen from the numbers of cores and devices.
  config.data.num_threads = config_dict.placeholder(int)  # of each process that decodes
  config.data.num_workers = config_dict.placeholder(int)  # 0: threads of this process
  # Decode JPEGs at 1/2 or 1/4 where a training crop is much larger than the image size: faster for
  # large photographs, but not exactly the same pixels.
  config.data.reduce_jpegs = False  # True: see docs/guide/data.md
  config.data.max_broken_fraction = 0.01  # more unreadable images than this stop the run

  config.augment = ml_collections.ConfigDict()
  config.augment.crop_scale = (0.2, 1.0)  # RandomResizedCrop: range of the area's share
  config.augment.crop_ratio = (3 / 4, 4 / 3)  # range of the crop's width / height
  config.augment.crop_clamp = False  # cut a crop that does not fit: no second draw (probes)
  config.augment.interpolation = 'bicubic'  # of the crop, or bilinear; RandAugment: always bicubic
  config.augment.flip = True  # mirror every second image
  config.augment.rand_augment = config_dict.placeholder(str)  # rand-m9-mstd0.5-inc1; None: off
  config.augment.color_jitter = 0.0  # of brightness, contrast, saturation; not with RandAugment
  # The rest is for classification, and happens on the device.

  config.augment.erase = 0.0  # share of the images with a rectangle of noise
  config.augment.mixup = 0.0  # alpha; 0: off
  config.augment.cutmix = 0.0  # alpha; 0: off
  config.augment.switch_probability = 0.5  # probability of cutmix where mixup is on, too
  # Consecutive images of a batch that share one draw of mixup or cutmix and are mixed together.
  config.augment.mix_group = config_dict.placeholder(int)  # None or 0: the whole batch
  config.augment.label_smoothing = 0.0  # share of the target spread over all classes

  config.segment = ml_collections.ConfigDict()  # of semantic segmentation
  # Training images are resized to fit into this many pixels, times a random ratio, and cropped.
  config.segment.scale = (2560, 640)  # the longer and the shorter side
  config.segment.ratios = (0.5, 2.0)  # the smallest and the largest
  config.segment.max_share = 0.75  # of one class in a crop; if it has more, another is drawn
  config.segment.photometric = True  # change brightness, contrast, saturation and hue
  config.segment.ignore_index = 255  # label of pixels that do not count
  config.segment.reduce_zero_label = False  # 0 is no class, and class c is stored as c + 1 (ADE20K)
  config.segment.mean_over = 'all'  # the loss is a mean over all pixels; or over labelled ones
  config.segment.class_weights = ()  # one a class, of its pixels in the loss; none: 1
  config.segment.auxiliary_weight = 0.4  # of the second head's loss
  config.segment.inference = 'slide'  # windows cover the image; whole: it is fitted into one crop
  config.segment.stride = (426, 426)  # pixels from one window to the next
  config.segment.scales = (1.0,)  # of the evaluated image, relative to the crop; they are averaged
  config.segment.mirrored = False  # evaluate each of them mirrored, too

  config.detect = ml_collections.ConfigDict()  # of detection, on a canvas of image_size
  config.detect.short_sides = tuple(range(480, 801, 32))  # of training images at most: one of them
  config.detect.long_side = 1333  # of all images at most
  config.detect.crop_first = (400, 500, 600)  # every second image: to one of these, then cropped
  config.detect.crop_sides = (384, 600)  # least and most of a crop's sides
  # Large-scale jitter instead: images are resized to fit a square image_size times a random factor
  # between two numbers, such as (0.1, 2.0), and cut to it.
  config.detect.scale_jitter = ()  # none: the settings above
  config.detect.eval_short_side = 800  # of evaluation images at most
  # Canvases (height, width) instead of image_size, where the sizes of images are known before they
  # are read (COCO): a batch is on the smallest that its images fit on.
  config.detect.buckets = ()  # none: image_size
  config.detect.eval_buckets = ()  # the same in evaluations
  config.detect.objects = 100  # of an image at most
  config.detect.anchors = 256  # of an image that the proposals learn from
  config.detect.rois = 512  # of an image that the heads learn from; masks: a quarter

  config.batch_size = 4096  # over all devices and hosts
  config.accumulate_steps = 1  # parts in which a batch is computed, one after the other

  config.optim = ml_collections.ConfigDict()
  config.optim.name = 'adamw'  # or lars
  config.optim.base_lr = 1e-4  # per 256 images of batch_size: lr = base_lr * batch_size / 256
  config.optim.lr = config_dict.placeholder(float)  # peak; instead of base_lr
  config.optim.base_end_lr = 0.0  # final rate of cosine and poly, per 256 images
  config.optim.end_lr = config_dict.placeholder(float)  # for any batch; instead of base_end_lr
  config.optim.base_warmup_start_lr = 0.0  # rate at the first step, per 256 images
  config.optim.warmup_start_lr = config_dict.placeholder(float)  # for any batch; replaces it
  config.optim.warmup_epochs = 40.0  # of linear rise, part of the run's length
  config.optim.warmup_steps = config_dict.placeholder(int)  # the same in steps; instead of epochs
  config.optim.schedule = 'cosine'  # poly: from step 0, scaled by the warmup (mmseg); step (mmdet)
  # Does the cosine start after the warmup? If not, it counts from epoch 0: the warmup hides its
  # beginning, and the rate drops where the warmup ends.
  config.optim.warmup_prefix = True  # False: as Swin, SimMIM and supervised HiViT
  config.optim.power = 1.0  # of poly: the share of the run that is left, to this power
  config.optim.milestones = ()  # of step: epochs, or steps of a run in steps, where the rate falls
  config.optim.milestone_factor = 0.1  # to this share, again at each of them
  config.optim.b1 = 0.9  # AdamW: decay of the mean of the gradients
  config.optim.b2 = 0.95  # AdamW: decay of the mean of their squares
  config.optim.eps = 1e-8  # epsilon of AdamW
  config.optim.momentum = 0.9  # momentum of LARS
  config.optim.layer_decay = config_dict.placeholder(float)  # of the rate, per block; None: 1
  config.optim.layer_decay_of = 'rate'  # scales the whole curve; peak: only the peak
  config.optim.weight_decay = 0.05  # times the learning rate; not for biases and LayerNorms
  config.optim.clip_norm = config_dict.placeholder(float)  # of the whole gradient; None: off

  config.ema_decay = config_dict.placeholder(float)  # of averaged parameters; None: no average

  config.mesh = ml_collections.ConfigDict()
  config.mesh.data = -1  # devices that split the batch; -1: all of them, divided by fsdp
  config.mesh.fsdp = 1  # devices that share one copy of parameters, optimizer state and average

  config.checkpoint = ml_collections.ConfigDict()
  config.checkpoint.every_epochs = 1.0  # epochs between checkpoints; 0: only at the end
  config.checkpoint.keep_last = 2  # number of newest checkpoints that are kept
  config.checkpoint.keep_every_epochs = 100.0  # and one in so many is kept for good; 0: none
  # And the best by an evaluation, eval/top1:max or eval/loss:min; --config.init=WORKDIR/best.
  config.checkpoint.keep_best = config_dict.placeholder(str)  # None: no best is kept

  config.log_every_steps = 50  # steps between rows of metrics, which are means since the last row
  # Where metrics go besides metrics.jsonl: tensorboard, wandb, mlflow, or package.module:Name;
  # several: wandb,mlflow.
  config.trackers = ('tensorboard',)

  config.evaluation = ml_collections.ConfigDict()  # of classifiers on the evaluation set
  config.evaluation.every_epochs = 1.0  # 0: never
  config.evaluation.batch_size = 256  # images over all devices; also for the k-NN accuracy
  # Further sets, such as v2=test@imagenet_v2,old=validation: splits of a data set or of data.name
  config.evaluation.more = ''  # with metrics eval_v2/top1 ...

  config.evaluators = ''  # more of them, of your own: package.module:Name,... See CONTRIBUTING.md

  config.knn = ml_collections.ConfigDict()  # k-NN accuracy of features; mIoU with label maps
  config.knn.every_epochs = 20.0  # 0: never
  config.knn.k = 20  # number of neighbours that vote
  config.knn.temperature = 0.07  # of the votes; a small one lets the nearest decide
  config.knn.bank_size = 50_000  # training images to compare with; 0: all

  config.rankme = ml_collections.ConfigDict()  # RankMe, the effective rank of features: no labels
  config.rankme.every_epochs = 0.0  # 0: never
  config.rankme.size = 5000  # evaluation images at most; 0: all

  config.pictures = ml_collections.ConfigDict()  # reconstructions of evaluation images
  config.pictures.every_epochs = 20.0  # 0: never
  config.pictures.count = 8  # images in a picture
  # Channels, counted from 1, that are shown as red, green and blue, or one as grey.
  config.pictures.channels = config_dict.placeholder(tuple)  # None: the first three, or the first

  return config.lock()  # a misspelt setting in a config file is an error
