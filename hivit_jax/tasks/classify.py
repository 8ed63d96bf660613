"""Classification as a task for the training loop: supervised, finetuning, linear probe."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from hivit_jax.models.classifier import Classifier
from hivit_jax.tasks import knn, mixing, rankme
from hivit_jax.tasks.evaluators import Context, Evaluator, Metrics, Summed
from hivit_jax.tasks.images import normalize
from hivit_jax.tasks.task import Batch, ImageTask


@dataclasses.dataclass(frozen=True)
class ClassifyTask(ImageTask):
  """Classify images.

  Attributes:
    num_classes: of the model.
    label_smoothing: share of the target that is spread over all classes.
    erase: probability of random erasing.
    mixup, cutmix: alpha of their Beta distributions; 0: off.
    switch_probability: of cutmix where mixup is on as well.
    mix_group: consecutive examples that share one draw of mixup or cutmix, see `mixing.mix`.
  """

  model_class = Classifier
  model_kind = 'classifier'
  # As the official finetuning and supervised training: position parameters do not decay.
  rules = (
    (r'(.*/)?(bias|scale|gamma_[12])', 'no_decay'),
    (r'(.*/)?kernel', 'decay'),
    (r'absolute_pos_embed|pos_embed|cls_token|.*/relative_position_bias_table', 'no_decay'),
  )
  needs_classes = True
  measures = frozenset(('evaluation', 'knn', 'rankme'))
  example = 'predict {workdir} PICTURE.jpg'

  num_classes: int
  label_smoothing: float = 0.0
  erase: float = 0.0
  mixup: float = 0.0
  cutmix: float = 0.0
  switch_probability: float = 0.5
  mix_group: int | None = None

  def prepare(self, model: Classifier, batch: Batch, rng: jax.Array) -> Batch:
    """Augments a whole batch, which is then computed whole or in parts.

    Args:
      model: the model to be trained.
      batch: `image` (B, H, W, C) as stored, `label` (B,) int32; -1: unknown, it is ignored.
      rng: PRNG key of this step.

    Returns:
      `image` (B, H, W, C): float32 normalised, or integers still if nothing is done to it here;
      `target` (B, classes) probabilities, of which an example has as much as is known of it;
      `weight` (B,) how much that is, and `count` () their sum; with drop path, `drop_path_noise`
      (B, blocks, 2).
    """
    erasing, mixing_key, drop_path = jax.random.split(rng, 3)
    images = batch['image']
    if self.erase or self.mixup or self.cutmix or not _stored(images):
      images = normalize(images, self.mean, self.std)
    if self.erase:
      images = mixing.random_erase(images, erasing, self.erase)
    known = (batch['label'] >= 0).astype(jnp.float32)
    targets = jax.nn.one_hot(batch['label'], self.num_classes)
    targets = targets * (1 - self.label_smoothing) + self.label_smoothing / self.num_classes
    # What is unknown of an image that is mixed from two is as well; the weight is mixed like them.
    targets = jnp.concatenate([targets * known[:, None], known[:, None]], axis=1)
    if self.mixup or self.cutmix:
      images, targets = mixing.mix(
        images,
        targets,
        mixing_key,
        mixup=self.mixup,
        cutmix=self.cutmix,
        switch_probability=self.switch_probability,
        group=self.mix_group,
      )
    weight = targets[:, -1]
    prepared = {
      'image': images,
      'target': targets[:, :-1],
      'weight': weight,
      'count': jnp.maximum(weight.sum(), 1),  # if nothing is known, the loss is 0
    }
    if any(model.drop_path_rates):
      prepared['drop_path_noise'] = model.drop_path_noise(drop_path, len(images))
    return prepared

  def loss(self, model: Classifier, batch: Batch) -> tuple[jax.Array, dict]:
    """Cross entropy, the mean over what is labelled in the batch.

    `accuracy` counts an example as right where the likeliest class is that of the target; with
    mixup or cutmix there are two, and the larger share counts.
    """
    images = batch['image']
    if _stored(images):  # a quarter or half of the memory until here, for a batch in parts
      images = normalize(images, self.mean, self.std)
    logits = model(images, drop_path_noise=batch.get('drop_path_noise'), train=True)
    right = (logits.argmax(axis=-1) == batch['target'].argmax(axis=-1)) * batch['weight']
    loss = _cross_entropy(logits, batch['target']).sum() / batch['count']
    return loss, {'accuracy': right.sum() / batch['count']}

  def evaluators(self, context: Context) -> list[Evaluator]:
    """Accuracy on each set whose classes are the model's; what is measured of its features."""
    every, accuracies = context.every('evaluation'), []
    if every is not None:
      accuracies = [
        Evaluator(
          every, Summed(context, source, self.evaluate, _shares_of(source, name), name=name)
        )
        for name, source in context.class_sets.items()
      ]
    return [
      *accuracies,
      *knn.evaluators(context, self.features, self.unit_features),
      *rankme.evaluators(context, self.features),
    ]

  def evaluate(self, model: Classifier, batch: Batch) -> dict[str, jax.Array]:
    """Sums over the examples of an evaluation batch.

    Args:
      model: the classifier.
      batch: `image` (B, H, W, C) uint8, `label` (B,), `mask` (B,) bool: which ones count; those
        without a label (-1) never do.

    Returns:
      () float32 each: `count`; `loss`, cross entropy; `top1` and `top5`, numbers of right answers.
    """
    logits = model(normalize(batch['image'], self.mean, self.std))
    label = batch['label'][:, None]
    own = jnp.take_along_axis(logits, label, axis=-1)
    # Ties count against the model, and so do NaNs: a constant output must not look right.
    better = (~(logits < own)).sum(axis=-1) - 1
    results = {
      'count': jnp.ones(len(logits)),
      'loss': _cross_entropy(logits, jax.nn.one_hot(label[:, 0], logits.shape[-1])),
      'top1': better < 1,
      'top5': better < 5,
    }
    counts = batch['mask'] & (batch['label'] >= 0)
    return {
      key: jnp.where(counts, value, 0).sum().astype(jnp.float32) for key, value in results.items()
    }

  def features(self, model: Classifier, images: jax.Array) -> jax.Array:
    """(B, H, W, C) uint8 -> (B, C) float32 mean tokens, for k-NN classification."""
    return model.pooled(normalize(images, self.mean, self.std)).astype(jnp.float32)

  def unit_features(self, model: Classifier, images: jax.Array) -> jax.Array:
    """(B, H, W, C) uint8 -> (B, rows, columns, C) float32 tokens, for k-NN segmentation."""
    tokens = model.unit_tokens(normalize(images, self.mean, self.std))[-1]
    return tokens.astype(jnp.float32).mean(axis=3)


def _stored(images: jax.Array) -> bool:
  """Whether images are still integers; floats are normalised as soon as a task gets them."""
  return jnp.issubdtype(images.dtype, jnp.integer)


def _shares_of(source: Any, name: str):
  """Sums over the labelled examples of a source -> means."""

  def shares(sums: dict[str, Any]) -> Metrics:
    if not sums['count']:
      raise knn.no_labels(source, name)
    return {key: value / sums['count'] for key, value in sums.items() if key != 'count'}

  return shares


def _cross_entropy(logits: jax.Array, targets: jax.Array) -> jax.Array:
  """(B, classes) twice -> (B,)."""
  return -(targets * jax.nn.log_softmax(logits)).sum(axis=-1)
