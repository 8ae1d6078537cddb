"""The parts of a face's picture that only move as one piece: backdrop, body, and the head without its features.

- Shapes are signed distances in a square of 64 units, painted back to front, so any size is the same picture.
- `layers` paints them once per (identity, size): premultiplied RGBA, channels first; the head twice
  as fine and with a margin, ready to be warped.
"""
from functools import lru_cache

import numpy as np

from .identity import CUTS

UNITS = 64.0                                   # side of the picture in design units: 1 unit is 1 pixel at 64x64
CX, CY = 32.0, 31.0                            # centre of the face
TOP, CHIN = 20.0, 22.0                         # its height above and below the centre
EYE_Y, BROW_Y, NOSE_Y, MOUTH_Y = 29.5, 22.5, 36.0, 43.5
BLUSH = {"flat": .30, "line": .10, "soft3d": .22}
MARGIN, FINE = 4, 2                            # head texture: units beyond the picture, texels per pixel


# ---- shapes ------------------------------------------------------------------------------------

def smooth(x, a, b):
    """0 below a, 1 above b, an S between."""
    t = np.clip((x - a) / (b - a), 0, 1)
    return t * t * (3 - 2 * t)


def ellipse(x, y, cx, cy, rx, ry):
    """Signed distance (first order, exact at the edge); radii may vary over the picture."""
    dx, dy = (x - cx) / rx, (y - cy) / ry
    k = np.hypot(dx, dy)
    return k * (k - 1) / (np.hypot(dx / rx, dy / ry) + 1e-9)


def segment(x, y, ax, ay, bx, by, r):
    """Signed distance to a line of radius r from a to b."""
    t = np.clip(((x - ax) * (bx - ax) + (y - ay) * (by - ay)) / ((bx - ax) ** 2 + (by - ay) ** 2), 0, 1)
    return np.hypot(x - ax - t * (bx - ax), y - ay - t * (by - ay)) - r


def polygon(x, y, corners):
    """Signed distance to a convex polygon, corners clockwise as seen (exact along its sides)."""
    d = np.full_like(x, -1e9)
    for (ax, ay), (bx, by) in zip(corners, corners[1:] + corners[:1]):
        d = np.maximum(d, ((x - ax) * (by - ay) - (y - ay) * (bx - ax)) / np.hypot(bx - ax, by - ay))
    return d


class Canvas:
    """Premultiplied RGBA (4, h, w) and the design coordinates x, y (h, w) of its pixels; `px` units to a pixel."""

    def __init__(self, size, margin=0, fine=1):
        self.px = UNITS / size / fine
        axis = (np.arange(round((UNITS + 2 * margin) / self.px)) + 0.5) * self.px - margin
        self.x, self.y = np.meshgrid(axis.astype(np.float32), axis.astype(np.float32))
        self.rgba = np.zeros((4,) + self.x.shape, np.float32)

    def cover(self, distance, soft=0.0):
        """Signed distance -> coverage in [0, 1]: edges one pixel wide, or `soft` units."""
        return np.clip(0.5 - distance / max(self.px, soft), 0, 1)

    def paint(self, colour, cover):
        """Lay `colour` (3,) or (3, h, w) over what is there, at `cover` (h, w)."""
        cover = cover.astype(np.float32)
        self.rgba *= 1 - cover
        for channel, value in zip(self.rgba, (*colour, 1.0)):
            channel += cover * np.float32(value)


def shade(colour, by):
    """Darker for by < 1, lighter (towards white) for by > 1."""
    c = np.asarray(colour, np.float32)
    return c * by if by <= 1 else c + (1 - c) * (by - 1)


def face(i, x, y):
    """Signed distance to the outline of the face."""
    low = np.clip((y - CY) / CHIN, 0, 1.2)
    full = 1 + (.17 - .07 * i.jaw) * np.sin(np.pi * np.clip(low, 0, 1)) - .05 * i.jaw * low                # an ellipse with jaws
    return ellipse(x, y, CX, CY, i.width * full, np.where(y < CY, TOP, CHIN))


def crown(i):
    """Colour of the hair, or of what is worn over it."""
    return np.asarray(i.hat_colour if CUTS[i.hair].fabric else i.hair_colour, np.float32)


def ink(i):
    """Colour of outlines."""
    return shade(crown(i) * .35 + np.asarray(i.skin) * .12, .8) if i.style == "flat" else np.array((.13, .11, .14), np.float32)


# ---- layers ------------------------------------------------------------------------------------

@lru_cache(maxsize=16)
def layers(identity, size):
    """-> backdrop with body, float32 (3, size, size) in 0 .. 255; head, float32 (4, n, n): premultiplied 0 .. 255, alpha 0 .. 1."""
    back = Canvas(size)
    backdrop(identity, back)
    back_hair(identity, back)
    body(identity, back)
    head = Canvas(size, MARGIN, FINE)
    head.px *= FINE                                                      # edges for the picture's pixels, not the finer texels
    ears(identity, head)
    skin(identity, head)
    front_hair(identity, head)
    return back.rgba[:3] * 255, head.rgba * np.float32((255, 255, 255, 1))[:, None, None]


def backdrop(i, c):
    """A gradient with one quiet motif."""
    a, b = (np.asarray(s, np.float32) for s in i.scene)
    c.paint(a[:, None, None] + (b - a)[:, None, None] * c.y / UNITS, np.ones_like(c.x))
    if i.backdrop == "disc":
        c.paint(shade(b, 1.35), .7 * c.cover(ellipse(c.x, c.y, CX, 28, 27, 27), 2 if i.style == "soft3d" else 0))
    elif i.backdrop == "window":
        frame = np.maximum(np.abs(c.x - 51) - 10, np.abs(c.y - 17) - 14)
        c.paint(shade(b, 1.5), c.cover(frame))
        bars = np.maximum(np.minimum(np.abs(c.x - 51), np.abs(c.y - 17)) - .5, frame)
        c.paint(shade(a, .7), c.cover(np.minimum(np.abs(frame) - .8, bars)))


def body(i, c):
    """Neck, shoulders and clothes."""
    x, y, u = c.x, c.y, np.abs(c.x - CX)
    trunk = ellipse(x, y, CX, 80, 28, 25.5)
    neck = np.maximum(u - 6.4 - .12 * np.clip(y - 52, 0, 9) ** 1.5, np.maximum(44 - y, y - 56))
    bare = np.maximum(ellipse(x, y, CX, 54, 8, 4.5), 50 - y)
    if i.clothes in ("vneck", "collar"):
        bare = np.maximum(u * .8 + (y - 62.5) * .55, 50 - y)
    flesh = np.minimum(np.maximum(neck, trunk - 6), bare)
    cloth, tone = np.asarray(i.cloth_colour, np.float32), np.asarray(i.skin, np.float32)
    if i.style == "soft3d":
        cloth = cloth[:, None, None] * (1.08 - .45 * smooth(np.abs(x - 27), 4, 30))
        tone = tone[:, None, None] * (1.02 - .30 * smooth(np.abs(x - 29), 1, 10))
    else:
        c.paint(ink(i), c.cover(np.minimum(neck, trunk) - .9))
    if i.clothes == "hoodie":
        c.paint(shade(i.cloth_colour, .55), c.cover(ellipse(x, y, CX, 54, 14.5, 6.5)))
    c.paint(cloth, c.cover(trunk))
    if i.style == "line":
        c.paint(shade(i.cloth_colour, .72), c.cover(np.maximum(trunk, 44 - x + .2 * (y - 60))))
    c.paint(tone, c.cover(flesh))
    shadow = np.maximum(flesh, ellipse(x, y, CX, 45, 13, 12))
    c.paint(shade(i.skin, .72), c.cover(shadow, 3 if i.style == "soft3d" else 0))
    _neckline(i, c, u, trunk, bare)


def _neckline(i, c, u, trunk, bare):
    """The edge of the clothes, a shirt's collar, or a hood with its strings."""
    y, dark, light = c.y, shade(i.cloth_colour, .6), shade(i.cloth_colour, 1.3)
    if i.clothes == "collar":
        wing = polygon(u, y, ((6.6, 51.5), (11.5, 56), (5.5, 62), (2.2, 59.5)))
        c.paint(dark, c.cover(wing - .6))
        c.paint(light, c.cover(wing))
    elif i.clothes == "hoodie":
        rim = np.maximum(np.abs(ellipse(c.x, y, CX, 54.5, 10.5, 6)) - 1.7, 53 - y)
        c.paint(dark, c.cover(rim - .6))
        c.paint(light, c.cover(rim))
        c.paint(light, c.cover(segment(u, y, 4.5, 59, 4.8, 65, .55)))
    else:
        c.paint(dark, .8 * c.cover(np.maximum(np.abs(bare) - .55, trunk)))


def outline(i, x, y, cut):
    """Signed distance to the hair's silhouette: a skull cap with lift, width and waves."""
    angle = np.arctan2(y - CY, x - CX)
    wave = np.abs(np.sin(angle * cut.waves / 2 + i.part)) * 2 - 1 if cut.fringe == "spikes" else np.sin(angle * cut.waves)
    return ellipse(x, y, CX, CY - 3, i.width + cut.side, TOP - 3 + cut.lift) - cut.wave * wave


def back_hair(i, c):
    """What falls behind the neck."""
    cut = CUTS[i.hair]
    if not cut.length:
        return
    x, y = c.x, c.y
    wide = i.width + cut.side + (1.5 * smooth(y, 35, 60) if cut.length > 50 else 0)
    tip = .04 * np.clip(y - cut.length + 9, 0, 9) ** 2
    fall = np.maximum(np.abs(x - CX) - wide + tip, np.maximum(y - cut.length, CY - 4 - y))
    fall = np.minimum(fall + cut.wave * np.sin(y * .9), outline(i, x, y, cut))
    if i.style != "soft3d":
        c.paint(ink(i), c.cover(fall - .9))
    c.paint(shade(i.hair_colour, .72 if cut.length > 45 else .92), c.cover(fall))


def ears(i, c):
    """Half hidden at the sides of the face."""
    for side in (-1, 1):
        ear = ellipse(c.x, c.y, CX + side * (i.width + .3), 32.5, 2.6, 4.2)
        if i.style != "soft3d":
            c.paint(ink(i), c.cover(ear - .8))
        c.paint(shade(i.skin, .93), c.cover(ear))
        c.paint(shade(i.skin, .7), c.cover(ellipse(c.x, c.y, CX + side * (i.width + .8), 32.5, 1.1, 2.2), .8))
        if i.earrings:
            c.paint((.95, .82, .35), c.cover(np.hypot(c.x - CX - side * (i.width + .8), c.y - 38) - 1.1))


def skin(i, c):
    """The face itself, shaded in its style, with nose, cheeks, beard and freckles."""
    x, y, s = c.x, c.y, i.style
    d = face(i, x, y)
    if s != "soft3d":
        c.paint(ink(i), c.cover(d - .8))
    inside, tone = c.cover(d), np.asarray(i.skin, np.float32)
    if s == "soft3d":
        tone = tone[:, None, None] * _sphere(i, x, y)
    c.paint(tone, inside)
    if s == "line":
        c.paint(shade(i.skin, .80), inside * c.cover(CX + 9.5 - 3 * np.sin((y - 14) * .16) - x))
        hatch = np.abs((x * .7 + y) % 2.6 - 1.3) - .28
        c.paint(shade(i.skin, .62), .6 * inside * c.cover(np.maximum(hatch, CX + 11.5 - x)))
    for side in (-1, 1):                                                 # cheeks
        c.paint((.93, .45, .42), BLUSH[s] * inside * c.cover(ellipse(x, y, CX + side * 10, 38, 4.2, 2.6), 3))
    if i.freckles:
        for k in range(10):
            c.paint(shade(i.skin, .66), .7 * c.cover(np.hypot(x - CX - (k - 4.5) * 2.3, y - 36.2 - 1.3 * np.sin(k * 2.4)) - .45))
    if i.beard:
        u = np.abs(x - CX)
        edge = np.where(u < 9, 39.6 + .8 * np.cos(u * .5), 43.5 - 14 * i.beard * smooth(u, 8.5, i.width))      # moustache, cheeks
        hair = np.maximum(edge - y, -ellipse(x, y, CX, MOUTH_Y + 1.0, 8.4, 3.2))
        c.paint(shade(i.hair_colour, .85), (.6 + .35 * i.beard) * inside * c.cover(hair, 1.2))
    _nose(i, c)


def _sphere(i, x, y):
    """Brightness of a ball lit from the upper left, (h, w) around 1."""
    nx, ny = (x - CX) / (i.width + 1), (y - CY) / np.where(y < CY, TOP, CHIN)
    nz = np.sqrt(np.clip(1 - nx ** 2 - ny ** 2, 0, 1))
    light = np.clip(-.42 * nx - .40 * ny + .82 * nz, 0, 1)
    return (.60 + .46 * light + .06 * smooth(nz, .8, 1)).astype(np.float32)


def _nose(i, c):
    """A hint in each style: dot, stroke, or bump with a light and a shadow."""
    x, y, n = c.x, c.y, i.nose
    if i.style == "flat":
        c.paint(shade(i.skin, .72), c.cover(ellipse(x, y, CX + .4, NOSE_Y + .6, 1.3 * n, .8 * n), 1))
    elif i.style == "line":
        c.paint(ink(i), .8 * c.cover(np.minimum(segment(x, y, CX + .4, NOSE_Y - 4 * n, CX + 2.3 * n, NOSE_Y + .6, .42),
                                                segment(x, y, CX + 2.3 * n, NOSE_Y + .6, CX - .6, NOSE_Y + 1.3, .42))))
    else:
        c.paint(shade(i.skin, .66), .8 * c.cover(ellipse(x, y, CX + .5, NOSE_Y + 1.8, 3.0 * n, 1.1), 1.6))
        c.paint(shade(i.skin, .8), .5 * c.cover(ellipse(x, y, CX + 2 * n, NOSE_Y - 2, 1.2, 4.5), 2))
        c.paint(shade(i.skin, 1.35), .8 * c.cover(ellipse(x, y, CX - .4, NOSE_Y - .6, 1.6 * n, 1.9 * n), 2))


def hairline(i, x, cut):
    """Height of the hair's lower edge over the face, units, for each x."""
    t = (x - CX) / i.width
    sides = 13 * np.abs(np.clip(t, -1.1, 1.1)) ** 3
    top = CY - TOP
    if cut.fringe == "bangs":
        return top + cut.depth + .9 * np.abs((x * .36 + i.part) % 2 - 1) + .5 * sides
    if cut.fringe == "spikes":
        return top + cut.depth - 5.0 * np.abs((x * .21 + i.part) % 2 - 1) + .6 * sides
    if cut.fringe == "brim":
        return top + cut.depth + 1.5 * t ** 2
    if cut.fringe == "side":
        return top + cut.depth - 4.5 * np.tanh(2.2 * (t + .45 * i.part) * np.sign(-i.part)) + .8 * sides
    if cut.fringe == "part":
        return top + 2 + cut.depth * np.abs(np.clip(t - .15 * i.part, -1.2, 1.2)) ** .8 + .4 * sides
    return top + cut.depth + sides


def front_hair(i, c):
    """The cap, cut away below the hairline; locks beside the face; a shine or strands in the style."""
    cut = CUTS[i.hair]
    if cut.fringe == "none":
        return
    x, y, s = c.x, c.y, i.style
    line = hairline(i, x, cut)
    side = np.abs(x - CX) - i.width
    locks = np.maximum(np.maximum(-1.8 + .08 * (y - CY) - side, side - cut.side), y - CY - cut.locks + 1.2 * np.abs(side))
    cap = np.maximum(outline(i, x, y, cut), (y - line) * .7)
    cap = np.maximum(cap, y - CY - 3)
    hair = np.minimum(cap, np.maximum(locks, CY - 8 - y)) if cut.locks else cap
    if cut.bun:
        hair = np.minimum(hair, ellipse(x, y, CX, CY - TOP - cut.bun * .45, cut.bun, cut.bun * .9))
    base = crown(i)
    if s == "flat":
        c.paint(shade(i.skin, .80), c.cover(face(i, x, y)) * c.cover(np.maximum(hair - 1.6, y - CY - 8)) * (y > CY - 18))
    elif s == "soft3d":
        c.paint(shade(i.skin, .55), .5 * c.cover(face(i, x, y)) * c.cover(hair - 1.2, 4))
    if s != "soft3d":
        c.paint(ink(i), c.cover(hair - .8))
    c.paint(base, c.cover(hair))
    if cut.fabric:
        return _knit(c, c.cover(hair), base, line)
    _shine(i, c, c.cover(hair), base)


def _knit(c, inside, base, line):
    """A ribbed cap with a turned-up brim."""
    ribs = np.abs((c.x + .12 * (c.x - CX) * (30 - c.y) * .1) % 3 - 1.5) - .5
    c.paint(shade(base, .82), inside * c.cover(ribs, 1.2))
    brim = np.maximum(line - 5.5 - c.y, c.y - line)
    c.paint(shade(base, .62), inside * c.cover(brim - .6))
    c.paint(shade(base, 1.18), inside * c.cover(brim))


def _shine(i, c, inside, base):
    """flat: a zigzag of light; line: strands in ink; soft3d: a round highlight with fine strands."""
    x, y = c.x, c.y
    angle, radius = np.arctan2(y - CY - 6, x - CX), np.hypot((x - CX) / i.width, (y - CY) / TOP)
    if i.style == "flat":
        band = np.abs(radius - .86 - .05 * np.sin(angle * 17)) - .055
        c.paint(shade(base, 1.4), .8 * inside * c.cover(band * 16) * smooth(np.abs(angle + 1.9), 1.1, .7))
        c.paint(shade(base, .75), inside * c.cover(.9 - np.abs(x - CX) / i.width * 1.02) * .8)
    elif i.style == "line":
        c.paint(shade(base, .55), .75 * inside * c.cover(np.abs((angle * 9 + .6 * np.sin(radius * 6)) % 1 - .5) * 3 - .32))
        c.paint(shade(base, 1.3), .5 * inside * c.cover(ellipse(x, y, CX - 7, 13, 5, 2.5), 1))
    else:
        strands = .07 * np.sin(angle * 46) + .05 * np.sin(angle * 25 + 1)
        light = .72 + .55 * np.exp(-((radius - .84) / .16) ** 2) * np.exp(-((angle + 2.0) / .7) ** 2) + strands
        c.paint(np.clip(base[:, None, None] * light + .13 * np.clip(light - 1, 0, 1), 0, 1), inside)
