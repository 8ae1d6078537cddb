"""placement, two_process: the same frames wherever the stages run, bounded queues, and a clear end of every failure.

Processes are really killed here. No timing decides anything: a wait ends when what it waits for has happened.
"""
import os
import re
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
import torch
from fakes import IMAGE, PROMPT, WAVE, BrokenVAE, FakeEars, FakeVAE, HungryVAE, make_streamer, until
from tiny import stir

from tmlib import config, placement
from tmlib.config import UserError
from tmlib.faults import gone
from tmlib.placement import PLACEMENTS, ahead
from tmlib.vae import VAEConfig, VideoVAE

HERE = [p for p in PLACEMENTS if p != "two_process"]


def make(placement="serial", vae=None, **more):
    return make_streamer(vae, placement, **more)


def speak(streamer, wave=WAVE):
    return list(streamer.stream(IMAGE, wave, **PROMPT))


def same(a, b):
    return len(a) == len(b) and all(np.array_equal(x, y) for x, y in zip(a, b))


@pytest.fixture(scope="module")
def expected():
    return speak(make())


@pytest.fixture(scope="module")
def remote():
    with make("two_process") as streamer:
        yield streamer


# ----------------------------------------------------------------------------------------------------------- ahead
def numbers(n, closed=None):
    try:
        yield from range(n)
    finally:
        if closed is not None:
            closed.append(True)


def test_ahead_is_the_same_iterator():
    assert list(ahead(numbers(50))) == list(range(50)) and list(ahead(ahead(numbers(9), 3), 2)) == list(range(9))


def test_ahead_stays_within_its_depth():
    made = []
    items = ahead((made.append(i) or i for i in range(100)), depth=3)
    assert next(items) == 0
    assert until(lambda: len(made) == 4)                                 # three in advance of the one taken
    time.sleep(0.05)
    assert len(made) == 4
    next(items)
    assert until(lambda: len(made) == 5)
    items.close()
    assert len(made) <= 6


def test_ahead_tells_errors_in_order_and_closes_what_it_drives():
    def failing():
        yield 1
        raise KeyError("two")

    items = ahead(failing())
    assert next(items) == 1
    with pytest.raises(KeyError, match="two"):
        next(items)
    closed, threads = [], threading.active_count()
    items = ahead(numbers(10, closed))
    next(items)
    items.close()
    assert until(lambda: closed == [True] and threading.active_count() == threads)


def test_a_stage_keeps_its_cuda_stream(monkeypatch):
    """Every answer that a call takes back starts new threads; freed memory stays with the stream that used it."""
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: object())
    placement.cuda_stream.cache_clear()
    gpu, other = torch.device("cuda", 0), torch.device("cuda", 1)
    mine = placement.cuda_stream(gpu, "dit")
    assert placement.cuda_stream(gpu, "dit") is mine
    assert len({placement.cuda_stream(*each) for each in ((gpu, "dit"), (gpu, "vae"), (other, "dit"))}) == 3
    placement.cuda_stream.cache_clear()


# -------------------------------------------------------------------------------------------------------- equality
@pytest.mark.parametrize("placement", HERE[1:])
@pytest.mark.parametrize("depth", [1, 3])
def test_threads_make_the_same_frames(placement, depth, expected):
    assert same(speak(make(placement, depth=depth)), expected)


def test_a_process_makes_the_same_frames_again_and_again(remote, expected):
    assert same(speak(remote), expected)
    early = remote.stream(IMAGE, WAVE, **PROMPT)
    assert np.array_equal(next(early), expected[0])
    early.close()                                                        # left early: nothing of it shows in the next
    assert same(speak(remote), expected) and remote.worker.alive
    remote.blocking = True
    assert same(speak(remote), expected)
    remote.blocking = False


def test_all_placements_are_bit_equal_with_a_real_codec():
    vae = stir(VideoVAE(VAEConfig(patch=4, encoder=(8, 8), decoder=(8, 8), blocks=1))).eval().requires_grad_(False)
    made = {}
    for placement in PLACEMENTS:
        with make(placement, vae) as streamer:
            made[placement] = speak(streamer)
    assert made["serial"][1].std() > 1 and all(same(made["serial"], frames) for frames in made.values())


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_chunks_in_parts_are_the_same_frames_and_sound(placement):
    """One latent frame after the other, with a real codec; convolutions of another length may round a grey level otherwise."""
    vae = stir(VideoVAE(VAEConfig(patch=4, encoder=(8, 8), decoder=(8, 8), blocks=1))).eval().requires_grad_(False)
    whole = list(make(vae=vae).chunks(IMAGE, WAVE, **PROMPT))
    with make(placement, vae, in_parts=True) as streamer:
        parts = list(streamer.chunks(IMAGE, WAVE, **PROMPT))
    assert [len(p.frames) for p in parts[:5]] == [1, 4, 4, 4, 4] and [p.last for p in parts] == [False, False, True] * len(whole)
    assert [p.frame for p in parts] == [sum(len(p.frames) for p in parts[:k]) for k in range(len(parts))] and [p.index for p in parts[::3]] == [c.index for c in whole]
    for k, chunk in enumerate(whole):
        mine = parts[3 * k:3 * k + 3]
        off = np.abs(np.concatenate([p.frames for p in mine]).astype(int) - chunk.frames)
        assert off.max() <= 1 and off.mean() < 1e-3 and np.array_equal(np.concatenate([p.wave for p in mine]), chunk.wave)
        assert [p.opens for p in mine] == [chunk.opens, False, False] and all(p.listening == chunk.listening and "vae" in p.marks for p in mine)


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_a_stream_in_parts_goes_on_from_its_last_whole_chunk(placement):
    with make(placement, resumable=True, in_parts=True) as streamer:
        expected = [c.frames for c in streamer.chunks(IMAGE, WAVE, **PROMPT)]
        stream = streamer.chunks(IMAGE, WAVE, **PROMPT)
        first = [next(stream).frames for _ in range(5)]                       # two of the second chunk's three
        stream.close()
        rest = [c.frames for c in streamer.resume()]
        assert same(first[:3] + rest, expected)


def test_marks_of_a_process_lie_between_ours(remote):
    for chunk in remote.chunks(IMAGE, WAVE, **PROMPT):
        dit, latents, vae, frames = (chunk.marks[name] for name in ("dit", "latents", "vae", "frames"))
        assert dit[0] < dit[1] <= latents[1] <= vae[0] < vae[1] <= frames[1]


# --------------------------------------------------------------------------------------------------- slow consumers
@pytest.mark.parametrize("placement", PLACEMENTS[1:])
def test_a_slow_consumer_holds_the_whole_chain_up(placement, remote):
    streamer = remote if placement == "two_process" else make(placement)
    calls, most = streamer.audio_encoder.calls, 2 if placement == "two_process" else 3  # taken, and one waiting behind each stage
    calls.clear()
    stream = streamer.stream(IMAGE, (WAVE[:4000] for _ in range(1000)), **PROMPT)
    next(stream)
    time.sleep(0.5)
    assert 1 <= len(calls) <= most
    next(stream)
    time.sleep(0.5)
    assert len(calls) <= most + 1
    stream.close()


# ---------------------------------------------------------------------------------------------------------- failures
def broken_off(stream, line):
    """Frames delivered before a UserError that says `line`."""
    got = []
    with pytest.raises(UserError, match=line):
        for item in stream:
            got.append(item)
    return got


def test_a_killed_decoder_ends_the_stream_and_resume_goes_on(expected):
    with make("two_process", resumable=True) as streamer:
        stream = streamer.stream(IMAGE, WAVE, **PROMPT)
        got = [next(stream), next(stream)]
        os.kill(streamer.worker.process.pid, signal.SIGKILL)
        got += broken_off(stream, r"was killed \(signal 9\)")
        assert same(got, expected[:len(got)]) and len(got) < 5
        got += [chunk.frames for chunk in streamer.resume()]
        assert same(got, expected)


def test_a_killed_dit_takes_its_decoder_along(tmp_path):
    script = tmp_path / "endless.py"
    script.write_text("""
import itertools
from fakes import IMAGE, PROMPT, WAVE
from test_placement import make
if __name__ == "__main__":
    streamer = make("two_process")
    for i, _ in enumerate(streamer.stream(IMAGE, itertools.repeat(WAVE), **PROMPT)):
        if i == 3:
            print(streamer.worker.process.pid, flush=True)
""")
    path = os.pathsep.join([str(config.ROOT), os.path.dirname(__file__)])
    main = subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": path})
    worker = int(main.stdout.readline())
    os.kill(worker, 0)                                                   # it lives
    main.kill()
    main.wait()
    assert until(lambda: gone(worker))


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_out_of_memory_in_the_decoder(placement, expected):
    with make(placement, HungryVAE(), resumable=True) as streamer:
        got = broken_off(streamer.stream(IMAGE, WAVE, **PROMPT), "out of memory when decoding chunk 2")
        assert same(got, expected[:2])
        if placement != "two_process":                                   # a worker is begun anew and would be as hungry again
            assert same(got + [chunk.frames for chunk in streamer.resume()], expected)


@pytest.mark.parametrize("placement", HERE)
def test_out_of_memory_in_the_middle_of_a_chunk(placement, expected):
    """The DiT fails at the second step of chunk 3, its caches half written; after `resume` nobody can tell."""
    streamer = make(placement, resumable=True)
    forward, calls = streamer.dit.forward, []

    def hungry(*args, **kwargs):
        calls.append(1)
        if len(calls) == 8:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return forward(*args, **kwargs)

    streamer.dit.forward = hungry
    got = broken_off(streamer.stream(IMAGE, WAVE, **PROMPT), "out of memory when denoising chunk 3")
    assert same(got, expected[:3])
    assert same(got + [chunk.frames for chunk in streamer.resume()], expected)


@pytest.mark.parametrize("placement", ["serial", "overlap", "two_process"])
def test_a_source_that_breaks_off(placement, remote, expected):
    def pieces():
        yield WAVE[:31_000]
        raise ConnectionError("line is dead")

    streamer = remote if placement == "two_process" else make(placement)
    streamer.resumable = True
    got = broken_off(streamer.stream(IMAGE, pieces(), **PROMPT), "source of the sound failed after 1.9 s")
    assert same(got, expected[:2])
    assert same(got + [chunk.frames for chunk in streamer.resume([WAVE[31_000:]])], expected)
    streamer.resumable = False


def test_enough_sound_is_kept_even_if_resuming_was_an_afterthought(expected, monkeypatch):
    monkeypatch.setattr(FakeEars, "history_samples", 700, raising=False)
    streamer = make("overlap")
    streamer.resumable = True
    stream = streamer.stream(IMAGE, WAVE, **PROMPT)
    got = [next(stream), next(stream)]
    assert until(lambda: streamer.take.index >= 4)                       # the DiT runs ahead, and its sound is forgotten behind it
    stream.close()
    assert same(got + [chunk.frames for chunk in streamer.resume()], expected)


@pytest.mark.parametrize("error", [KeyError("no such weight"), FileNotFoundError(2, "no such file", "c++")], ids=["of python", "of the system"])
def test_a_mistake_in_the_worker_is_told(error):
    with make("two_process", BrokenVAE(error)) as streamer:
        told = re.escape(f"process failed: {type(error).__name__}: {error}")
        assert len(broken_off(streamer.stream(IMAGE, WAVE, **PROMPT), told)) == 2
        assert until(lambda: not streamer.worker.process.is_alive())


def test_resume_begins_again_when_nothing_was_delivered_and_needs_a_resumable_stream(expected):
    with pytest.raises(UserError, match="resumable=True"):
        next(make().resume())
    streamer = make(vae=HungryVAE(enough=None), resumable=True)
    assert broken_off(streamer.stream(IMAGE, WAVE, **PROMPT), "decoding chunk 0") == []
    assert same([chunk.frames for chunk in streamer.resume()], expected)


def test_a_picture_that_began_in_what_was_lost_begins_again():
    def play(vae):
        streamer, got = make(vae=vae, resumable=True), []
        def take(chunks):
            for chunk in chunks:
                got.append(chunk.frames)
                if len(got) == 2:
                    streamer.set_image(IMAGE[::-1].copy(), PROMPT["image_tokens"])
        try:
            take(streamer.chunks(IMAGE, WAVE, **PROMPT))
        except UserError:
            take(streamer.resume())
        return got

    whole = play(FakeVAE())
    assert same(play(FailsOnce(2)), whole) and len(whole[2]) == 9


class FailsOnce(FakeVAE):
    def __init__(self, call):
        self.call, self.calls = call, 0

    def decode(self, z, cache=None):
        self.calls += 1
        if self.calls == self.call + 1:
            raise MemoryError
        return super().decode(z, cache)
