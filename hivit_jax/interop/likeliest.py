"""What a file that is none of those known here resembles, and how it differs."""

import re
from collections.abc import Callable, Mapping

Shapes = Mapping[str, tuple[int, ...]]
# A trait: what it is called when it lacks, or None where the file has it.
_Trait = Callable[[Shapes], str | None]
_SHOWN = 2  # differences of a layout


def _has(pattern: str, called: str = '') -> _Trait:
  """Some name that matches."""
  missing = f'no {called}' if called else 'no ' + pattern.replace('\\', '')
  return lambda shapes: None if any(re.fullmatch(pattern, name) for name in shapes) else missing


def _lacks(pattern: str) -> _Trait:
  def trait(shapes: Shapes) -> str | None:
    return next((f'has {name}' for name in shapes if re.fullmatch(pattern, name)), None)

  return trait


def _patches(side: int) -> _Trait:
  def trait(shapes: Shapes) -> str | None:
    shape = shapes.get('patch_embed.proj.weight', ())
    if len(shape) != 4:
      return 'no patch_embed.proj.weight of four axes'
    text = 'x'.join(map(str, shape[2:]))
    return None if shape[2:] == (side, side) else f'patches of {text} pixels, not {side}x{side}'

  return trait


def _widths(shapes: Shapes) -> str | None:
  """Tokens are four times as wide as the patch embedding."""
  patch = shapes.get('patch_embed.proj.weight', (0,))[0]
  tokens = next((shapes[k][-1] for k in ('absolute_pos_embed', 'pos_embed') if shapes.get(k)), 0)
  if not patch or not tokens or tokens == 4 * patch:
    return None
  return f'its stages have {patch}, {tokens} channels'


def _merges(shapes: Shapes) -> str | None:
  count = sum(bool(re.fullmatch(r'blocks\.\d+\.reduction\.weight', name)) for name in shapes)
  return None if count == 2 else f'{count} merges (blocks.N.reduction.weight), not 2'


_QKV = _has(r'(blocks|layers)\..*attn\.(qkv|q_proj)\.weight', 'attn.qkv.weight')
_HIVIT = (
  _patches(4), _has('absolute_pos_embed'), _widths, _merges, _has(r'patch_embed\.norm\.weight'),
  _has(r'blocks\.\d+\.mlp\.fc1\.weight', 'blocks.N.mlp.fc1.weight'), _QKV, _lacks('cls_token'),
)  # fmt: skip
_VIT = (
  _patches(16), _has('pos_embed'), _has('cls_token'), _QKV, _lacks(r'blocks\.\d+\.reduction\..*'),
  _has(r'blocks\.0\.mlp\.fc1\.weight', 'blocks.0.mlp.fc1.weight'),
  _lacks(r'blocks\.\d+\.(gamma_\d|ls\d\.gamma|mlp\.w\d+\.weight)'),
)  # fmt: skip
_SWIN = (
  _patches(4), _has(r'layers\.\d+\.blocks\.\d+\.norm1\.weight', 'layers.N.blocks.N.norm1.weight'),
  _has(r'layers\.\d+\.downsample\.reduction\.weight', 'layers.N.downsample.reduction.weight'),
  _has(r'layers\.\d+\..*relative_position_bias_table', 'relative_position_bias_table'), _QKV,
  _lacks(r'layers\..*\.(logit_scale|cpb_mlp.*)'), _lacks('absolute_pos_embed'),
)  # fmt: skip
_FAST_ITPN = (
  _patches(4), _has('pos_embed'), _widths, _merges, _lacks(r'patch_embed\.norm\.weight'),
  _has(r'blocks\.\d+\.mlp\.w1\.weight', 'blocks.N.mlp.w1.weight'), _QKV,
  _has(r'blocks\.\d+\.mlp\.ffn_ln\.weight', 'blocks.N.mlp.ffn_ln.weight'),
)  # fmt: skip
_PIXELS = (_has(r'decoder_pred\.weight'), _has('mask_token'))
_LAYOUTS: dict[str, tuple[_Trait, ...]] = {
  'HiViT': _HIVIT,
  'ViT': _VIT,
  'Swin': _SWIN,
  'Fast-iTPN': _FAST_ITPN,
  "HiViT's MAE": (*_HIVIT, *_PIXELS, _has(r'decoder_embed\.weight')),
  "iTPN's pixel pretraining": (
    *_HIVIT, *_PIXELS, _has(r'align_dim_16to8\.weight'), _has(r'decoder_embed\.0\.1\.weight')
  ),
  "ViT's MAE": (*_VIT, *_PIXELS, _has(r'decoder_embed\.weight')),
  'SimMIM': (*_SWIN, _has('mask_token'), _has(r'decoder\.0\.weight')),
}  # fmt: skip


def three(shapes: Shapes) -> str:
  """The three layouts that differ least from names and shapes, and what differs, in one line."""
  found = []
  for label, traits in _LAYOUTS.items():
    differences = [difference for trait in traits if (difference := trait(shapes))]
    found.append((len(differences) / len(traits), label, differences or ['some shape']))
  found.sort(key=lambda item: item[0])
  return '; '.join(
    f'{label} ({", ".join(differences[:_SHOWN])}'
    + (f' and {len(differences) - _SHOWN} more' if len(differences) > _SHOWN else '')
    + ')'
    for _, label, differences in found[:3]
  )
