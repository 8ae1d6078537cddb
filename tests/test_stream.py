"""stream: any pieces of sound, the same frames; a streamer that never grows."""
import gc
import itertools
import tracemalloc
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from fakes import IMAGE, PROMPT, TIMES, WAVE, FakeEars, FakeVAE, make_streamer
from tiny import make_dit

from tmlib import stream
from tmlib.chain import CACHES, rollout
from tmlib.config import UserError
from tmlib.placement import to_frames
from tmlib.vae import i2v_condition

def speak(wave=WAVE, streamer=None, **more):
    streamer = streamer or make_streamer()
    return list(streamer.stream(IMAGE, wave, **{**PROMPT, **more}))


def test_frames_come_chunk_by_chunk_and_cover_the_sound():
    frames = speak()
    assert [f.shape for f in frames] == [(9, 32, 32, 3)] + [(12, 32, 32, 3)] * 4        # 57 frames >= 50 000 / 1000 > 45
    assert all(f.dtype == np.uint8 for f in frames)
    assert len(speak(WAVE[:9000])) == 1 and len(speak(WAVE[:9001])) == 2 and len(speak(WAVE[:1])) == 1


@pytest.mark.parametrize("size", [1, 777, 1000, 49_999, 60_000])
def test_pieces_of_any_size_give_the_same_frames(size):
    wave = WAVE if size > 1 else WAVE[:10_000]
    pieces = (wave[i:i + size] for i in range(0, len(wave), size))
    a, b = speak(wave), speak(itertools.chain([wave[:0]], pieces))
    assert all(np.array_equal(x, y) for x, y in zip(a, b, strict=True))


def test_streamer_is_rollout_plus_codec():
    streamer, cond = make_streamer(seed=3), None
    frames = np.concatenate(speak(streamer=streamer))
    cond = i2v_condition(FakeVAE(), stream.to_video(IMAGE), 21, "grey")
    audio = FakeEars().tokens(np.pad(WAVE, (0, 20_000)), 0, 15)[None]
    z = rollout(streamer.dit, cond, chunks=5, timesteps=TIMES, text=PROMPT["text"], image=PROMPT["image_tokens"], audio=audio,
                audio_mask=torch.ones(1, 15, 2, 2), generator=torch.Generator().manual_seed(3))
    video, cache = [], None
    for part in z.split(3, 2):
        out, cache = FakeVAE().decode(part, cache)
        video.append(to_frames(out))
    assert np.array_equal(frames, np.concatenate(video))


def test_sound_is_waited_for_no_longer_than_needed():
    read = []
    pieces = (read.append(i) or WAVE[500 * i: 500 * i + 500] for i in range(100))
    frames = make_streamer().stream(IMAGE, pieces, **PROMPT)
    next(frames)
    assert len(read) == -(-(9000 + 700) // 500)                                         # 9 frames and the ears' look-ahead
    next(frames)
    assert len(read) == -(-(21_000 + 700) // 500)


def test_the_same_words_stay_the_same_tensor_on_the_device():
    elsewhere = lambda: SimpleNamespace(to=lambda device: object())                     # on a GPU each move makes a new tensor
    streamer, (speaking, listening) = make_streamer(), (elsewhere(), elsewhere())
    first, other = streamer.moved(speaking), streamer.moved(listening)
    assert streamer.moved(speaking) is first is not other and streamer.moved(listening) is other and streamer.moved(None) is None


def test_prompt_can_change_between_chunks():
    def toggled(switch):
        streamer = make_streamer()
        out = []
        for i, frames in enumerate(streamer.stream(IMAGE, WAVE, **PROMPT)):
            out.append(frames)
            if i == 1 and switch:
                streamer.set_text(-3 * PROMPT["text"])
        return out
    same, changed = toggled(False), toggled(True)
    equal = [np.array_equal(a, b) for a, b in zip(same, changed, strict=True)]
    assert equal[:2] == [True, True] and not any(equal[2:])


def held():
    """(tensors alive, bytes that Python holds)"""
    gc.collect()
    return sum(isinstance(o, torch.Tensor) for o in gc.get_objects()), tracemalloc.get_traced_memory()[0]


@pytest.mark.parametrize("mode", CACHES)
def test_an_hour_is_as_small_as_a_minute(mode):
    ears = FakeEars()
    ears.history_samples = 2 * 16_000
    endless = (WAVE[:4000] for _ in itertools.count())
    tracemalloc.start()
    frames = make_streamer(dit=make_dit(num_layers=1), ears=ears, cache=mode).stream(IMAGE, endless, **PROMPT)
    for _ in range(12):
        next(frames)
    ears.calls.clear()
    tensors, size = held()
    for _ in range(24):
        next(frames)
    longest = max(n for _, n in ears.calls)
    ears.calls.clear()
    after = held()
    tracemalloc.stop()
    assert longest <= 16_000 * 4
    assert after[0] == tensors and after[1] - size < 100_000                            # one chunk of frames alone is 37 kB


def test_bad_input_gets_one_line():
    streamer = make_streamer()
    nan = WAVE.copy()
    nan[30_000] = np.nan
    bad = [(IMAGE, np.zeros(0, np.float32), "audio is empty"), (IMAGE, [], "audio is empty"), (IMAGE, nan, "finite"),
           (IMAGE, [WAVE[:5000], np.zeros((10, 2), np.float32)], "audio piece 2"), (IMAGE, (WAVE * 1000).astype(np.int16), "float samples"),
           (IMAGE[..., 0], WAVE, "picture must be uint8"), (IMAGE / 255, WAVE, "picture must be uint8")]
    for image, wave, line in bad:
        with pytest.raises(UserError) as error:
            list(streamer.stream(image, wave, **PROMPT))
        assert line in str(error.value) and "\n" not in str(error.value)
    with pytest.raises(UserError, match="placement 'cloud' is unknown; choose one of serial, overlap"):
        make_streamer(placement="cloud")
    ears = FakeEars()
    ears.cfg = SimpleNamespace(group=2)
    with pytest.raises(UserError, match=r"hears 2 latent frames at a time, and chunks of 3 .* `load_speech\(folder, 3\)`"):
        make_streamer(ears=ears)
    make_streamer(ears=ears, chunk=4)


def test_chunks_know_their_place_in_time():
    chunks = list(make_streamer().chunks(IMAGE, WAVE, **PROMPT))
    assert [c.frame for c in chunks] == [0, 9, 21, 33, 45] and [c.index for c in chunks] == [0, 1, 2, 3, 4]
    assert [c.opens for c in chunks] == [True] + 4 * [False] and not any(c.listening for c in chunks)
    assert [len(c.wave) for c in chunks] == [1000 * len(c.frames) for c in chunks]
    assert np.array_equal(np.concatenate([c.wave for c in chunks]), np.pad(WAVE, (0, 7000)))
    for c in chunks:
        stages = [c.marks[name] for name in ("hear", "dit", "vae")]
        assert all(began <= ended for began, ended in stages) and stages == sorted(stages)


def test_silence_is_listened_to():
    """Chunks of digital silence take the listening prompt: as if somebody had switched by hand, and no cache is touched."""
    wave, listening = WAVE.copy(), -3 * PROMPT["text"]
    wave[21_000:33_000] = 0                                                             # chunk 2, exactly
    chunks = list(make_streamer().chunks(IMAGE, wave, listening=listening, **PROMPT))
    assert [c.listening for c in chunks] == [False, False, True, False, False]
    streamer, by_hand = make_streamer(), []
    for i, frames in enumerate(streamer.stream(IMAGE, wave, **PROMPT)):
        by_hand.append(frames)
        streamer.set_text(listening if i == 1 else PROMPT["text"])
    assert all(np.array_equal(c.frames, f) for c, f in zip(chunks, by_hand, strict=True))
    assert not np.array_equal(chunks[2].frames, speak(wave)[2])


def test_another_picture_begins_at_a_chunks_border():
    streamer, ears, other = make_streamer(seed=3), FakeEars(), IMAGE[::-1].copy()
    chunks = []
    for chunk in streamer.chunks(IMAGE, WAVE, **PROMPT):
        chunks.append(chunk)
        if len(chunks) == 2:
            streamer.set_image(other, PROMPT["image_tokens"])
    assert [(c.frame, c.opens, len(c.frames)) for c in chunks] == [
        (0, True, 9), (9, False, 12), (21, True, 9), (30, False, 12), (42, False, 12)]  # no frame of sound lost or heard twice
    assert np.array_equal(np.concatenate([c.wave for c in chunks]), np.pad(WAVE, (0, 4000)))
    noise = torch.Generator().manual_seed(3)
    for _ in range(4):                                                                  # two chunks of two steps
        torch.randn(1, 16, 3, 4, 4, generator=noise)
    audio = ears.tokens(np.pad(WAVE, (0, 20_000))[21_000:], 0, 9)[None]                 # the sound goes on where it was
    z = rollout(streamer.dit, i2v_condition(FakeVAE(), stream.to_video(other), 21, "grey"), chunks=3, timesteps=TIMES,
                text=PROMPT["text"], image=PROMPT["image_tokens"], audio=audio, audio_mask=torch.ones(1, 9, 2, 2), generator=noise)
    assert np.array_equal(chunks[2].frames, to_frames(FakeVAE().decode(z[:, :, :3])[0]))
