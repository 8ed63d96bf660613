"""From Swin-B to HiViT-B, step 3 of 4: and no attention before it; variant :debug."""

from configs import base


def get_config(variant: str | None = None):
  recipe = {'drop_path_rate': 0.5, 'clip_norm': 5.0, 'mix_group': 64}
  return base.supervised('base_mlp_stem', variant, model='swin', **recipe)
