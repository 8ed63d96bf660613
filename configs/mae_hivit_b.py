"""MAE pretraining of HiViT-B on ImageNet (arXiv 2205.14949); variants :300 :800 :1600 :debug."""

from hivit_jax.configs import recipes


def get_config(variant: str | None = None):
  return recipes.mae('hivit_base', variant)
