"""MAE pretraining of ViT-L on ImageNet (arXiv 2111.06377); variants :300 :800 :1600 :debug."""

from hivit_jax.configs import recipes


def get_config(variant: str | None = None):
  return recipes.mae('vit_large', variant)
