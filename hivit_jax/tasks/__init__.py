"""What models are trained for, by name: the only list of tasks."""

from hivit_jax.tasks.classify import ClassifyTask
from hivit_jax.tasks.detect import DetectTask
from hivit_jax.tasks.linear import LinearTask, SegmentLinearTask
from hivit_jax.tasks.mae import MAETask
from hivit_jax.tasks.segment import SegmentTask
from hivit_jax.tasks.simmim import SimMIMTask
from hivit_jax.tasks.task import ImageTask, Task

__all__ = ['TASKS', 'ImageTask', 'Task']

# `config.task` -> its class, whose fields are filled from the config by `train.assemble.task`.
TASKS: dict[str, type[Task]] = {
  'mae': MAETask,
  'simmim': SimMIMTask,
  'classify': ClassifyTask,
  'linear': LinearTask,
  'detect': DetectTask,
  'segment': SegmentTask,
  'segment_linear': SegmentLinearTask,
}
