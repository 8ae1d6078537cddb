"""Moving pictures of a portrait: the head's texture warped by the pose, eyes, brows and mouth drawn over it.

- Features are bands between curves: coverage is exact down each pixel column, so thin lids and lips stay smooth at any size.
- Frames are channels first while they are painted, a few at a time, so that everything stays in the processor's cache.
"""
import numpy as np

from .portrait import BROW_Y, CHIN, CX, CY, EYE_Y, FINE, MARGIN, MOUTH_Y, TOP, UNITS, ink, layers, shade, smooth

OPEN, JAW = 10.0, 1.5                          # units between the lips, and of the chin's fall, at opening 1
NARROW, WIDE, PURSED = 6.0, 10.2, 0.40         # half width at width 0 and 1; share of it that rounding takes away
REACH = 13.0                                   # nothing of the mouth or the moving chin is further from its middle, sideways
INSIDE = (.23, .055, .08)                       # colour between the lips
PIVOT_Y = 55.0                                 # the head turns about the neck
SPILL = .115                                   # of a unit's light, to each neighbour: a blur with deviation 0.48 units
GROUP = 16                                     # frames of 64x64 rendered at once: they fit the processor's cache


def render(identity, track, size=64):
    """-> uint8 (T, size, size, 3), anti-aliased; the same picture at any size."""
    back, head = layers(identity, size)
    out = np.empty((len(track), size, size, 3), np.uint8)
    group = max(1, round(GROUP * (UNITS / size) ** 2))
    for f in range(0, len(track), group):
        part = track[f:f + group]
        frames = np.repeat(back[:, None], len(part), 1)                   # (3, t, H, W) 0..255: channels first, long inner loops
        _head(identity, part, frames, head)
        _eyes(identity, part, frames)
        _mouth(identity, part, frames)
        out[f:f + group] = np.clip(_lens(frames, SPILL * (size / UNITS) ** 2) + .5, 0, 255).transpose(1, 2, 3, 0)
    return out


def _lens(frames, spill):
    """The softness of a real camera's picture: each pixel's light spills over its neighbours, in passes (3, t, H, W)."""
    passes = int(np.ceil(4 * spill))
    share = np.float32(spill / passes)
    for axis in (2, 3) * passes:
        edge = [(1, 1) if a == axis else (0, 0) for a in range(4)]
        p = np.pad(frames, edge, mode="edge")
        at = lambda lo: p[(slice(None),) * axis + (slice(lo, lo + frames.shape[axis]),)]
        frames = (1 - 2 * share) * at(1) + share * (at(0) + at(2))
    return frames


def _local(pose, x, y):
    """Picture coordinates (units) -> the head's own, where it does not move."""
    dx, dy = x - CX - pose[:, 0, None, None], y - PIVOT_Y - pose[:, 1, None, None]
    c, s = np.cos(pose[:, 2, None, None]), np.sin(pose[:, 2, None, None])
    return c * dx + s * dy + np.float32(CX), c * dy - s * dx + np.float32(PIVOT_Y)


def _window(track, frames, box, sub=1):
    """A view of frames in `box` (units x0, y0, x1, y1) and the head's coordinates there, (t, h, w sub)."""
    size = frames.shape[-1]
    scale = size / UNITS
    x0, y0, x1, y1 = (int(np.clip(np.floor(v * scale), 0, size)) for v in box)
    x = ((np.arange(x0 * sub, x1 * sub) + .5) / (scale * sub)).astype(np.float32)
    y = ((np.arange(y0, y1) + .5) / scale).astype(np.float32)
    return frames[..., y0:y1, x0:x1], *_local(track.pose.astype(np.float32), x[None, None, :], y[None, :, None])


def _head(i, track, frames, head):
    """Bilinear warp of the head's texture, chin lowered with the mouth, over the frames."""
    view, x, y = _window(track, frames, (4, 0, 60, 60))
    fall = JAW * track.mouth[:, 0, None, None] * np.clip(1 - ((x - CX) / REACH) ** 2, 0, 1)
    y = y - fall * smooth(y, MOUTH_Y - 1, CY + CHIN - 3)
    texels = FINE * frames.shape[-1] / UNITS
    u, v = (x + MARGIN) * texels - .5, (y + MARGIN) * texels - .5
    n = head.shape[-1]
    iu, iv = np.clip(u, 0, n - 2).astype(np.intp), np.clip(v, 0, n - 2).astype(np.intp)
    at, fu, fv = iv * n + iu, u - iu, v - iv                              # (t, h, w)
    *colour, alpha = (_sample(plane.ravel(), at, n, fu, fv) for plane in head)
    for channel, c in zip(view, colour):
        channel *= 1 - alpha
        channel += c


def _sample(texture, at, n, fu, fv):
    """Bilinear: four texels from index `at`, rows n apart."""
    pick = lambda k: texture.take(at + k, mode="clip")                    # clip spares a bounds check: at is inside
    upper, lower = pick(0), pick(n)
    upper += fu * (pick(1) - upper)
    lower += fu * (pick(n + 1) - lower)
    return upper + fv * (lower - upper)


def _band(y, top, bottom, px):
    """Coverage (t, h, w) of a pixel by the band between two curves (t, h, 2 w): exact down each of two columns."""
    half = px / 2
    c = np.clip((np.minimum(y + half, bottom) - np.maximum(y - half, top)) / px, 0, 1)
    return .5 * (c[..., ::2] + c[..., 1::2])


def _disc(x, y, rx, ry, px):
    """Coverage (t, h, w) of an upright ellipse at the origin, from coordinates (t, h, 2 w)."""
    k = np.sqrt((x / rx) ** 2 + (y / ry) ** 2)
    c = np.clip(.5 - (k - 1) * min(rx, ry) / px, 0, 1)
    return .5 * (c[..., ::2] + c[..., 1::2])


def _paint(view, colour, cover):
    """Lay `colour` (3,) over view (3, t, h, w), at cover (t, h, w)."""
    for channel, value in zip(view, colour):
        channel += cover * (np.float32(255 * value) - channel)


def _per(v):
    return v.astype(np.float32)[:, None, None]


def _mouth(i, track, frames):
    """Lips, dark inside, teeth, tongue: all bands whose edges follow the three truths."""
    px = UNITS / frames.shape[-1]
    view, x, y = _window(track, frames, (CX - 18, MOUTH_Y - 10, CX + 18, CY + CHIN + 6), sub=2)
    opening, width, rounding = (_per(track.mouth[:, k]) for k in range(3))
    half = i.mouth * (NARROW + (WIDE - NARROW) * width) * (1 - PURSED * rounding)
    x = (x - CX) / half
    y = y - MOUTH_Y + i.smile * (x * x - .4) * (1 - rounding)             # corners up is a smile
    gap = OPEN * opening
    power = .75 - .25 * rounding                                          # pointed corners, round when pursed
    inner = np.clip(1 - x * x, 0, 1) ** power
    up, down = -.36 * gap * inner, .64 * gap * inner
    _lips(i, view, x, y, up, down, half, rounding, px)
    hole = _band(y, up, down, px)
    _paint(view, INSIDE, hole)
    tongue = _band(y, np.maximum(up, down - .3 * gap * np.clip(1 - (x / .75) ** 2, 0, 1)), down, px)
    _paint(view, (.80, .36, .38), tongue * .9)
    teeth = _band(y, up, up + .2 * gap * inner ** .5, px) * np.clip((.86 - np.abs(x[..., ::2])) * 6, 0, 1)
    _paint(view, (.97, .96, .93), teeth * (1 - .75 * rounding))
    seam = np.clip(1 - np.abs(x), 0, 1) ** .35 * (.55 if i.style == "flat" else .45)
    _paint(view, INSIDE, _band(y, up - seam, up + seam * .6, px) * (.9 - .3 * opening))


def _lips(i, view, x, y, up, down, half, rounding, px):
    """Upper lip with its bow, lower lip fuller; flat wears them thin, line rings them in ink, soft3d gives them a shine."""
    x = x * half / (half + .9)
    rim = np.clip(1 - x * x, 0, 1) ** .6
    full = i.lips * (1 + .35 * rounding) * (.9 if i.style == "flat" else 1)
    bow = 1 - .28 * np.exp(-(x / .16) ** 2)
    top, bottom = up - 1.55 * full * rim * bow, down + 2.0 * full * rim
    if i.style == "line":
        _paint(view, ink(i), _band(y, top - .6 * rim ** .3, bottom + .6 * rim ** .3, px) * .75)
    _paint(view, shade(i.lip_colour, .88), _band(y, top, up, px))
    _paint(view, i.lip_colour, _band(y, up, bottom, px))
    if i.style == "soft3d":
        middle = np.clip(1 - (x[..., ::2] / .6) ** 2, 0, 1)
        _paint(view, shade(i.lip_colour, 1.5), .6 * middle * _band(y, down + .5 * full * rim, down + 1.15 * full * rim, px))
        _paint(view, shade(i.skin, .7), .5 * middle * _band(y, bottom + .5, bottom + 1.7, px))


EYE = {"flat": (4.9, 4.9, 4.2, 3.5, 4.4), "line": (4.3, 2.9, 2.3, 2.2, 2.4),
       "soft3d": (4.2, 2.5, 2.1, 2.1, 2.1)}    # half width, height above and below, radii of the iris
LASH = {"flat": 1.25, "line": .95, "soft3d": .7}


def _eyes(i, track, frames):
    """Both eyes as one, mirrored about the nose (gaze is not): white, iris, pupil, light, lid, brow, glasses."""
    px, s = UNITS / frames.shape[-1], i.style
    view, x, y = _window(track, frames, (CX - 18, BROW_Y - 7, CX + 18, EYE_Y + 9), sub=2)
    side = np.sign(x - CX)
    w, up, low, rx, ry = (v * i.eye_size for v in EYE[s])
    e = np.abs(x - CX) - i.eye_gap
    v = y - EYE_Y + i.eye_tilt * e
    arch = np.clip(1 - (e / w) ** 2, 0, 1) ** .6
    shut = _per(track.blink)
    floor = low * arch
    lid = -up * arch * (1 - shut) + shut * floor * .85
    open_ = _band(v, lid, floor, px)
    _paint(view, (.98, .98, .97) if s != "soft3d" else (.94, .93, .92), open_)
    gx, gy = _per(track.gaze[:, 0]) * (w - rx * .8) * .9, _per(track.gaze[:, 1]) * 1.1
    ix, iy = side * e - gx, v - gy + (.2 if s == "flat" else .15)
    _paint(view, shade(i.eye_colour, .45), open_ * _disc(ix, iy, rx, ry, px))
    _paint(view, shade(i.eye_colour, 1.12), .9 * open_ * _disc(ix, iy - .25 * ry, rx * .78, ry * .72, px))
    _paint(view, (.05, .04, .06), open_ * _disc(ix, iy, rx * .45, ry * .5, px))
    _paint(view, (1, 1, 1), open_ * _disc(ix + .38 * rx, iy + .42 * ry, rx * .34, ry * .28, px))
    lash = _band(v, lid - LASH[s] * np.clip(1.15 - (e / w) ** 2, 0, 1) ** .5, lid + .15, px) * (np.abs(e[..., ::2]) < w)
    _paint(view, ink(i) if s != "soft3d" else shade(i.hair_colour, .35), lash)
    _paint(view, shade(i.skin, .6), .7 * _band(v, floor, floor + .6, px) * (np.abs(e[..., ::2]) < w * .8))
    _brows(i, track, view, e, y, px)
    if i.glasses:
        ring = np.sqrt((e / (w + 1.6)) ** 2 + ((y - EYE_Y) / (max(up, low) + 2)) ** 2) - 1
        rim = np.clip(.5 - (np.abs(ring) * (w + 1) - .45) / px, 0, 1)
        bridge = np.clip(.5 - (np.abs(y - EYE_Y + .5) - .4) / px, 0, 1) * (e < -w - 1.4)
        _paint(view, (.14, .13, .16), .9 * np.maximum(rim, bridge)[..., ::2])


def _brows(i, track, view, e, y, px):
    """Tapered arcs that rise with `brow`."""
    t = np.clip((e + 5) / 10.5, 0, 1)                                     # 0 at the nose, 1 at the temple
    rest = BROW_Y + (2.1 if i.style == "soft3d" else .9)
    mid = rest - 1.6 * np.sin(np.pi * (t * .8 + .1)) - i.brow_tilt * e - 1.7 * _per(track.brow)
    thick = i.brow * (.95 - .55 * t) * ((e > -5) & (e < 5.5))
    colour = shade(i.hair_colour, .7) if max(i.hair_colour) < .75 else shade(i.hair_colour, .55)
    _paint(view, colour, _band(y, mid - thick, mid + thick, px))


# ---- boxes -------------------------------------------------------------------------------------

def _box(track, size, centre, half_w, above, below):
    dx, dy = centre[0] - CX, centre[1] - PIVOT_Y
    c, s = np.cos(track.pose[:, 2]), np.sin(track.pose[:, 2])
    x, y = CX + track.pose[:, 0] + c * dx - s * dy, PIVOT_Y + track.pose[:, 1] + s * dx + c * dy
    return (np.stack([x - half_w, y - above, x + half_w, y + below], 1) * size / UNITS).clip(0, size).astype(np.float32)


def mouth_box(identity, track, size=64):
    """float32 (T, 4): x0, y0, x1, y1 in pixels around all that changes when only the mouth does, chin included."""
    return _box(track, size, (CX, MOUTH_Y), REACH + 1.5, 9.5, CY + CHIN - MOUTH_Y + JAW + 3.0)


def face_box(identity, track, size=64):
    """float32 (T, 4): x0, y0, x1, y1 in pixels around the face from hairline to chin, following the sway."""
    return _box(track, size, (CX, CY), identity.width + 2.0, TOP, CHIN + JAW + 1.0)
