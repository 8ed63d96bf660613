"""What a load of weights did."""

import dataclasses

_SHOWN = 4  # names of a kind, in the log


@dataclasses.dataclass
class LoadReport:
  """What `load_weights` did, by the PyTorch names.

  Attributes:
    source: where the weights came from.
    loaded: names taken.
    resized: names among them that were resized to the model's image size, with how.
    ignored: names that no model needs, with why.
    dropped: names that this model has no place for.
    new: names that keep the model's initialisation.
    zeroed: names among them that were set to zero, so that the encoder computes what it did.
    redrawn: names that keep the model's initialisation although the file has them, with why.
  """

  source: str
  loaded: list[str] = dataclasses.field(default_factory=list)
  resized: dict[str, str] = dataclasses.field(default_factory=dict)
  ignored: dict[str, str] = dataclasses.field(default_factory=dict)
  dropped: list[str] = dataclasses.field(default_factory=list)
  new: list[str] = dataclasses.field(default_factory=list)
  zeroed: list[str] = dataclasses.field(default_factory=list)
  redrawn: dict[str, str] = dataclasses.field(default_factory=dict)

  def __str__(self) -> str:
    lines = [f'loaded {len(self.loaded)} parameters from {self.source}']
    sizes: dict[str, list[str]] = {}
    for name, how in self.resized.items():
      sizes.setdefault(f'{name.split(".")[-1]} {how}', []).append(name)
    lines += [f'  resized {what} ({len(names)})' for what, names in sizes.items()]
    for reason in dict.fromkeys(self.ignored.values()):
      names = [name for name, why in self.ignored.items() if why == reason]
      more = f' and {len(names) - _SHOWN} more' if len(names) > _SHOWN else ''
      lines.append(f'  left out, {reason}: {", ".join(names[:_SHOWN])}{more}')
    if self.dropped:
      lines.append(f'  dropped, no place in this model: {", ".join(self.dropped)}')
    for reason in dict.fromkeys(self.redrawn.values()):
      names = [name for name, why in self.redrawn.items() if why == reason]
      lines.append(f'  drawn anew, not taken from the file: {", ".join(names)} ({reason})')
    if self.new:
      lines.append(f'  new, not in the file: {", ".join(self.new)}')
    if self.zeroed:
      lines.append(
        f'  of these at zero, so that the encoder is unchanged: {len(self.zeroed)} tables'
      )
    return '\n'.join(lines)
