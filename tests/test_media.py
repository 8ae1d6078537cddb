"""Files in, files out: what is good comes through unchanged, what is bad gives one line that names the file and leaves nothing."""

import os
import resource
import struct
import tracemalloc
import warnings
import zlib
from fractions import Fraction

import av
import numpy as np
import pytest
from PIL import Image

from tmlib import media
from tmlib.config import UserError

TONE = (0.5 * np.sin(2 * np.pi * 440 * np.arange(16_000) / 16_000)).astype(np.float32)          # one second


def write_wav(path, samples, rate=16_000, bits=16, cut=None):
    """samples (n,) or (n, channels) in [-1, 1] -> wav of 8, 16, 24, 32 bits or "float"; `cut` keeps that many bytes."""
    samples = np.asarray(samples, np.float64).reshape(len(samples), -1 if len(samples) else 1)
    if bits == "float":
        body = samples.astype("<f4").tobytes()
    elif bits == 8:
        body = np.round(samples * 127 + 128).astype(np.uint8).tobytes()
    else:
        body = np.round(samples * (2 ** (bits - 1) - 1)).astype("<i4")[..., None].view("u1")[..., : bits // 8].tobytes()
    channels, kind, width = samples.shape[1], *((3, 32) if bits == "float" else (1, bits))
    layout = struct.pack("<HHIIHH", kind, channels, rate, rate * channels * width // 8, channels * width // 8, width)
    text = b"WAVEfmt " + struct.pack("<I", 16) + layout + b"data" + struct.pack("<I", len(body)) + body
    path.write_bytes((b"RIFF" + struct.pack("<I", len(text)) + text)[:cut])
    return path


def encode(path, codec, samples, rate=16_000):
    """float32 samples (n,) -> a file whose container is chosen by its suffix."""
    flac = codec == "flac"                                      # its encoder takes whole numbers only
    samples = (samples * 32767).astype(np.int16) if flac else samples.astype(np.float32)
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=rate, layout="mono")
        frame = av.AudioFrame.from_ndarray(samples[None], format="s16" if flac else "fltp", layout="mono")
        frame.sample_rate, frame.time_base, frame.pts = rate, Fraction(1, rate), 0
        for part in (frame, None):
            container.mux(stream.encode(part))
    return path


def refused(call, path, *words):
    """The call fails with one line that names the file and holds the words."""
    with pytest.raises(UserError) as caught:
        call(path)
    line = str(caught.value)
    assert line.startswith(str(path)) and "\n" not in line and ";" in line, line
    assert all(word in line for word in words), line


# ---------------------------------------------------------------------------------------------------- good sound
@pytest.mark.parametrize("bits", [8, 16, 24, 32, "float"])
@pytest.mark.parametrize("channels", [1, 2])
def test_every_depth_and_channel_count_gives_the_same_wave(tmp_path, bits, channels):
    wave = media.read_audio(write_wav(tmp_path / "a.wav", np.repeat(TONE[:, None], channels, 1), bits=bits))
    assert wave.dtype == np.float32 and wave.shape == TONE.shape
    assert np.abs(wave - TONE).max() < (0.01 if bits == 8 else 1e-4)


@pytest.mark.parametrize("rate", [8_000, 11_025, 22_050, 32_000, 44_100, 48_000, 96_000])
def test_resampling_keeps_length_and_phase_and_kills_aliases(tmp_path, rate):
    t = np.arange(rate) / rate
    wave = media.read_audio(write_wav(tmp_path / "a.wav", 0.5 * np.sin(2 * np.pi * 440 * t), rate))
    assert abs(len(wave) - 16_000) <= 1
    inner = slice(500, 15_500)
    assert np.abs(wave[inner] - TONE[inner]).max() < 1e-3
    if rate > 24_000:
        high = media.read_audio(write_wav(tmp_path / "b.wav", 0.5 * np.sin(2 * np.pi * 11_000 * t), rate))
        assert np.abs(high[inner]).max() < 1e-3


@pytest.mark.parametrize("name, codec, rate", [("a.flac", "flac", 44_100), ("a.ogg", "libopus", 48_000),
                                               ("a.mp3", "libmp3lame", 44_100), ("a.m4a", "aac", 16_000)])
def test_other_containers_and_a_wrong_suffix(tmp_path, name, codec, rate):
    chirp = lambda t: 0.5 * np.sin(2 * np.pi * (300 + 200 * t) * t)     # never repeats, so a delay cannot hide
    path = encode(tmp_path / name, codec, chirp(np.arange(2 * rate) / rate), rate)
    wave = media.read_audio(path)
    assert abs(len(wave) - 32_000) < 2_400
    assert np.corrcoef(wave[4_000:28_000], chirp(np.arange(4_000, 28_000) / 16_000))[0, 1] > 0.98
    assert np.array_equal(media.read_audio(path.rename(tmp_path / "speech.wav")), wave)


def test_odd_but_good_sound(tmp_path):
    read = lambda samples, **how: media.read_audio(write_wav(tmp_path / "a.wav", samples, **how))
    assert not read(np.zeros(16_000)).any()
    assert np.abs(read(np.stack([TONE, -TONE], 1)) - TONE).max() < 1e-4     # an inverted channel does not silence the speech
    loud = read(TONE * 2.6, bits="float")                                   # float files may overshoot
    assert np.abs(loud).max() == 1.0 and np.corrcoef(loud, TONE)[0, 1] > 0.98
    path = write_wav(tmp_path / "b.wav", TONE)
    content = bytearray(path.read_bytes())
    content[40:44] = content[4:8] = b"\xff" * 4                 # as ffmpeg writes to a pipe: length not known
    path.write_bytes(content)
    assert len(media.read_audio(path)) == 16_000


# ----------------------------------------------------------------------------------------------------- bad sound
BAD_SOUND = {
    "missing": (lambda p: p, ["no such file"]),
    "folder": (lambda p: p.mkdir(), ["folder"]),
    "empty": (lambda p: p.write_bytes(b""), ["empty"]),
    "text": (lambda p: p.write_text("Hello, this is a letter.\n" * 50), ["not sound"]),
    "picture": (lambda p: Image.new("RGB", (64, 64)).save(p, "PNG"), ["not sound"]),
    "four bytes": (lambda p: p.write_bytes(b"RIFF"), ["header", "cut off"]),
    "cut header": (lambda p: write_wav(p, TONE, cut=30), ["header", "cut off"]),
    "cut data": (lambda p: write_wav(p, TONE, cut=16_000), ["cut off", "32000 bytes"]),
    "no samples": (lambda p: write_wav(p, TONE[:0]), ["no samples"]),
    "too short": (lambda p: write_wav(p, TONE[:800]), ["0.05 s", "0.1 s"]),
    "too long": (lambda p: write_wav(p, np.zeros(8_000 * 601), 8_000), ["longer than 10 minutes"]),
    "nan": (lambda p: write_wav(p, np.append(TONE, np.nan), bits="float"), ["nan"]),
    "inf": (lambda p: write_wav(p, np.append(TONE, -np.inf), bits="float"), ["inf"]),
    "clipped": (lambda p: write_wav(p, np.sign(TONE)), ["clipped", "less gain"]),
    "whole numbers as floats": (lambda p: write_wav(p, TONE * 32767, bits="float"), ["32768"]),
    "4 kHz": (lambda p: write_wav(p, TONE, 4_000), ["4000 Hz"]),
    "384 kHz": (lambda p: write_wav(p, TONE, 384_000), ["384000 Hz"]),
    "playlist": (lambda p: p.write_text("#EXTM3U\n#EXT-X-TARGETDURATION:10\n#EXTINF:10,\n/etc/passwd\n"), ["not sound"]),
}


@pytest.mark.parametrize("kind", BAD_SOUND)
def test_bad_sound_gets_one_line(tmp_path, kind):
    make, words = BAD_SOUND[kind]
    path = tmp_path / "speech.wav"
    make(path)
    refused(media.read_audio, path, *words)


def test_a_video_without_sound_and_recordings_cut_off(tmp_path):
    silent = tmp_path / "silent.mp4"
    media.write_video(silent, np.zeros((4, 64, 64, 3), np.uint8))
    refused(media.read_audio, silent, "no sound track")
    for name, codec, words in (("a.flac", "flac", ("cut off", "again")), ("a.mka", "aac", ("cut off", "4.1 s promised"))):
        path = encode(tmp_path / name, codec, np.random.default_rng(0).uniform(-0.3, 0.3, 64_000))
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
        refused(media.read_audio, path, *words)


def denied(*_, **__):
    raise PermissionError(13, "Permission denied")


@pytest.mark.parametrize("read", [media.read_audio, lambda path: media.read_image(path, 64)])
def test_a_file_one_may_not_read(tmp_path, read, monkeypatch):
    path = write_wav(tmp_path / "secret.wav", TONE)
    monkeypatch.setattr(type(path), "open", denied)             # chmod means nothing to root, who runs many test machines
    refused(read, path, "permissions")


# ------------------------------------------------------------------------------------------------------ pictures
def ramp(width=64, height=64):
    """A picture whose every place is known: red grows to the right, green downwards."""
    y, x = np.mgrid[:height, :width]
    return np.stack([x * 255 // (width - 1), y * 255 // (height - 1), np.full_like(x, 90)], -1).astype(np.uint8)


def saved(path, image, **options):
    image.save(path, **options)
    return path


def test_pictures_are_cropped_about_the_centre_resized_and_upright_but_else_untouched(tmp_path):
    assert np.array_equal(media.read_image(saved(tmp_path / "a.png", Image.fromarray(ramp())), 64), ramp())
    wide = np.concatenate([np.zeros((64, 30, 3), np.uint8), ramp(), np.zeros((64, 30, 3), np.uint8)], 1)
    assert np.array_equal(media.read_image(saved(tmp_path / "b.png", Image.fromarray(wide)), 64), ramp())
    quarter = media.read_image(saved(tmp_path / "c.png", Image.fromarray(ramp(256, 256))), 64)
    assert np.abs(quarter.astype(int) - ramp()).max() <= 4
    tags = Image.Exif()
    tags[0x0112] = 6                                            # the camera was turned: rotate 90 degrees to see it upright
    assert np.array_equal(media.read_image(saved(tmp_path / "d.png", Image.fromarray(np.rot90(ramp())), exif=tags), 64), ramp())


@pytest.mark.parametrize("mode", ["L", "P", "1", "CMYK", "LA", "RGBA", "YCbCr"])
def test_every_mode_becomes_rgb(tmp_path, mode):
    grey = Image.fromarray(np.repeat(ramp()[..., :1], 3, 2))
    path = tmp_path / ("a.jpg" if mode in ("CMYK", "YCbCr") else "a.png")
    converted = grey.convert(mode, palette=Image.Palette.ADAPTIVE) if mode == "P" else grey.convert(mode)
    got = media.read_image(saved(path, converted), 64)
    assert got.shape == (64, 64, 3) and got.dtype == np.uint8
    if mode != "1":
        assert np.abs(got.astype(int) - np.asarray(grey)).max() < 24
    deep = saved(tmp_path / "16 bit.png", Image.fromarray(ramp()[..., 0].astype(np.uint16) * 256 + 77))
    assert np.array_equal(media.read_image(deep, 64)[..., 0], ramp()[..., 0])


def test_transparent_parts_become_grey_and_an_animation_gives_its_first_frame(tmp_path):
    layer = np.dstack([ramp(), np.full((64, 64), 255, np.uint8)])
    layer[:, :32, 3] = 0
    got = media.read_image(saved(tmp_path / "a.png", Image.fromarray(layer)), 64)
    assert (got[:, :32] == 128).all() and np.array_equal(got[:, 32:], ramp()[:, 32:])
    animation = saved(tmp_path / "a.gif", Image.new("RGB", (64, 64), "red"), save_all=True, append_images=[Image.new("RGB", (64, 64))])
    assert tuple(media.read_image(animation, 64)[5, 5]) == (255, 0, 0)


def damaged(path, kind, keep=None, zero=slice(0)):
    """A good picture of which only `keep` bytes are left, or whose bytes `zero` are lost."""
    Image.fromarray(ramp(256, 256)).save(path, kind)
    content = np.frombuffer(path.read_bytes(), np.uint8).copy()
    content[zero] = 0
    path.write_bytes(content[:keep].tobytes())


def bomb(path):
    """A PNG of few bytes whose header claims 40000 x 40000 pixels."""
    parts = (b"IHDR", struct.pack(">IIBBBBB", 40_000, 40_000, 8, 2, 0, 0, 0)), (b"IDAT", zlib.compress(bytes(1_000))), (b"IEND", b"")
    chunks = (struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body)) for name, body in parts)
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(chunks))


BAD_PICTURES = {
    "missing": (lambda p: p, ["no such file"]),
    "folder": (lambda p: p.mkdir(), ["folder"]),
    "empty": (lambda p: p.write_bytes(b""), ["empty"]),
    "text": (lambda p: p.write_text("no picture"), ["not a picture"]),
    "postscript": (lambda p: p.write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 64 64\n"), ["not a picture"]),
    "corrupt png": (lambda p: damaged(p, "PNG", zero=slice(60, 90)), ["damaged"]),
    "cut jpeg": (lambda p: damaged(p, "JPEG", 900), ["damaged"]),
    "cut png": (lambda p: damaged(p, "PNG", 300), ["damaged"]),
    "tiny": (lambda p: Image.new("RGB", (31, 400)).save(p, "PNG"), ["31x400", "32x32"]),
    "bomb": (bomb, ["pixels"]),
    "large": (lambda p: Image.new("1", (8_000, 7_000)).save(p, "PNG"), ["8000x7000", "50 megapixels"]),
    "transparent": (lambda p: Image.new("RGBA", (64, 64)).save(p, "PNG"), ["transparent"]),
    "float": (lambda p: Image.new("F", (64, 64)).save(p, "TIFF"), ["floating-point"]),
}


@pytest.mark.parametrize("kind", BAD_PICTURES)
def test_bad_pictures_get_one_line(tmp_path, kind):
    make, words = BAD_PICTURES[kind]
    path = tmp_path / "face.png"
    make(path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        refused(lambda p: media.read_image(p, 64), path, *words)


# --------------------------------------------------------------------------------------------------------- video
def moving(t):
    """Frames whose top left quarter holds the frame's number as a grey level."""
    frames = np.repeat(ramp()[None], t, 0)
    frames[:, :32, :32] = (np.arange(t) * 9 % 200 + 20)[:, None, None, None]
    return frames


def test_video_streamed_in_parts_equals_video_written_whole_and_keeps_sound_and_colour(tmp_path):
    frames, wave = moving(25), np.tile(TONE, 2)[:25_000]
    media.write_video(tmp_path / "a.mp4", frames, wave, scale=2)
    with media.VideoWriter(tmp_path / "new" / "b.mp4", 16, 64, scale=2) as video:
        for lo, hi in ((0, 9), (9, 21), (21, 25)):
            video.write(frames[lo:hi], wave[lo * 1000:hi * 1000])
    with av.open(str(tmp_path / "new" / "b.mp4")) as b, av.open(str(tmp_path / "a.mp4")) as a:
        stream = b.streams.video[0]
        assert (stream.codec_context.name, stream.pix_fmt, stream.width, stream.frames) == ("h264", "yuv420p", 128, 25)
        assert b.duration == pytest.approx(25 / 16 * 1e6, abs=70_000)
        got = np.stack([f.to_ndarray(format="rgb24") for f in b.decode(stream)])
        same = np.stack([f.to_ndarray(format="rgb24") for f in a.decode(a.streams.video[0])])
    assert np.array_equal(got, same)
    assert np.abs(got[:, 32, 32, 0].astype(int) - frames[:, 16, 16, 0]).max() <= 4      # order and brightness
    assert np.abs(got[:, 40:120:8, 80:120:8].astype(int) - np.repeat(frames, 2, 1).repeat(2, 2)[:, 40:120:8, 80:120:8]).mean() < 6
    heard = media.read_audio(tmp_path / "new" / "b.mp4")
    assert np.corrcoef(heard[2_000:23_000], wave[2_000:23_000])[0, 1] > 0.99


def test_strong_colours_stay_what_they_are(tmp_path):
    colours = np.array([(200, 60, 40), (40, 190, 60), (50, 70, 210), (128, 128, 128)], np.uint8)
    media.write_video(tmp_path / "a.mp4", np.broadcast_to(colours[:, None, None], (4, 32, 32, 3)), scale=2)
    with av.open(str(tmp_path / "a.mp4")) as video:
        seen = [f.to_ndarray(format="rgb24")[32, 32].astype(int) for f in video.decode(video.streams.video[0])]
    assert np.abs(np.array(seen) - colours).max() <= 6


def write(path):
    media.write_video(path, moving(12), TONE[:12_000], scale=2)


def test_the_same_video_twice_has_the_same_bytes(tmp_path):
    write(tmp_path / "a.mp4")
    write(tmp_path / "b.mp4")
    assert (tmp_path / "a.mp4").read_bytes() == (tmp_path / "b.mp4").read_bytes()


def test_sound_missing_in_one_write_is_silence_there(tmp_path):
    with media.VideoWriter(tmp_path / "a.mp4", 16, 64) as video:
        for sound in (TONE, None, TONE):
            video.write(moving(16), sound)
    heard = media.read_audio(tmp_path / "a.mp4")
    loud = np.abs(heard[:48_000].reshape(3, -1)[:, 3_000:-3_000]).mean(1)
    assert loud[1] < 0.01 < 0.2 < min(loud[0], loud[2])


def test_outputs_that_cannot_be_are_refused_before_the_work(tmp_path, monkeypatch):
    (tmp_path / "folder.mp4").mkdir()
    (tmp_path / "file").write_text("x")
    refused(write, tmp_path / "folder.mp4", "folder")
    refused(write, tmp_path / "out.avi", ".mp4", "out.mp4")
    refused(write, tmp_path / "out", ".mp4")
    refused(write, tmp_path / "file" / "out.mp4", "cannot be written")
    with pytest.raises(UserError, match="even"):
        media.VideoWriter(tmp_path / "a.mp4", 16, (63, 64))
    monkeypatch.setattr(media, "TemporaryFile", denied)
    refused(write, tmp_path / "out.mp4", "Permission denied", "another folder")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "folder.mp4"]
    with pytest.raises(UserError, match="at scale 65 are larger than players show; a scale of 64 is the most"):
        media.VideoWriter(tmp_path / "a.mp4", 16, 64, scale=65)


def test_a_full_disk_gives_one_line_and_keeps_the_old_file(tmp_path):
    path = tmp_path / "out.mp4"
    path.write_bytes(b"from before")
    frames = np.random.default_rng(0).integers(0, 255, (24, 64, 64, 3), np.uint8)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))   # the kernel now refuses longer files
    try:
        refused(lambda p: media.write_video(p, frames, TONE), path, "cannot be written", "free some space")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert path.read_bytes() == b"from before" and os.listdir(tmp_path) == ["out.mp4"]


@pytest.mark.parametrize("error", [KeyboardInterrupt, UserError, OSError])
def test_an_interrupted_video_leaves_nothing(tmp_path, error):
    with pytest.raises(error), media.VideoWriter(tmp_path / "out.mp4", 16, 64) as video:
        video.write(moving(9), TONE[:9_000])
        raise error("stop")
    assert not list(tmp_path.iterdir())


def test_an_empty_video_is_an_error_and_wrong_frames_are_refused(tmp_path):
    with pytest.raises(UserError, match="no frames"), media.VideoWriter(tmp_path / "out.mp4", 16, 64):
        pass
    for frames, wave in ((moving(2).astype(np.float32), None), (moving(2)[:, :32], None), (moving(2), TONE[:, None])):
        with pytest.raises(ValueError), media.VideoWriter(tmp_path / "out.mp4", 16, 64) as video:
            video.write(frames, wave)
    assert not list(tmp_path.iterdir())


def test_memory_of_reading_is_that_of_the_result(tmp_path):
    path = write_wav(tmp_path / "long.wav", np.zeros((48_000 * 60, 2)), 48_000)     # as floats 23 MB; the result is 4 MB
    tracemalloc.start()
    wave = media.read_audio(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(wave) == 16_000 * 60 and peak < 5.5 * wave.nbytes
