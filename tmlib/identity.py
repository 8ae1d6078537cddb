"""Who an avatar is: a handful of numbers, colours and names.

Colours are (r, g, b) in sRGB, [0, 1]; lengths are units, 64 to the side of the picture.
"""
from dataclasses import dataclass

import numpy as np

STYLES = ("flat", "line", "soft3d")            # anime, drawn in ink, softly shaded

SKINS = ((.99, .87, .78), (.96, .80, .69), (.90, .71, .57), (.80, .60, .45), (.66, .46, .33), (.50, .34, .25), (.38, .25, .19))
HAIRS = ((.10, .08, .09), (.22, .14, .10), (.36, .22, .13), (.55, .34, .16), (.80, .62, .32), (.93, .83, .60), (.60, .22, .10),
         (.62, .62, .64), (.90, .90, .92))
DYES = ((.28, .38, .78), (.88, .42, .62), (.25, .60, .58), (.55, .35, .75), (.80, .25, .28), (.35, .68, .40))
EYES = ((.25, .16, .10), (.42, .27, .13), (.25, .48, .72), (.28, .52, .34), (.45, .50, .55), (.55, .40, .15))
CLOTHS = ((.75, .22, .24), (.16, .28, .52), (.20, .48, .38), (.93, .78, .32), (.92, .91, .87), (.22, .22, .26),
          (.56, .36, .62), (.86, .50, .32))
SCENES = (((.70, .83, .92), (.92, .95, .96)), ((.97, .87, .74), (.93, .70, .60)), ((.60, .75, .68), (.86, .91, .80)),
          ((.42, .44, .62), (.72, .68, .80)), ((.30, .36, .44), (.52, .60, .66)), ((.95, .92, .86), (.85, .80, .73)))


@dataclass(frozen=True)
class Cut:
    """A hair cut: height above the skull, width beyond the face, fringe (its kind and depth), wave of the outline, length behind
    and of the locks beside it, size of a bun; fabric: a cap, not hair."""
    lift: float
    side: float
    fringe: str
    depth: float
    wave: float
    waves: int
    length: float
    locks: float
    bun: float
    fabric: bool = False


CUTS = {                   # lift  side  fringe   depth wave waves length locks bun
    "bald":   Cut(0.0, 0.0, "none", 0.0, 0.0, 0, 0.0, 0.0, 0.0),
    "buzz":   Cut(0.8, 0.3, "arc", 5.5, 0.0, 0, 0.0, 0.0, 0.0),
    "crop":   Cut(3.0, 1.2, "side", 6.5, 0.0, 0, 0.0, 0.0, 0.0),
    "quiff":  Cut(5.0, 0.8, "side", 5.0, 0.5, 7, 0.0, 0.0, 0.0),
    "spiky":  Cut(4.5, 2.0, "spikes", 9.5, 1.7, 9, 0.0, 3.0, 0.0),
    "curly":  Cut(4.0, 3.0, "arc", 7.5, 0.9, 15, 44.0, 4.0, 0.0),
    "afro":   Cut(7.5, 7.0, "arc", 6.5, 0.4, 21, 42.0, 0.0, 0.0),
    "bob":    Cut(3.0, 2.6, "bangs", 10.0, 0.0, 0, 49.0, 17.0, 0.0),
    "curtain": Cut(3.0, 2.6, "part", 13.0, 0.0, 0, 64.0, 15.0, 0.0),
    "long":   Cut(3.0, 2.8, "side", 9.0, 0.3, 5, 70.0, 12.0, 0.0),
    "bun":    Cut(2.2, 1.0, "part", 8.0, 0.0, 0, 0.0, 0.0, 5.5),
    "beanie": Cut(4.6, 1.6, "brim", 9.0, 0.0, 0, 0.0, 0.0, 0.0, True),
    "fringe": Cut(3.2, 2.4, "bangs", 11.0, 0.5, 8, 66.0, 22.0, 0.0),
}


@dataclass(frozen=True)
class Identity:
    """Everything about a face that does not move. Colours are (r, g, b) in [0, 1]; lengths in 64ths of the picture's side."""
    style: str
    skin: tuple
    hair_colour: tuple
    eye_colour: tuple
    lip_colour: tuple
    cloth_colour: tuple
    hat_colour: tuple
    scene: tuple
    hair: str
    clothes: str
    backdrop: str
    part: float            # which side the hair is parted on, and how far: -1 .. 1
    width: float           # half width of the face
    jaw: float             # 0 square .. 1 pointed
    eye_size: float
    eye_gap: float
    eye_tilt: float
    brow: float            # thickness
    brow_tilt: float
    nose: float
    lips: float            # thickness
    mouth: float           # scale of its width
    smile: float           # corners up, in units
    glasses: bool
    beard: float           # 0 none .. 1 full
    freckles: bool
    earrings: bool


def sample_identity(rng, style):
    """A random face in one of STYLES; rng: numpy Generator. ValueError on an unknown style."""
    if style not in STYLES:
        raise ValueError(f"style {style!r} is none of {', '.join(STYLES)}")
    pick = lambda seq: seq[int(rng.integers(len(seq)))]
    span = lambda a, b: float(rng.uniform(a, b))
    near = lambda rgb, by=.04: tuple(float(np.clip(c + rng.uniform(-by, by), 0.03, 1)) for c in rgb)
    skin = near(pick(SKINS), .025)
    hair = pick([name for name in CUTS if not (style == "flat" and name in ("bald", "buzz"))])
    bearded = hair in ("bald", "buzz", "crop", "quiff", "spiky", "beanie") and rng.random() < (.2 if style == "flat" else .5)
    pink = np.array((.80, .34, .36) if skin[0] > .6 else (.74, .36, .40))   # paler than dark skin, darker than pale skin
    lip = near(.85 * (pink if rng.random() < .7 else np.array((.74, .15, .24))) + .15 * np.array(skin), .03)
    return Identity(
        style=style, skin=skin, hair_colour=near(pick(HAIRS + DYES * (2 if style == "flat" else 0))), eye_colour=near(pick(EYES)),
        lip_colour=lip, cloth_colour=near(pick(CLOTHS)), hat_colour=near(pick(CLOTHS)),
        scene=tuple(near(c) for c in pick(SCENES)), hair=hair, clothes=pick(("crew", "vneck", "collar", "hoodie")),
        backdrop=pick(("plain", "plain", "disc", "window")),
        part=float(rng.choice((-1, 1))) * span(.4, 1), width=span(15.2, 17.2), jaw=span(.0, 1), eye_size=span(.9, 1.12),
        eye_gap=span(7.2, 8.3), eye_tilt=span(-.12, .16), brow=span(.7, 1.35), brow_tilt=span(-.12, .15), nose=span(.8, 1.25),
        lips=span(.8, 1.3), mouth=span(.92, 1.08), smile=span(.9, 2.3), glasses=bool(rng.random() < .18),
        beard=span(.6, 1) if bearded else 0.0, freckles=bool(rng.random() < .15),
        earrings=bool(rng.random() < .25) and not bearded)
