"""What the DiT trains on: latents, conditions and tokens of whole splits, and the batches cut from them."""
import hashlib
import json
import mmap
import os
import shutil
import warnings
import zlib
from copy import copy
from dataclasses import dataclass, fields, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from . import ranks
from .config import SCRATCH, Progress, UserError, atomic, resumable
from .data import STYLES, Clips, box_map, eye_box, per_latent, to_float
from .vae import i2v_condition


# -------------------------------------------------------------------------------------------------------- prompts
def prompt(style: str | None, mode: str | None, dim: int) -> Tensor:
    """The miniature's text encoder: one fixed random vector a word, "face <style> <mode>" -> (3, dim). A style that is not said is the mean of all:
    a word of its own would be one that speech was never trained with (measured: lip r 0.90, with the mean 0.93, as with the right word). UserError for an unknown one."""
    if style not in (None, *STYLES):
        raise UserError(f"style {style!r} is unknown to these models; choose one of {', '.join(STYLES)}")
    vector = lambda word: torch.randn(dim, generator=torch.Generator().manual_seed(zlib.crc32(word.encode())))
    look = vector(style) if style else torch.stack([vector(each) for each in STYLES]).mean(0)
    return torch.stack([vector("face"), look, vector(mode or "any")])


# -------------------------------------------------------------------------------------------------------- latents
@dataclass
class Batch:
    """What the DiT trains on. B clips, F latent frames; `weight` is the loss weight of each latent."""
    z: Tensor                                    # (B, 16, F, h, w)
    cond: Tensor                                 # (B, 20, F, h, w): mask 4 | image latents 16
    audio: Tensor | None                         # (B, F, tokens, audio_dim); None: the model hears nothing
    face: Tensor                                 # (B, F, h/2, w/2) face region in token units
    weight: Tensor                               # (B, 16, F, h, w); (B, 1, F, h, w) where all channels count alike
    text: Tensor                                 # (B, 3, text_dim)
    image: Tensor                                # (B, 17, image_dim)
    sway: Tensor | None = None                   # (B, 2, 16, h, w): how a latent frame changes as the head moves, see `sway`

    def __len__(self) -> int:
        return len(self.z)

    def each(self, fn) -> "Batch":
        return Batch(*(None if v is None else fn(v) for v in (getattr(self, f.name) for f in fields(self))))

    def repeat(self, n: int) -> "Batch":
        return self.each(lambda v: v.repeat_interleave(n, 0))

    def to(self, device) -> "Batch":
        return self.each(lambda v: v.to(device))

    def silent(self) -> "Batch":
        """The same clips for a model that has not met sound."""
        return replace(self, audio=None)

    def deployed(self) -> "Batch":
        """The same clips as a stream would meet them: the face is where the first picture has it, wherever it will move."""
        return replace(self, face=self.face[:, :1].expand_as(self.face))

    def keep(self, **clips: Tensor) -> "Batch":
        """Condition dropout for classifier-free guidance: zeros in place of a condition, `keep(audio=(B,) of bools)`."""
        kept = lambda x, some: x * some.to(x).view(-1, *[1] * (x.dim() - 1))
        return replace(self, **{name: kept(getattr(self, name), some) for name, some in clips.items()})

    def conditions(self) -> dict[str, Tensor | None]:
        """Keyword arguments of `WanDiT.forward`."""
        return {"text": self.text, "image": self.image, "audio": self.audio, "audio_mask": self.face}


# -------------------------------------------------------------------------------------------------------- to disk
TOGETHER = 8                                     # clips encoded at once: the last bits of latents depend on it
MODES = {"speaking": "speaking", "listening": "listening", "ending": "listening", "generic": None}
DTYPES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16", torch.int64: "I64"}          # safetensors' names


def encode_split(clips: Clips, vae, encoder, conditions, p, path: Path, hear=None) -> None:
    """Everything a `Batch` is cut from, for a whole split, once, as the safetensors file `path`; if that is there, nothing is done.

    vae, encoder, conditions: the miniature's or the full-size ones (`wan_vae.load_codec`, `wav2vec.load_speech`,
    `conditions.load_conditions`). p: condition (see `vae.i2v_condition`), text_dim, mouth_weight, eye_weight, picture_weight, sway (whether a loss will ask for `Batch.sway`); with
    `hear` also seed. hear, for training in noise: (waves (n, samples), which clips they are of, generator) -> what is heard of them; None: all as it is.
    A batch is on disk before the next is made, so memory holds one. Killed, it goes on from the files that it left beside
    `path`, to the same bytes. Of several processes (`ranks`) each makes its share of the batches.
    """
    half, mark, n = path.with_suffix(".half"), path.with_suffix(f".done-{ranks.RANK}-of-{ranks.WORLD}"), len(clips)
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        mine = range(ranks.RANK * TOGETHER, n, ranks.WORLD * TOGETHER)
        done = int(mark.read_text()) if half.exists() and mark.exists() else 0            # of my batches
        told, progress = prompts(clips.meta, conditions, p.text_dim), Progress(len(mine), f"encode {path.stem}", start=done)
        with os.fdopen(os.open(half, os.O_RDWR | os.O_CREAT), "r+b") as file:
            for lo in mine[done:]:
                part = encode(clips, range(lo, min(lo + TOGETHER, n)), vae, encoder, conditions, p, hear)
                head, at = layout({k: v.new_empty(n, *v.shape[1:], device="meta") for k, v in part.items()} | told)
                if lo == 0:
                    file.write(head)
                for k, v in {**part, **({} if lo else told)}.items():
                    file.seek(at[k] + lo * v[0].nbytes)
                    file.write(v.contiguous().view(torch.uint8).numpy())
                file.flush()
                os.fsync(file.fileno())
                progress.step()
                with atomic(mark, every_rank=True) as temporary:
                    temporary.write_text(str(progress.done))
        ranks.wait()
        if not ranks.RANK:
            os.replace(half, path)
    mark.unlink(missing_ok=True)
    ranks.wait()                                                                          # nobody's mark is left when the folder moves


@torch.no_grad()
def encode(clips: Clips, index: range, vae, encoder, conditions, p, hear=None) -> dict[str, Tensor]:
    """All but the text of a few clips one behind the other."""
    T, size = clips.frames.shape[1:3]
    n_latent, some = (T - 1) // 4 + 1, slice(index.start, index.stop)
    video = to_float(clips.frames[some])
    z = vae.encode(video).cpu()
    touched = lambda boxes, cells: torch.from_numpy(per_latent(box_map(boxes[some], size, cells)))
    waves = torch.stack([torch.as_tensor(clips.wave(i)) for i in index])                       # (n, samples)
    if hear is not None:
        waves = hear(waves, index, torch.Generator().manual_seed(index.start + 1_000_000 * p.seed))
    mouth, eyes = p.mouth_weight * touched(clips.mouth, z.shape[-1]), p.eye_weight * touched(eye_box(clips.face), z.shape[-1])     # (n, F, h, w)
    each = vae.cost.cpu().view(-1, 1, 1, 1) ** p.picture_weight                                # (16, 1, 1, 1)
    return {"z": z, "cond": i2v_condition(vae, video[:, :, :1], n_latent, p.condition).cpu(),
            "image": conditions.tokens(video[:, :, 0]),
            "audio": torch.stack([encoder.tokens(wave, 0, n_latent).cpu() for wave in waves]),
            "face": touched(clips.face, z.shape[-1] // 2),
            "weight": each / each.mean() * torch.maximum(mouth, eyes).clamp(min=1)[:, None],
            **({"sway": torch.cat([sway(vae, x, box) for x, box in zip(video[:, None, :, 0], clips.face[some, 0])])} if p.sway else {})}


def sway(vae, picture: Tensor, face) -> Tensor:
    """Two orthonormal directions in which a latent frame of `picture` (1, 3, H, W) changes when the head moves, its box being `face`, sideways and up or down: (1, 2, 16, h, w).

    The picture is drawn twice for each, the face moved by half a 64th of its height to either side, softly blended into what stands behind, and the latents' difference taken.
    """
    size = picture.shape[-1]
    x0, y0, x1, y1 = (float(v) for v in face)
    y, x = torch.meshgrid(torch.arange(size) + 0.5, torch.arange(size) + 0.5, indexing="ij")
    radius = ((2 * x - x0 - x1) / (x1 - x0)) ** 2 + ((2 * y - y0 - y1) / (y1 - y0)) ** 2
    head = torch.sigmoid(8 * (1 - radius / 1.3))                                               # (H, W): 1 on the face, 0 away from it
    def latent(dx: float, dy: float) -> Tensor:
        at = torch.stack([x - dx * size / 64, y - dy * size / 64], -1)[None] * 2 / size - 1
        moved = head * F.grid_sample(picture, at, mode="bicubic", padding_mode="border", align_corners=False) + (1 - head) * picture
        return vae.encode(moved[:, :, None].expand(-1, -1, 9, -1, -1))[:, :, 2].cpu()          # a still clip's third latent frame: (1, 16, h, w)
    moves = torch.stack([latent(0.5, 0) - latent(-0.5, 0), latent(0, 0.5) - latent(0, -0.5)], 1)
    return torch.linalg.qr(moves.flatten(2).mT)[0].mT.reshape(moves.shape)


def prompts(meta: list[dict], conditions, dim: int) -> dict[str, Tensor]:
    """text (prompts, tokens, dim): each prompt of a split once, for it has 8 MB at full size; prompt (n,): which of them is a clip's."""
    said = [(m["style"], MODES[m["kind"]]) for m in meta]
    each = list(dict.fromkeys(said))
    text = torch.stack([conditions.prompt(*words, dim) for words in each])
    return {"text": text, "prompt": torch.tensor([each.index(words) for words in said])}


def layout(tensors: dict[str, Tensor]) -> tuple[bytes, dict[str, int]]:
    """What a safetensors file of these tensors begins with (a length, then JSON), and where in the file each tensor does.

    Only their shapes and types matter: they may be on the device `meta`.
    """
    head, end = {}, 0
    for name in sorted(tensors, key=lambda name: (-tensors[name].itemsize, name)):        # safetensors' own order
        x, begin = tensors[name], end
        end = begin + x.nbytes
        head[name] = {"dtype": DTYPES[x.dtype], "shape": list(x.shape), "data_offsets": [begin, end]}
    text = json.dumps(head, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)                                                       # so that tensors are aligned
    return len(text).to_bytes(8, "little") + text, {name: 8 + len(text) + x["data_offsets"][0] for name, x in head.items()}


def publish(work: Path, folder: Path) -> None:
    """The finished splits as `folder` too, all or none, without writing them again where files can be linked; `work` stays, for a stage that fails later."""
    def same(source, target):
        try:
            os.link(source, target)
        except OSError:                          # another disk, or one without links
            shutil.copyfile(source, target)
    with atomic(folder) as whole:                # DVC clears away what is half there
        shutil.copytree(work, whole, copy_function=same)


def work_folder(p, *inputs: Path) -> Path:
    """Where splits wait for one another: another folder for other parameters, other code, or other inputs, files or folders of files.

    Those are known by their sizes and times of change: a split's pictures are terabytes at full size, too much to read for a name.
    """
    code = [path.read_text() for path in sorted(Path(__file__).parent.glob("*.py"))]
    files = [path for given in inputs for path in (sorted(given.iterdir()) if given.is_dir() else [given])]
    known = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in files]
    return resumable(SCRATCH / f"latents-{hashlib.sha256(repr((vars(p), known, code)).encode()).hexdigest()[:12]}")


def mapped(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file, to be read and never written to: they are a map of the file, of any size.

    A map that may be written to, as `load_file` makes it, counts as memory, and Linux refuses one that is larger than all there is.
    """
    from safetensors import safe_open
    with safe_open(path, "np"):                                          # its header is sound, and the file as long as that says
        pass
    with open(path, "rb") as file:
        start = 8 + int.from_bytes(file.read(8), "little")
        head = json.loads(file.read(start - 8))
        memory = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    with warnings.catch_warnings(action="ignore", category=UserWarning):                  # torch has no tensors that cannot be written to
        whole = torch.frombuffer(memory, dtype=torch.uint8)
    types = {name: dtype for dtype, name in DTYPES.items()}
    part = lambda x: whole[start + x["data_offsets"][0]:start + x["data_offsets"][1]].view(types[x["dtype"]]).view(x["shape"])
    return {name: part(x) for name, x in head.items() if name != "__metadata__"}


class Latents:
    """One split's latents and tokens; `batch(index)` cuts a `Batch`. The file is `mapped`: only what is cut is read."""

    def __init__(self, path: Path):
        if not Path(path).exists():
            raise UserError(f"{path} is missing: run `make repro` (stage latents)")
        try:
            self.store = mapped(path)
        except Exception as e:
            raise UserError(f"{path} cannot be read ({type(e).__name__}): delete it and run `make repro` (stage latents)") from e

    def __len__(self) -> int:
        return len(self.store["z"])

    def batch(self, index) -> Batch:
        s = {k: v[index] for k, v in self.store.items() if k != "text"}
        return Batch(s["z"], s["cond"], s["audio"], s["face"], s["weight"], self.store["text"][s["prompt"]], s["image"], s.get("sway"))

    def first(self, n: int) -> "Latents":
        return self.rows(slice(n))

    def rows(self, index) -> "Latents":
        """These clips alone."""
        part = copy(self)
        part.store = {k: v if k == "text" else v[index] for k, v in self.store.items()}
        return part

    def told(self, condition: str) -> "Latents":
        """The same for a model with this condition (`vae.i2v_condition`): "zero" leaves the picture on latent frame 0 alone, any other all as it is."""
        if condition != "zero":
            return self
        part, cond = copy(self), self.store["cond"].clone()
        cond[:, 4:, 1:] = 0
        part.store = self.store | {"cond": cond}
        return part

    def spread(self) -> list[list[float]]:
        """How far latents stray from their reference picture's, place by place (h, w): what `flow.reference_prior` takes as known."""
        std = (self.store["z"] - self.store["cond"][:, 4:]).square().mean((0, 1, 2)).sqrt()
        std = F.avg_pool2d(F.pad(std[None, None], (1,) * 4, mode="replicate"), 3, 1)[0, 0]            # faces elsewhere move elsewhere
        return [[round(v, 3) for v in row] for row in std.clamp_min(0.05).tolist()]

    @property
    def shape(self) -> tuple[int, ...]:
        """(16, F, h, w)"""
        return tuple(self.store["z"].shape[1:])

    def draw(self, n: int, g: torch.Generator) -> Tensor:
        """Indices (n,) of clips, with replacement; a function of the generator's state alone, so that resuming is exact."""
        return torch.randint(len(self), (n,), generator=g)
