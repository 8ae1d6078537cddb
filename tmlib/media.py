"""Sound, pictures and video: files in, files out. Everything from outside passes here, and is checked here.

Special here:
- one way in for sound: PyAV decodes, mixes down and resamples anything to float32 mono at 16 kHz, in one pass whose memory
  is that of the result;
- a file that cannot be used raises UserError: one line with the file, what is wrong with it, and the fix;
- VideoWriter streams: one chunk of frames and sound at a time, into a temporary file that gets its name only when complete.
  The same input gives the same bytes.
"""

import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from fractions import Fraction
from pathlib import Path
from tempfile import TemporaryFile

import av
import numpy as np
from PIL import Image, ImageOps

from .config import RATE, UserError, atomic, one_line

RATES = (8_000, 192_000)                # accepted at the door: below, speech has lost its consonants; above, a broken header
FULL_SCALE = 0.999                      # a sample at or above this touched the limit of its recorder
LOUDEST = 8.0                           # float files may overshoot 1.0, but not by 18 dB: then they hold integers
SIDES = (32, 50_000_000)                # a picture's least side and most pixels
WATCHABLE = 384                         # pixels: small models' frames are enlarged to about this side
LARGEST = 4096                          # pixels a side of a written video, at most: what players take
# Whitelists, because ffmpeg also opens play-lists and scripts that name other files, and Pillow can start Ghostscript.
CONTAINERS = "wav,w64,aiff,au,flac,ogg,mp3,aac,mov,mp4,m4a,matroska,webm,avi"
PICTURES = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "PPM", "AVIF")
EXACT = ("flac", "aiff", "mov", "matroska")     # containers whose header states the true length: less inside means a cut-off file


# -------------------------------------------------------------------------------------------------------- sound in
def read_audio(path, min_s: float = 0.1, max_s: float = 600.0) -> np.ndarray:
    """Sound file -> float32 mono 16 kHz (n,) in [-1, 1]. wav (any depth), flac, ogg, mp3, m4a, or a video's sound track.

    min_s, max_s: accepted length in seconds. Raises UserError for everything that cannot be used.
    """
    path = Path(path)
    _check_readable(path, "sound file")
    _check_wav(path)
    with path.open("rb") as file, _opened(path, file) as container:
        if not container.streams.audio:
            raise UserError(f"{path}: has no sound track; give a recording of speech")
        try:
            wave, seconds = _decode(path, container, max_s)
        except (av.error.FFmpegError, ValueError) as error:
            raise UserError(f"{path}: damaged or cut off ({_why(error)}); copy or export it again") from None
        _check_complete(path, container, seconds)
    if seconds < min_s:
        raise UserError(f"{path}: holds {seconds:.2g} s of sound, at least {min_s:g} s is needed; record a little more")
    return np.clip(wave, -1.0, 1.0)     # after resampling, which overshoots a little


def _decode(path: Path, container, max_s: float) -> tuple[np.ndarray, float]:
    """All of the first sound track -> wave (n,) at 16 kHz, and its length in seconds."""
    stream = container.streams.audio[0]
    if stream.codec_context is None:
        raise UserError(f"{path}: its sound is coded in an unknown way; convert it to wav")
    rate = stream.codec_context.sample_rate
    if not RATES[0] <= rate <= RATES[1]:
        raise UserError(f"{path}: sampled at {rate} Hz; convert it to 16000 Hz ({RATES[0]} to {RATES[1]} are accepted)")
    to_float = av.AudioResampler(format="fltp")                         # of the file's own rate and channels
    to_16k = av.AudioResampler(format="fltp", layout="stereo", rate=RATE)
    pieces, done, clipped = [], 0, 0
    for frame in container.decode(stream):
        for part in to_float.resample(frame):
            samples = part.to_ndarray()                                 # (channels, n)
            _check_samples(path, samples, done / rate)
            clipped += int((np.abs(samples) >= FULL_SCALE).all(0).sum())
            pieces += _resampled(to_16k, samples, rate, done)
            done += samples.shape[1]
        if done > max_s * rate:
            raise UserError(f"{path}: longer than {max_s / 60:g} minutes; cut it into shorter parts")
    if not done:
        raise UserError(f"{path}: holds no samples; record or export it again")
    if clipped > done / 2:
        raise UserError(f"{path}: {100 * clipped // done} % of it is clipped at full scale; record it again with less gain")
    pieces += [part.to_ndarray() for part in to_16k.resample(None)]
    both = np.concatenate(pieces, 1)[:, : max(1, round(done * RATE / rate))]
    mean, first = both                                                  # (n,) each
    # One channel of some recorders is inverted; the mean of the two is then silence, and the first one alone is right.
    return (first if np.square(mean).sum() < 2.5e-3 * np.square(first).sum() else mean), done / rate


def _resampled(resampler, samples: np.ndarray, rate: int, at: int) -> list[np.ndarray]:
    """(channels, n) -> pieces (2, m) at 16 kHz: the mean of all channels, and the first."""
    pair = np.stack([samples.mean(0), samples[0]]).astype(np.float32)
    frame = av.AudioFrame.from_ndarray(pair, format="fltp", layout="stereo")
    frame.sample_rate, frame.pts, frame.time_base = rate, at, Fraction(1, rate)
    return [part.to_ndarray() for part in resampler.resample(frame)]


def _check_samples(path: Path, samples: np.ndarray, start_s: float) -> None:
    bad = ~np.isfinite(samples).all(0)
    if bad.any():
        value = samples[:, bad][~np.isfinite(samples[:, bad])][0]
        raise UserError(f"{path}: a sample at {start_s:.2f} s is {value}; export the sound again, as 16-bit wav")
    peak = np.abs(samples).max(initial=0)
    if peak > LOUDEST:
        raise UserError(f"{path}: float samples reach {peak:.0f}, where 1.0 is full scale; divide them by 32768 and save again")


def _check_complete(path: Path, container, seconds: float) -> None:
    """Less sound than the header promises -> UserError."""
    stream = container.streams.audio[0]
    alone = len(container.streams) == 1         # else the container's length may be that of a longer picture track
    whole = (container.duration or 0) / av.time_base if alone else 0.0
    promised = float(stream.duration * stream.time_base) if stream.duration else whole
    if container.format.name.split(",")[0] in EXACT and seconds < 0.98 * promised - 0.2:
        raise UserError(f"{path}: cut off: {promised:.1f} s promised, {seconds:.1f} s there; copy or export it again")


def _check_readable(path: Path, what: str) -> None:
    try:
        with path.open("rb") as file:
            empty = not file.read(1)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; check the name of the {what}") from None
    except IsADirectoryError:
        raise UserError(f"{path}: is a folder; give one {what}") from None
    except PermissionError:
        raise UserError(f"{path}: may not be read by you; change its permissions (chmod u+r)") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be opened ({error.strerror}); give another {what}") from None
    if empty:
        raise UserError(f"{path}: is empty (0 bytes); copy or make it again")


def _check_wav(path: Path) -> None:
    """A RIFF file must hold what its header promises: decoders play a cut-off one without a word."""
    size = path.stat().st_size
    with path.open("rb") as file:
        head = file.read(12)
        if head[:4] != b"RIFF" or (len(head) == 12 and head[8:] != b"WAVE"):
            return                                                      # another container: its decoder knows
        chunk, length = b"", 0
        while chunk != b"data":
            file.seek(length + length % 2, 1)
            header = file.read(8)
            if len(header) < 8:
                raise UserError(f"{path}: its wav header is cut off; copy or export it again")
            chunk, length = header[:4], int.from_bytes(header[4:], "little")
        there = size - file.tell()
    streamed = length == 0 or length >= 0x7FFFF000                      # written to a pipe: length not known beforehand
    if not there:
        raise UserError(f"{path}: holds no samples; record or export it again")
    if there < length and not streamed:
        raise UserError(f"{path}: cut off: {length} bytes of sound promised, {there} there; copy or export it again")


def _opened(path: Path, file):
    try:
        return av.open(file, options={"format_whitelist": CONTAINERS})
    except (av.error.FFmpegError, ValueError, EOFError) as error:
        raise UserError(f"{path}: not sound that can be read ({_why(error)}); convert it to wav, flac, mp3 or ogg") from None


def _why(error: Exception) -> str:
    return one_line(getattr(error, "strerror", None) or error) or type(error).__name__


# ------------------------------------------------------------------------------------------------------ picture in
def read_image(path, size: int) -> np.ndarray:
    """Picture file -> uint8 (size, size, 3): first frame, upright, over grey where transparent, centre-cropped, resized.

    Raises UserError for everything that cannot be used.
    """
    path = Path(path)
    _check_readable(path, "picture")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")                             # the size check below replaces Pillow's bomb warning
            with Image.open(path, formats=PICTURES) as image:
                _check_sides(path, *image.size)
                image.load()                                            # an animation gives its first frame
                image = _to_rgb(path, ImageOps.exif_transpose(image))
    except UserError:
        raise
    except Image.DecompressionBombError:
        raise UserError(f"{path}: has far too many pixels; scale it down below {SIDES[1] // 10**6} megapixels") from None
    except Image.UnidentifiedImageError:
        raise UserError(f"{path}: not a picture that can be read; save it as PNG or JPEG") from None
    except Exception as error:      # decoders of broken files raise nearly every kind
        raise UserError(f"{path}: the picture is damaged ({_why(error)}); copy or save it again as PNG or JPEG") from None
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    image = image.crop((left, top, left + side, top + side))
    return np.array(image if side == size else image.resize((size, size), Image.Resampling.LANCZOS))


def _check_sides(path: Path, width: int, height: int) -> None:
    if min(width, height) < SIDES[0]:
        raise UserError(f"{path}: {width}x{height} pixels is too small for a face; give at least {SIDES[0]}x{SIDES[0]}")
    if width * height > SIDES[1]:
        raise UserError(f"{path}: {width}x{height} pixels is too many; scale it down below {SIDES[1] // 10**6} megapixels")


def _to_rgb(path: Path, image: Image.Image) -> Image.Image:
    if image.mode.startswith("I;16") or image.mode == "I":             # 16-bit grey: Pillow's own conversion clips at 255
        image = Image.fromarray((np.asarray(image).clip(0, 65535) // 256).astype(np.uint8))
    if image.mode == "F":
        raise UserError(f"{path}: holds floating-point pixels of unknown range; save it as 8-bit PNG")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        if not image.getchannel("A").getextrema()[1]:
            raise UserError(f"{path}: is transparent everywhere; save it with its background")
        return Image.alpha_composite(Image.new("RGBA", image.size, (128, 128, 128, 255)), image).convert("RGB")
    return image.convert("RGB")


# ------------------------------------------------------------------------------------------------------- video out
class VideoWriter:
    """Streams frames, and sound if any, into an mp4 (H.264 yuv420p, AAC). Use it in a `with` statement.

    The first `write` decides whether there is sound. The file appears under its name when the block ends well; after an
    error, Ctrl-C or a full disk nothing is left, and a file of that name from before is untouched.
    size: pixels of a frame, one number or (height, width). scale: whole-number enlargement, smooth (Lanczos), so that 64
    pixels can be watched. Raises UserError when the file cannot be written.
    """

    def __init__(self, path, fps: int, size, sample_rate: int = RATE, scale: int = 1):
        self.path, self.fps, self.sample_rate, self.scale = Path(path), fps, sample_rate, scale
        self.height, self.width = (size, size) if np.isscalar(size) else size
        if scale != int(scale) or scale < 1 or self.height * scale % 2 or self.width * scale % 2:
            raise UserError(f"{path}: frames of {self.width}x{self.height} at scale {scale}: both sides must become even")
        if max(self.height, self.width) * scale > LARGEST:
            raise UserError(f"{path}: frames of {self.width}x{self.height} at scale {scale} are larger than players show; a scale of {LARGEST // max(self.height, self.width)} is the most")
        self.frames = self.samples = 0
        self.video = self.audio = None
        check_output(self.path)

    def __enter__(self) -> "VideoWriter":
        with self._writing(), ExitStack() as stack:
            temporary = stack.enter_context(atomic(self.path))
            options = {"movflags": "+faststart", "fflags": "+bitexact"}     # plays while loading; no version inside
            self.container = av.open(str(temporary), "w", format="mp4", options=options)
            self.stack = stack.pop_all()
        return self

    def write(self, frames: np.ndarray, wave: np.ndarray | None = None) -> None:
        """frames: uint8 (t, H, W, 3), t may be 0. wave: float32 (n,) at sample_rate that sounds with them, any n."""
        if frames.dtype != np.uint8 or frames.shape[1:] != (self.height, self.width, 3):
            raise ValueError(f"frames are {frames.dtype} {frames.shape}, not uint8 (t, {self.height}, {self.width}, 3)")
        if self.video is None:
            self._start(sound=wave is not None)
        if wave is None and self.audio:
            wave = np.zeros(len(frames) * self.sample_rate // self.fps, np.float32)
        if wave is not None and not self.audio:
            raise ValueError("the first write had no sound, so this video has no sound track")
        with self._writing():
            for frame in frames:
                self._mux(self.video, self._picture(frame))
            if wave is not None and len(wave):
                self._mux(self.audio, self._sound(wave))

    def _start(self, sound: bool) -> None:
        # One thread: x264's bytes depend on their number. Colours are tagged BT.709, as players assume for H.264.
        tags = {"colorprim": "bt709", "transfer": "bt709", "colormatrix": "bt709"}
        params = ":".join(f"{key}={value}" for key, value in tags.items())
        self.video = self.container.add_stream("libx264", rate=self.fps, options={"crf": "16", "x264-params": params})
        self.video.width, self.video.height, self.video.pix_fmt = self.width * self.scale, self.height * self.scale, "yuv420p"
        self.video.codec_context.thread_count = 1
        if sound:
            self.audio = self.container.add_stream("aac", rate=self.sample_rate, layout="mono", options={"b": "96k"})
            self.audio.codec_context.flags |= av.codec.context.Flags.bitexact

    def _picture(self, frame: np.ndarray) -> av.VideoFrame:
        picture = av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")
        picture = picture.reformat(self.width * self.scale, self.height * self.scale, "yuv420p",
                                   dst_colorspace="ITU709", interpolation="LANCZOS")
        picture.pts, picture.time_base = self.frames, Fraction(1, self.fps)
        self.frames += 1
        return picture

    def _sound(self, wave: np.ndarray) -> av.AudioFrame:
        if wave.ndim != 1 or not np.isfinite(wave).all():
            raise ValueError(f"sound must be finite numbers of shape (n,), got {wave.shape}")
        samples = np.ascontiguousarray(wave[None], np.float32)          # (1, n)
        sound = av.AudioFrame.from_ndarray(samples, format="fltp", layout="mono")
        sound.sample_rate, sound.pts, sound.time_base = self.sample_rate, self.samples, Fraction(1, self.sample_rate)
        self.samples += len(wave)
        return sound

    def _mux(self, stream, frame) -> None:
        for packet in stream.encode(frame):
            self.container.mux(packet)

    def __exit__(self, kind, error, trace) -> None:
        if kind is None:
            with self._writing(), self.stack:                           # renames the temporary
                self._finish()
        else:
            self._abandon()
            self.stack.__exit__(kind, error, trace)                     # removes it; the error goes on

    def _finish(self) -> None:
        try:
            if not self.frames:
                raise UserError(f"{self.path}: no frames were made, so there is no video to write")
            for stream in filter(None, (self.video, self.audio)):
                self._mux(stream, None)
            self.container.close()
        except BaseException:
            self._abandon()
            raise

    def _abandon(self) -> None:
        with suppress(OSError, av.error.FFmpegError):                   # closing writes, and may meet the same full disk
            self.container.close()

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except (OSError, av.error.FFmpegError) as error:
            raise UserError(f"{self.path}: cannot be written ({error.strerror or error}); free some space or choose "
                            "another folder") from None


def check_output(path) -> None:
    """UserError unless an .mp4 of this name could be written: asked before the work, not after it."""
    path = Path(path)
    if path.is_dir():
        raise UserError(f"{path}: is a folder; add a file name, such as {path / 'out.mp4'}")
    if path.suffix.lower() != ".mp4":
        raise UserError(f"{path}: the name must end in .mp4; for example {path.with_suffix('.mp4')}")
    folder = next(p for p in path.absolute().parents if p.exists())     # those below it are made when the file is
    try:
        TemporaryFile(dir=folder).close()
    except OSError as error:
        raise UserError(f"{path}: cannot be written in {folder} ({error.strerror}); choose another folder") from None


def write_video(path, frames: np.ndarray, wave: np.ndarray | None = None, fps: int = 16, scale: int = 4) -> None:
    """frames uint8 (T, H, W, 3) and, if given, wave float32 (n,) at 16 kHz -> one mp4. See VideoWriter. Enlarged `scale` times, or less: pictures that are large enough stay."""
    with VideoWriter(path, fps, frames.shape[1:3], scale=max(1, min(scale, WATCHABLE // frames.shape[1]))) as video:
        video.write(frames, wave)
