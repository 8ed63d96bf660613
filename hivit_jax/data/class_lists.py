"""Names and colours of the classes of well-known data sets, by label."""

import dataclasses

import numpy as np


@dataclasses.dataclass(frozen=True)
class ClassList:
  """Classes of a data set.

  Attributes:
    names: by label.
    palette: (n, 3) uint8, their colours.
  """

  names: tuple[str, ...]
  palette: np.ndarray

  def __post_init__(self):
    assert self.palette.shape == (len(self.names), 3)


def distinct_colours(count: int) -> np.ndarray:
  """Returns colours that can be told apart: (count, 3) uint8, the first one black.

  These are the colours of PASCAL VOC, whose bits come from those of the class's index.

  Args:
    count: number of classes; colours repeat after 256.
  """
  index = np.arange(count)
  colours = np.zeros((count, 3), np.int64)
  for bit in range(8):
    for channel in range(3):
      colours[:, channel] |= (index >> 3 * bit + channel & 1) << 7 - bit
  return colours.astype(np.uint8)


def _class_list(names: str, colours: str | None = None) -> ClassList:
  """Args: names between commas, and RGB colours as hexadecimal numbers between blanks."""
  listed = tuple(' '.join(name.split()) for name in names.split(','))
  if colours is None:
    return ClassList(listed, distinct_colours(len(listed)))
  values = np.frombuffer(bytes.fromhex(colours), np.uint8)
  return ClassList(listed, values.reshape(-1, 3))


VOC = _class_list(
  """
  background, aeroplane, bicycle, bird, boat, bottle, bus, car, cat, chair, cow, diningtable,
  dog, horse, motorbike, person, pottedplant, sheep, sofa, train, tvmonitor
  """,
)

CITYSCAPES = _class_list(
  """
  road, sidewalk, building, wall, fence, pole, traffic light, traffic sign, vegetation, terrain,
  sky, person, rider, car, truck, bus, train, motorcycle, bicycle
  """,
  """
  804080 f423e8 464646 66669c be9999 999999 faaa1e dcdc00 6b8e23 98fb98 4682b4 dc143c ff0000
  00008e 000046 003c64 005064 0000e6 770b20
  """,
)

ADE20K = _class_list(
  """
  wall, building, sky, floor, tree, ceiling, road, bed, windowpane, grass, cabinet, sidewalk,
  person, earth, door, table, mountain, plant, curtain, chair, car, water, painting, sofa,
  shelf, house, sea, mirror, rug, field, armchair, seat, fence, desk, rock, wardrobe, lamp,
  bathtub, railing, cushion, base, box, column, signboard, chest of drawers, counter, sand,
  sink, skyscraper, fireplace, refrigerator, grandstand, path, stairs, runway, case, pool table,
  pillow, screen door, stairway, river, bridge, bookcase, blind, coffee table, toilet, flower,
  book, hill, bench, countertop, stove, palm, kitchen island, computer, swivel chair, boat, bar,
  arcade machine, hovel, bus, towel, light, truck, tower, chandelier, awning, streetlight,
  booth, television receiver, airplane, dirt track, apparel, pole, land, bannister, escalator,
  ottoman, bottle, buffet, poster, stage, van, ship, fountain, conveyer belt, canopy, washer,
  plaything, swimming pool, stool, barrel, basket, waterfall, tent, bag, minibike, cradle, oven,
  ball, food, step, tank, trade name, microwave, pot, animal, bicycle, lake, dishwasher, screen,
  blanket, sculpture, hood, sconce, vase, traffic light, tray, ashcan, fan, pier, crt screen,
  plate, monitor, bulletin board, shower, radiator, glass, clock, flag
  """,
  """
  787878 b47878 06e6e6 503232 04c803 787850 8c8c8c cc05ff e6e6e6 04fa07 e005ff ebff07 96053d
  787846 08ff33 ff0652 8fff8c ccff04 ff3307 cc4603 0066c8 3de6fa ff0633 0b66ff ff0747 ff09e0
  0907e6 dcdcdc ff095c 7009ff 08ffd6 07ffe0 ffb806 0aff47 ff290a 07ffff e0ff08 6608ff ff3d06
  ffc207 ff7a08 00ff14 ff0829 ff0599 0633ff eb0cff a09614 00a3ff 8c8c8c fa0a0f 14ff00 1fff00
  ff1f00 ffe000 99ff00 0000ff ff4700 00ebff 00adff 1f00ff 0bc8c8 ff5200 00fff5 003dff 00ff70
  00ff85 ff0000 ffa300 ff6600 c2ff00 008fff 33ff00 0052ff 00ff29 00ffad 0a00ff adff00 00ff99
  ff5c00 ff00ff ff00f5 ff0066 ffad00 ff0014 ffb8b8 001fff 00ff3d 0047ff ff00cc 00ffc2 00ff52
  000aff 0070ff 3300ff 00c2ff 007aff 00ffa3 ff9900 00ff0a ff7000 8fff00 5200ff a3ff00 ffeb00
  08b8aa 8500ff 00ff5c b800ff ff001f 00b8ff 00d6ff ff0070 5cff00 00e0ff 70e0ff 46b8a0 a300ff
  9900ff 47ff00 ff00a3 ffcc00 ff008f 00ffeb 85ff00 ff00eb f500ff ff007a fff500 0abed4 d6ff00
  00ccff 1400ff ffff00 0099ff 0029ff 00ffcc 2900ff 29ff00 ad00ff 00f5ff 4700ff 7a00ff 00ffb8
  005cff b8ff00 0085ff ffd600 19c2c2 66ff00 5c00ff
  """,
)

COCO = _class_list(
  """
  person, bicycle, car, motorcycle, airplane, bus, train, truck, boat, traffic light,
  fire hydrant, stop sign, parking meter, bench, bird, cat, dog, horse, sheep, cow, elephant, bear,
  zebra, giraffe, backpack, umbrella, handbag, tie, suitcase, frisbee, skis, snowboard,
  sports ball, kite, baseball bat, baseball glove, skateboard, surfboard, tennis racket, bottle,
  wine glass, cup, fork, knife, spoon, bowl, banana, apple, sandwich, orange, broccoli, carrot,
  hot dog, pizza, donut, cake, chair, couch, potted plant, bed, dining table, toilet, tv, laptop,
  mouse, remote, keyboard, cell phone, microwave, oven, toaster, sink, refrigerator, book, clock,
  vase, scissors, teddy bear, hair drier, toothbrush
  """,
)
# Ids of these in COCO's files: from 1 to 90, some of which are not used.
COCO_IDS = tuple(i for i in range(1, 91) if i not in (12, 26, 29, 30, 45, 66, 68, 69, 71, 83))
