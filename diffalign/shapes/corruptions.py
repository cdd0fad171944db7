"""Pictures that went wrong: eight ways to break a picture of shapes, for artifact heads and self-supervised negatives.

Each takes an image [3, H, W] in [0, 1] and a `random.Random`, and returns a new image of the same size and type; the
same state of the generator gives the same picture. Faults sit on or beside an object where there is one. Lengths are
fractions of the picture's side.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from diffalign.shapes.world import BACKGROUND, COLORS

Corruption = Callable[[Tensor, random.Random], Tensor]

VISIBLE = 0.12  # change of a pixel, in [0, 1], that counts as seen
MIN_CHANGED = 0.006  # share of the pixels that must change visibly: 25 of 64x64
MAX_DRAWS = 12
_FOREGROUND = 0.27  # RGB distance from the background, as the detector's


def cut(image: Tensor, rng: random.Random) -> Tensor:
    """A half or a band of an object is missing, along a straight line."""
    spot = _object(image, rng)
    along = _across(image, *_centre(spot), rng.uniform(0, 2 * math.pi))
    offset, width = rng.uniform(-0.08, 0.08), rng.choice((1.0, rng.uniform(0.04, 0.09)))
    sharp = image.shape[-1]  # the rim of the cut is one pixel wide
    gone = ((along - offset) * sharp + 0.5).clamp(0, 1) * ((offset + width - along) * sharp + 0.5).clamp(0, 1)
    return _blend(image, _plain(image), _soft(spot) * gone)


def smear(image: Tensor, rng: random.Random) -> Tensor:
    """A disc around an object is dragged: averaged over shifts in one direction."""
    angle, length = rng.uniform(0, 2 * math.pi), rng.uniform(0.15, 0.35) * image.shape[-1]
    shifts = [k / 8 * length for k in range(9)]
    moved = [_roll(image, round(s * math.sin(angle)), round(s * math.cos(angle))) for s in shifts]
    return _blend(image, torch.stack(moved).mean(0), _disc(image, rng, 0.2, 0.35))


def blur(image: Tensor, rng: random.Random) -> Tensor:
    """A disc around an object melts into a blob."""
    sigma = rng.uniform(0.04, 0.08) * image.shape[-1]
    return _blend(image, _gaussian(image, sigma), _disc(image, rng, 0.18, 0.32))


def two_coloured(image: Tensor, rng: random.Random) -> Tensor:
    """One side of an object has another colour, with a sharp or a gradual change."""
    spot = _object(image, rng)
    along = _across(image, *_centre(spot), rng.uniform(0, 2 * math.pi)) - rng.uniform(-0.05, 0.05)
    share = (along / rng.choice((0.01, rng.uniform(0.05, 0.15))) + 0.5).clamp(0, 1)
    own = image[:, spot].median(1).values if spot.any() else image.new_zeros(3)
    others = [c for c in COLORS.values() if (image.new_tensor(c) / 255 - own).norm() > 0.3]
    colour = (image.new_tensor(rng.choice(others)) / 255).view(3, 1, 1)
    plain, strength = _plain(image), (own - _plain(image)[:, 0, 0]).norm() + 1e-6
    coverage = ((image - plain).norm(dim=0) / strength).clamp(0, 1)  # keeps the outline anti-aliased
    return _blend(image, plain + (colour - plain) * coverage, _soft(spot) * share)


def noise(image: Tensor, rng: random.Random) -> Tensor:
    """One to three rectangles of coloured noise, fine or in small tiles."""
    size, result = image.shape[-1], image
    for _ in range(rng.randint(1, 3)):
        grain = rng.choice((1, 2, 4))
        shape = (3, -(-image.shape[1] // grain), -(-size // grain))
        static = _generator(rng)(shape).to(image)
        static = static.repeat_interleave(grain, 1).repeat_interleave(grain, 2)[:, : image.shape[1], :size]
        y, x = _point(image, rng)
        h, w = rng.uniform(0.05, 0.14), rng.uniform(0.05, 0.14)
        rows, columns = _grid(image)
        inside = ((rows - y).abs() < h) & ((columns - x).abs() < w)
        result = _blend(result, static, inside.to(image) * rng.uniform(0.5, 1.0))
    return result


def ghost(image: Tensor, rng: random.Random) -> Tensor:
    """A pale or solid fragment of an object appears once more, elsewhere."""
    spot = _object(image, rng)
    y, x = _centre(spot)
    part = spot & (_across(image, y, x, rng.uniform(0, 2 * math.pi)) > rng.uniform(-0.05, 0.04))
    angle, far = rng.uniform(0, 2 * math.pi), rng.uniform(0.12, 0.45)
    dy, dx = (round(far * f(angle) * n) for f, n in zip((math.sin, math.cos), image.shape[1:], strict=True))
    mask = _roll(_soft(part)[None], dy, dx, repeat=False)[0]
    return _blend(image, _roll(image, dy, dx), mask * rng.uniform(0.35, 1.0))


def holes(image: Tensor, rng: random.Random) -> Tensor:
    """One to four round holes or bites in objects, showing the background or a foreign colour."""
    result = image
    for _ in range(rng.randint(1, 4)):
        colour = rng.choice([BACKGROUND, BACKGROUND, *COLORS.values()])
        filling = (image.new_tensor(colour) / 255).view(3, 1, 1).expand_as(image)
        result = _blend(result, filling, _disc(image, rng, 0.035, 0.08, sharp=True))
    return result


def warp(image: Tensor, rng: random.Random) -> Tensor:
    """Outlines wobble: a smooth random displacement of a few pixels."""
    coarse = _generator(rng)((2, rng.randint(5, 7), rng.randint(5, 7))) * 2 - 1
    field = F.interpolate(coarse[None], image.shape[1:], mode="bicubic", align_corners=True)[0]
    rows, columns = _grid(image)
    amount = rng.uniform(0.06, 0.12)
    at = torch.stack([columns + amount * field[0].to(image), rows + amount * field[1].to(image)], -1) * 2 - 1
    return F.grid_sample(image[None], at[None], padding_mode="border", align_corners=False)[0].clamp(0, 1)


CORRUPTIONS: dict[str, Corruption] = {
    "cut": cut,
    "smear": smear,
    "blur": blur,
    "two_coloured": two_coloured,
    "noise": noise,
    "ghost": ghost,
    "holes": holes,
    "warp": warp,
}


def corrupt(image: Tensor, rng: random.Random, kinds: Sequence[str] = tuple(CORRUPTIONS)) -> Tensor:
    """One fault of a random kind, in one case of four two; drawn again until `MIN_CHANGED` of the pixels changed."""
    result = image
    for _ in range(MAX_DRAWS):
        result = CORRUPTIONS[rng.choice(kinds)](image, rng)
        if rng.random() < 0.25:
            result = CORRUPTIONS[rng.choice(kinds)](result, rng)
        if changed(image, result).float().mean() >= MIN_CHANGED:
            break
    return result


def corrupt_all(images: Tensor, seed: int, kinds: Sequence[str] = tuple(CORRUPTIONS)) -> Tensor:
    """images [B, 3, H, W] in [0, 1], each with its own faults, which depend on `seed` and the image's place only."""
    rngs = (random.Random(f"{seed} {i}") for i in range(len(images)))
    return torch.stack([corrupt(image, rng, kinds) for image, rng in zip(images, rngs, strict=True)])


def changed(image: Tensor, other: Tensor) -> Tensor:
    """Bool [..., H, W]: the pixels that a fault changed visibly, the truth for maps of faults."""
    return (image - other).abs().amax(-3) > VISIBLE


def _grid(image: Tensor) -> tuple[Tensor, Tensor]:
    """Pixel centres as fractions of the sides: rows [H, 1], columns [1, W]."""
    h, w = image.shape[1:]
    return (torch.arange(h).to(image)[:, None] + 0.5) / h, (torch.arange(w).to(image)[None] + 0.5) / w


def _plain(image: Tensor) -> Tensor:
    return (image.new_tensor(BACKGROUND) / 255).view(3, 1, 1).expand_as(image)


def _foreground(image: Tensor) -> Tensor:
    distance: Tensor = (image - _plain(image)).norm(dim=0)
    return distance > _FOREGROUND


def _object(image: Tensor, rng: random.Random) -> Tensor:
    """Bool [H, W]: one of the connected objects; the middle of an empty picture."""
    from scipy import ndimage

    labels, n = ndimage.label(_foreground(image).numpy())
    if n == 0:
        rows, columns = _grid(image)
        return (rows - 0.5) ** 2 + (columns - 0.5) ** 2 < 0.04
    sizes = ndimage.sum_labels(labels > 0, labels, range(1, n + 1))
    large = [k for k, size in enumerate(sizes, 1) if size >= max(sizes) / 4]  # no specks
    return torch.from_numpy(labels == rng.choice(large))


def _centre(spot: Tensor) -> tuple[float, float]:
    y, x = spot.nonzero().float().add(0.5).mean(0).tolist()
    return y / spot.shape[0], x / spot.shape[1]


def _point(image: Tensor, rng: random.Random) -> tuple[float, float]:
    """A random place on an object, or anywhere when there is none."""
    places = _foreground(image).nonzero()
    if not len(places):
        return rng.random(), rng.random()
    y, x = places[rng.randrange(len(places))].tolist()
    return (y + 0.5) / image.shape[1], (x + 0.5) / image.shape[2]


def _across(image: Tensor, y: float, x: float, angle: float) -> Tensor:
    """Signed distance [H, W] from the line through (y, x) whose normal has this angle."""
    rows, columns = _grid(image)
    return (rows - y) * math.sin(angle) + (columns - x) * math.cos(angle)


def _disc(image: Tensor, rng: random.Random, smallest: float, largest: float, sharp: bool = False) -> Tensor:
    """A disc [H, W] around a point on an object, 1 inside, its rim one pixel wide or a third of the radius."""
    y, x = _point(image, rng)
    radius = rng.uniform(smallest, largest)
    rows, columns = _grid(image)
    rim = 1 / image.shape[-1] if sharp else radius / 3
    return ((radius - torch.hypot(rows - y, columns - x)) / rim + 0.5).clamp(0, 1)


def _soft(mask: Tensor) -> Tensor:
    """Bool [H, W] -> float, grown by a pixel, so that an object's anti-aliased rim belongs to it."""
    return F.max_pool2d(mask.float()[None], 3, 1, 1)[0]


def _blend(image: Tensor, other: Tensor, share: Tensor) -> Tensor:
    return torch.lerp(image, other, share.to(image).expand_as(image))


def _roll(image: Tensor, dy: int, dx: int, repeat: bool = True) -> Tensor:
    """Shift by whole pixels; what enters repeats the border, or is 0."""
    h, w = image.shape[1:]
    pad = (abs(dx), abs(dx), abs(dy), abs(dy))
    wide = F.pad(image[None], pad, mode="replicate")[0] if repeat else F.pad(image, pad)
    top, left = abs(dy) - dy, abs(dx) - dx
    return wide[:, top : top + h, left : left + w]


def _gaussian(image: Tensor, sigma: float) -> Tensor:
    reach = min(math.ceil(2.5 * sigma), min(image.shape[1:]) - 1)
    k = torch.arange(-reach, reach + 1).to(image)
    weight = (-(k**2) / (2 * sigma**2)).exp()
    weight = (weight / weight.sum()).expand(3, 1, -1)
    wide = F.pad(image[None], (reach,) * 4, mode="replicate")
    return F.conv2d(F.conv2d(wide, weight[:, :, None], groups=3), weight[..., None], groups=3)[0]


def _generator(rng: random.Random) -> Callable[[tuple[int, ...]], Tensor]:
    """Uniform tensors that follow from the state of `rng`."""
    generator = torch.Generator().manual_seed(rng.getrandbits(62))
    return lambda shape: torch.rand(shape, generator=generator)
