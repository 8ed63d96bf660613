"""HiViT and masked autoencoding in JAX."""

__version__ = '0.1.0'
__all__ = ['create_model', 'list_models']


def __getattr__(name: str):
  # Lazy: data workers and `main.py --help` import this package and must not wait for JAX.
  if name in __all__:
    from hivit_jax import models

    return getattr(models, name)
  raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
