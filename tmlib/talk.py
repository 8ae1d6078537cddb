"""A face and a voice become a video: `python -m tmlib.talk face.png speech.wav out.mp4`.

Special here:
- the video is written chunk by chunk while the stream runs, so memory does not grow with the speech;
- every mistake that can be seen beforehand is seen before the models load: one line, exit code 2, no file. Ctrl-C: 130;
- the frames are those of the live stream: the same seed, picture and sound give the same video.
"""

import argparse
import itertools
import math
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from . import config, media
from .config import FPS, FRAME, Progress, UserError

SECONDS = (1.0, 600.0)                          # of speech
SPEEDS = ("bf16", "fp8")
PLACEMENTS = ("serial", "overlap", "two_device", "two_process")              # those of `placement`, which needs torch


@dataclass(frozen=True)
class Talker:
    """All that talking needs of the models.

    stream: (image uint8 (size, size, 3), waves) -> generator of frames uint8 (t, size, size, 3), one item a chunk:
    4 chunk - 3 frames first, then 4 chunk each. It takes one wave float32 (FRAME t,) per chunk, the sound of just these
    frames, and may take some ahead. When `waves` ends, so do the frames. Closing the generator frees what it holds.
    """
    stream: Callable[[np.ndarray, Iterator[np.ndarray]], Iterator[np.ndarray]]
    in_world: Callable[[np.ndarray], bool]      # image -> whether it looks like what the models were trained on
    size: int                                   # pixels
    chunk: int                                  # latent frames


def talk(talker: Talker, image: np.ndarray, wave: np.ndarray, path, scale: int | None = None) -> int:
    """Make the video of `image` uint8 (size, size, 3) speaking `wave` float32 (n,) at 16 kHz; returns its number of frames.

    scale: whole-number enlargement; None: to about 384 pixels. Raises UserError when the file cannot be written.
    """
    total = -(-len(wave) // FRAME)            # the last frame may outlast the sound, never the other way round
    scale = scale or max(1, media.WATCHABLE // talker.size)
    progress, done = Progress(total, "talk"), 0
    with (media.VideoWriter(path, FPS, talker.size, scale=scale) as video,
          closing(talker.stream(image, waves(wave, talker.chunk))) as stream):
        for frames in stream:
            frames = frames[:total - done]
            video.write(frames, wave[done * FRAME:(done + len(frames)) * FRAME])
            done += len(frames)
            progress.step(len(frames))
        if done < total:
            raise UserError(f"{path}: the stream ended after {done} of {total} frames; nothing was written, run it again")
    return done


def waves(wave: np.ndarray, chunk: int) -> Iterator[np.ndarray]:
    """Wave (n,) -> one piece per chunk, the sound of just its frames; silence fills the last one."""
    at, frames = 0, 4 * chunk - 3               # latent frame 0 holds one video frame, every other four
    while at < len(wave):
        piece = wave[at:at + frames * FRAME]
        yield np.pad(piece, (0, frames * FRAME - len(piece)))
        at, frames = at + frames * FRAME, 4 * chunk


def default_models() -> Path:
    """The user's own run if there is one, else the small models that come with the workbook."""
    return config.MODELS if (config.MODELS / "student" / "stream.json").exists() else config.DATA / "demo"


def models_folder(given: str | None) -> Path:
    """The folder that --models names, or `default_models`; UserError if there is none."""
    folder = Path(given) if given else default_models()
    if not folder.is_dir():
        fix = "check the name" if given else "run `make repro`, or give a folder of trained models with --models"
        raise UserError(f"{folder}: no such folder of models; {fix}")
    return folder


@dataclass(frozen=True)
class Models:
    """A folder of trained models, and how its student was distilled (stream.json: steps, shift, cache, chunk, face_region)."""
    dit: object
    vae: object
    encoder: object
    lips: object
    face: object
    conditions: object
    how: dict


def load_models(folder: Path, device: str = "cpu", speed: str | None = None) -> Models:
    """Everything that a stream needs on `device`, the DiT in float32 on a CPU, else in bfloat16. UserError names a file that is missing or unfit.

    speed, on a GPU: "bf16" or "fp8", DiT and Wan's decoder in the forms of `fast` that `python -m tmlib.bench` times. Code is compiled and passes are
    recorded in a stream's first nine or so chunks, which so come late; code is compiled once for all streams. A decoder in another process is not compiled.
    """
    import torch

    from . import readers
    from .conditions import load_conditions
    from .dit import WanDiT
    from .placement import clearly
    from .wan_vae import load_codec
    from .wav2vec import load_speech
    folder = Path(folder)
    lips, face = readers.load_readers(folder)
    if device != "cpu" and not torch.cuda.is_available():
        raise UserError(f"device {device}: this machine has no such GPU, or torch was installed without CUDA; use cpu")
    if speed and device == "cpu":
        raise UserError(f"--fast {speed}: is for a GPU; leave it out on a CPU")
    if speed == "fp8" and torch.cuda.get_device_capability() < (8, 9):
        raise UserError(f"--fast fp8: {torch.cuda.get_device_name()} does not multiply in 8 bit; give --fast bf16")
    with clearly(f"loading the models of {folder}", "close what else uses that memory, or give another device or smaller models"):
        dit = WanDiT.from_pretrained(folder / "student", torch.float32 if device == "cpu" else torch.bfloat16, device).eval().requires_grad_(False)
        vae, how = load_codec(folder, device, torch.bfloat16 if speed else torch.float32), config.load_json(folder / "student" / "stream.json")
        made = Models(dit, vae, load_speech(folder).to(device), lips, face, load_conditions(folder, device=device), how)
    return faster(made, speed) if speed else made


def faster(m: Models, speed: str) -> Models:
    """The same models, DiT and decoder changed in place: see `load_models`. The miniature's own decoder stays as it is."""
    from . import fast
    from .wan_vae import WanVAE
    of_model, of_decoder = fast.SERVED
    vae = fast.decoder(m.vae, of_decoder, m.how["chunk"]) if isinstance(m.vae, WanVAE) else m.vae
    return replace(m, dit=fast.model(m.dit, (*of_model, speed)), vae=vae)


def make_streamer(m: Models, steps: int | None = None, cache: str | None = None, seed: int = 0, placement: str = "serial", **more):
    """A Streamer set up as the student was distilled; steps and cache may be tried otherwise. more: see Streamer."""
    from . import flow, stream
    times = flow.timesteps(steps or m.how["steps"], m.how["shift"])
    return stream.Streamer(m.dit, m.vae, m.encoder, placement, chunk=m.how["chunk"], cache=cache or m.how["cache"], timesteps=times, seed=seed, **more)


def shown(m: Models, picture: np.ndarray, style: str | None, modes: tuple[str, str] = ("speaking", "listening")) -> dict:
    """What `Streamer.stream` is told about a picture uint8 (H, W, 3): two prompts, for chunks with sound and for silent ones (`modes`), in this style if
    it is said; the picture's tokens; where faces are."""
    import torch

    from . import data
    told = {mode: m.conditions.prompt(style or None, mode, m.dit.config.text_dim)[None] for mode in modes}           # (1, tokens, text_dim)
    tokens = m.conditions.tokens(data.to_float(picture[None])[None, :, 0])                                           # (1, tokens, image_dim)
    return dict(text=told[modes[0]], listening=told[modes[1]], image_tokens=tokens, audio_mask=torch.tensor(m.how["face_region"]))


def warm(streamer, image: np.ndarray, **conditions) -> None:
    """Stream silence until the code is compiled and the kernels are loaded that `load_models` with a speed will use; conditions: see `Streamer.stream`."""
    from .attention import WINDOW
    silence = itertools.repeat(np.zeros(streamer.chunk * 4 * FRAME, np.float32))
    with closing(streamer.stream(image, silence, **conditions)) as frames:
        next(frames)
        while streamer.take.index < math.ceil(WINDOW / streamer.chunk) + 3:
            next(frames)


def _load(folder: Path, seed: int, steps: int | None, cache: str | None, prompt: str, placement: str = "serial", device: str | None = None,
          speed: str | None = None) -> Talker:
    """Models of a folder, set up for streaming."""
    import torch

    from . import data
    m = load_models(folder, device or ("cuda" if torch.cuda.is_available() else "cpu"), speed)
    streamer = make_streamer(m, steps, cache, seed, placement)
    frames = lambda image, waves: streamer.stream(image, waves, **shown(m, image, prompt, ("speaking", "speaking")))      # who reads aloud pauses, but does not listen
    def in_world(image: np.ndarray) -> bool:
        picture = data.to_float(image[None])[None]                                                                     # (1, 3, 1, H, W)
        return m.face.in_world(picture[0, :, 0], m.vae.decode(m.vae.encode(picture))[0][0, :, 0])

    return Talker(frames, in_world, m.how["size"], streamer.chunk)


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m tmlib.talk", description="Make a video of a face speaking.")
    add = parser.add_argument
    add("face", help="a picture of one face, any usual format; the centre square is used")
    add("speech", help="a recording of 1 second to 10 minutes: wav, flac, mp3, ogg, m4a, or a video with sound")
    add("out", help="the video to write, .mp4")
    add("--models", metavar="FOLDER", help="trained models (default: data/models after `make repro`, else data/demo)")
    add("--seed", type=whole(0, 2**63), default=0, metavar="N", help="another seed gives another sway of the head (default 0)")
    add("--style-prompt", default="", metavar="WORDS", help="the picture's style: flat, line or soft3d (default: unsaid)")
    add("--steps", type=whole(1, 101), metavar="N", help="denoising steps per chunk (default: as distilled, 2)")
    add("--cache", choices=("per_step", "next_step", "clean_pass"), help="where the past comes from (default: as distilled)")
    add("--placement", choices=PLACEMENTS, default="serial",
        help="where picture and decoder run, see tmlib/placement.py; the frames are the same (default serial)")
    add("--device", choices=("cpu", "cuda"), help="where the DiT runs (default: a GPU if there is one)")
    add("--fast", choices=SPEEDS, help="on a GPU: compiled, replayed as CUDA graphs, Wan's decoder in bfloat16; fp8: large products in 8 bit too")
    add("--scale", type=whole(1), metavar="N", help="whole-number enlargement (default: to about 384 pixels, 6 for 64)")
    return parser


def whole(least: int, below: int = 10**6) -> Callable[[str], int]:
    """A type for an option: whole numbers from `least` on."""
    def whole_number(text: str) -> int:
        if not text.isdecimal() or not least <= int(text) < below:
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from {least} to {below - 1}")
        return int(text)
    return whole_number


def main(argv: list[str] | None = None, load: Callable[..., Talker] = _load) -> int:
    """The command. `load` makes the Talker; tests give their own."""
    args = arguments().parse_args(argv)
    folder = _check(args)
    wave = media.read_audio(args.speech, *SECONDS)
    if np.square(wave).mean() < 1e-6:
        print(f"warning: {args.speech}: nearly silent, so the face will hardly speak; was the microphone on?", file=sys.stderr)
    media.read_image(args.face, 64)             # a bad picture should not wait for the models
    print(f"models: {folder}", flush=True)
    talker = load(folder, seed=args.seed, steps=args.steps, cache=args.cache, prompt=args.style_prompt, placement=args.placement, device=args.device,
                  speed=args.fast)
    image = media.read_image(args.face, talker.size)
    if not talker.in_world(image):
        print(f"warning: {args.face}: unlike the faces these models know; the video may look strange", file=sys.stderr)
    began = time.monotonic()
    frames = talk(talker, image, wave, args.out, args.scale)
    seconds, took = frames / FPS, time.monotonic() - began
    print(f"{args.out}: {seconds:.1f} s of video, made in {took:.1f} s ({seconds / took:.2g} times real time)")
    return 0


def _check(args) -> Path:
    """What can be said before anything is read; returns the folder of models."""
    media.check_output(args.out)
    for given in (args.face, args.speech):
        if Path(given).resolve() == Path(args.out).resolve():
            raise UserError(f"{args.out}: is also an input, which the video would replace; choose another name")
    return models_folder(args.models)


if __name__ == "__main__":
    config.cli(main)
