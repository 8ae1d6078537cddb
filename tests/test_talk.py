"""The command line for people: right length, right sound, constant memory, one line for every mistake, no half-made file."""

import os
import signal
import subprocess
import sys
import tracemalloc

import av
import numpy as np
import pytest
import torch
from PIL import Image
from test_media import write_wav

from tmlib import config, media, talk
from tmlib.config import UserError

SIZE = 16


def fake(chunk=3, in_world=True, stop_after=None, log=None):
    """A talker whose picture is as bright as its sound is loud, frame by frame."""
    def stream(image, waves):
        for count, wave in enumerate(waves):
            if count == stop_after:
                return
            loud = np.abs(wave.reshape(-1, talk.FRAME)).max(1)
            if log is not None:
                log.append((len(loud), image.shape))
            yield np.broadcast_to((loud * 255).astype(np.uint8)[:, None, None, None], (len(loud), SIZE, SIZE, 3))
    return talk.Talker(stream, lambda image: in_world, SIZE, chunk)


def beeps(frames, extra=0):
    """Sound whose loudness changes at every video frame; `extra` samples follow."""
    loud = np.linspace(0.1, 0.8, frames).repeat(talk.FRAME)
    return np.append(loud * np.sign(np.sin(np.arange(len(loud)))), np.full(extra, 0.3)).astype(np.float32)


@pytest.fixture
def files(tmp_path):
    Image.new("RGB", (64, 64), "orange").save(tmp_path / "face.png")
    write_wav(tmp_path / "speech.wav", beeps(40, 500))
    (tmp_path / "models").mkdir()
    return tmp_path


def command(folder, *options, **changed):
    names = {"face": "face.png", "speech": "speech.wav", "out": "out.mp4", "models": "models"} | changed
    return [*(str(folder / names[n]) for n in ("face", "speech", "out")), "--models", str(folder / names["models"]), *options]


@pytest.mark.parametrize("chunk", [1, 3, 7])
@pytest.mark.parametrize("samples", [1, 999, 1000, 1001, 9_000, 9_001, 33_000, 40_500])
def test_pieces_hold_the_sound_of_their_frames_once(chunk, samples):
    wave = np.arange(1, samples + 1, dtype=np.float32)
    pieces = list(talk.waves(wave, chunk))
    assert [len(p) for p in pieces] == [(4 * chunk - 3) * 1000] + [4 * chunk * 1000] * (len(pieces) - 1)
    joined = np.concatenate(pieces)
    assert np.array_equal(joined[:samples], wave) and not joined[samples:].any()
    assert len(joined) - samples < max(len(p) for p in pieces)


@pytest.mark.parametrize("extra", [0, 1, 999])
def test_video_is_as_long_as_its_sound_and_in_step_with_it(tmp_path, extra):
    wave = beeps(20, extra)
    frames = talk.talk(fake(), np.zeros((SIZE, SIZE, 3), np.uint8), wave, tmp_path / "a.mp4", scale=4)
    assert 0 <= frames - len(wave) / talk.FRAME < 1
    with av.open(str(tmp_path / "a.mp4")) as video:
        shown = [f.to_ndarray(format="rgb24").mean() / 255 for f in video.decode(video.streams.video[0])]
    assert len(shown) == frames
    heard = media.read_audio(tmp_path / "a.mp4")[:20_000].reshape(20, -1)
    assert np.abs(np.array(shown[:20]) - np.linspace(0.1, 0.8, 20)).max() < 0.03
    assert np.abs(np.abs(heard).mean(1) - np.linspace(0.1, 0.8, 20)).max() < 0.08


def test_memory_does_not_grow_with_the_speech(tmp_path):
    def peak(seconds):
        wave = np.zeros(16_000 * seconds, np.float32)
        tracemalloc.start()
        talk.talk(fake(), np.zeros((SIZE, SIZE, 3), np.uint8), wave, tmp_path / "a.mp4", scale=1)
        top = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return top
    peak(2)                                                     # imports and caches
    assert peak(60) < peak(4) + 200_000                         # 60 s of frames alone would be 737 kB


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_a_gpu_that_is_not_there_is_told():
    with pytest.raises(UserError, match="device cuda: this machine has no such GPU"):
        talk.load_models(talk.config.DATA / "demo", "cuda")


def test_the_fast_forms_are_for_a_gpu_and_change_what_a_stream_runs_on():
    from tmlib import fast
    with pytest.raises(UserError, match="--fast fp8: is for a GPU"):
        talk.load_models(talk.config.DATA / "demo", "cpu", "fp8")
    plain = talk.load_models(talk.config.DATA / "demo")
    made = talk.faster(plain, "fp8")
    block = made.dit.blocks[0]
    assert isinstance(made.dit, fast.Graphed) and isinstance(block.attn1, fast.FusedSelfAttention) and isinstance(block.attn1.to_qkv, fast.Float8Linear)
    assert made.vae is plain.vae and made.how is plain.how and talk.make_streamer(made).chunk == 3


def test_warming_is_silence_until_a_stream_is_steady():
    from fakes import IMAGE, PROMPT, make_streamer
    from tiny import make_dit
    streamer = make_streamer(dit=make_dit(num_layers=1))
    talk.warm(streamer, IMAGE, **PROMPT)
    assert streamer.take.index == 10 and not streamer.take.sound.wave.any()


def test_command_makes_the_video_and_passes_its_options(files, capsys):
    asked = {}

    def load(folder, **options):
        asked.update(options, folder=folder)
        return fake(in_world=False)
    options = ["--seed", "7", "--steps", "4", "--cache", "clean_pass", "--style-prompt", "flat", "--scale", "2", "--placement", "overlap", "--device", "cpu", "--fast", "bf16"]
    assert talk.main(command(files, *options), load) == 0
    assert asked == {"folder": files / "models", "seed": 7, "steps": 4, "cache": "clean_pass", "prompt": "flat", "placement": "overlap",
                     "device": "cpu", "speed": "bf16"}
    with av.open(str(files / "out.mp4")) as video:
        assert (video.streams.video[0].frames, video.streams.video[0].width) == (41, 32)
    said = capsys.readouterr()
    assert said.err.count("\n") == 1 and said.err.startswith("warning:") and "face.png" in said.err
    assert str(files / "models") in said.out and "2.6 s of video" in said.out


def test_small_frames_are_enlarged_to_be_watched(files):
    talk.main(command(files), lambda *_, **__: fake())
    with av.open(str(files / "out.mp4")) as video:
        assert video.streams.video[0].width == 384


def test_the_users_own_run_comes_before_the_demo(tmp_path, monkeypatch):
    monkeypatch.setattr(config, "MODELS", tmp_path / "models")
    monkeypatch.setattr(config, "DATA", tmp_path)
    assert talk.default_models() == tmp_path / "demo"
    (tmp_path / "models" / "student").mkdir(parents=True)
    (tmp_path / "models" / "student" / "stream.json").touch()
    assert talk.default_models() == tmp_path / "models"


WRONG = {
    "no picture": (dict(face="other.png"), "other.png: no such file"),
    "sound as picture": (dict(face="speech.wav"), "speech.wav: not a picture"),
    "picture as sound": (dict(speech="face.png"), "face.png: not sound"),
    "short sound": (dict(speech="short.wav"), "at least 1 s"),
    "no models": (dict(models="nothing"), "no such folder of models"),
    "wrong suffix": (dict(out="out.avi"), "must end in .mp4"),
    "output is an input": (dict(speech="speech.mp4", out="speech.mp4"), "also an input"),
}


@pytest.mark.parametrize("kind", WRONG)
def test_mistakes_are_found_before_the_models_load(files, kind):
    write_wav(files / "short.wav", beeps(15))
    changed, words = WRONG[kind]
    before = sorted(os.listdir(files))
    with pytest.raises(UserError, match=words):
        talk.main(command(files, **changed), lambda *_, **__: pytest.fail("the models were loaded"))
    assert sorted(os.listdir(files)) == before


@pytest.mark.parametrize("option", [["--seed", "-1"], ["--seed", str(2**64)], ["--steps", "0"], ["--scale", "1.5"], ["--cache", "none"], ["--speed", "2"]])
def test_wrong_options_end_with_2(files, option, capsys):
    with pytest.raises(SystemExit) as stop:
        talk.main(command(files, *option), lambda *_, **__: fake())
    assert stop.value.code == 2 and option[0].lstrip("-") in capsys.readouterr().err


def test_a_stream_that_ends_early_leaves_no_video(files):
    with pytest.raises(UserError, match="ended after 21 of 41 frames"):
        talk.main(command(files), lambda *_, **__: fake(stop_after=2))
    assert not (files / "out.mp4").exists()


def test_caches_are_those_of_the_streamer():
    from tmlib import chain
    cache = next(a for a in talk.arguments()._actions if a.dest == "cache")
    assert cache.choices == chain.CACHES


PROGRAM = """
import signal, sys, time
import numpy as np
from tmlib import config, talk
signal.signal(signal.SIGINT, signal.default_int_handler)         # ignored, where the tests themselves run in the background
def stream(image, waves):
    for wave in waves:
        yield np.zeros((len(wave) // talk.FRAME, 16, 16, 3), np.uint8)
        print("chunk", flush=True)
        time.sleep(20)
config.cli(lambda: talk.main(sys.argv[1:], lambda *_, **__: talk.Talker(stream, lambda image: True, 16, 3)))
"""


@pytest.mark.parametrize("sent, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_stopping_leaves_nothing(files, sent, code):
    before = sorted(os.listdir(files))
    process = subprocess.Popen([sys.executable, "-c", PROGRAM, *command(files)], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                               text=True, cwd=config.ROOT)
    while "chunk" not in process.stdout.readline():
        assert process.poll() is None
    assert len(os.listdir(files)) == len(before) + 1            # the temporary file is there
    process.send_signal(sent)
    assert process.wait(10) == code
    assert sorted(os.listdir(files)) == before


def test_bad_input_ends_with_2_and_one_line(files):
    run = subprocess.run([sys.executable, "-m", "tmlib.talk", *command(files, face="other.png")], capture_output=True, text=True,
                         cwd=config.ROOT, timeout=60)
    assert run.returncode == 2 and run.stdout == ""
    assert run.stderr.count("\n") == 1 and run.stderr.startswith("error: ") and "other.png" in run.stderr


def test_untrained_networks_talk_through_the_real_streamer(files, monkeypatch, capsys):
    """`_load` wires codec, speech encoder, face encoder and DiT to the streamer; only the weights are missing."""
    import torch

    from tmlib.audio import SpeechEncoder, save_encoder
    from tmlib.dit import WanDiT
    from tmlib.readers import FaceEncoder, LipReader, save_readers
    from tmlib.vae import VAEConfig, VideoVAE, save_vae
    torch.manual_seed(0)
    encoder, face = SpeechEncoder().eval(), FaceEncoder(3).eval()
    face.world.fill_(float("inf"))                               # no picture is of its world
    folder = files / "models"
    save_encoder(encoder, folder)
    save_readers(LipReader(), face, folder)
    save_vae(VideoVAE(VAEConfig(encoder=(16, 16, 16), decoder=(16, 16, 16), blocks=1)), folder)
    dit = WanDiT.from_variant("mini", num_layers=1, audio_dim=encoder.cfg.dim, audio_tokens=encoder.tokens_per_latent)
    dit.save_pretrained(folder / "student")
    how = {"steps": 2, "shift": 3.0, "cache": "per_step", "chunk": 3, "size": 64, "face_region": [[1.0] * 4] * 4}
    config.save_json(folder / "student" / "stream.json", how)
    models, picture = talk.load_models(folder), np.zeros((64, 64, 3), np.uint8)
    said, unsaid = (talk.shown(models, picture, style) for style in ("flat", ""))
    assert [said[name].shape[0] for name in ("text", "listening", "image_tokens")] == [1, 1, 1] and said["audio_mask"].shape == (4, 4)
    assert not said["text"].equal(said["listening"]) and not said["text"].equal(unsaid["text"]) and said["image_tokens"].equal(unsaid["image_tokens"])
    assert talk.main(command(files, "--style-prompt", "flat")) == 0
    with av.open(str(files / "out.mp4")) as video:
        assert video.streams.video[0].frames == 41
    assert capsys.readouterr().err.startswith("warning:")
    made = (files / "out.mp4").read_bytes()
    assert talk.main(command(files, "--style-prompt", "flat", "--placement", "overlap")) == 0
    assert (files / "out.mp4").read_bytes() == made
    (folder / "student" / "stream.json").unlink()
    with pytest.raises(config.UserError, match="stream.json"):
        talk.main(command(files))


def test_placements_are_those_of_the_runtime():
    from tmlib.placement import PLACEMENTS
    offered = next(a for a in talk.arguments()._actions if a.dest == "placement")
    assert offered.choices == PLACEMENTS and offered.default == PLACEMENTS[0]
