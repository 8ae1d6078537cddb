"""sound: gathered without loss in constant memory; live, it is never waited for longer than its time."""
import threading

import numpy as np
import pytest
from fakes import IMAGE, PROMPT, WAVE, make_streamer

from tmlib.config import UserError
from tmlib.sound import FRAME, LiveSound, Sound


class Clock:
    """Seconds that pass only when told to."""

    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


def test_sound_forgets_whole_seconds_only():
    sound = Sound([np.arange(100_000, dtype=np.float32)], history=8000)
    sound.until(50_000)
    sound.forget(45_000)
    assert sound.start == 32_000 and sound.wave[0] == 32_000 and sound.end == 100_000
    sound.forget(45_000)
    assert sound.start == 32_000
    sound.until(100_010)
    assert sound.total == 100_000 and sound.end == 100_010 and (sound.wave[-10:] == 0).all()


def test_a_failing_source_is_named_and_what_it_gave_is_kept():
    def pieces():
        yield WAVE[:20_000]
        raise ConnectionError("line is dead")

    sound = Sound(pieces(), history=8000)
    with pytest.raises(UserError, match="failed after 1.2 s: ConnectionError: line is dead"):
        sound.until(30_000)
    assert np.array_equal(sound.wave, WAVE[:20_000])
    sound.follow([WAVE[20_000:]])
    sound.until(50_000)
    assert np.array_equal(sound.wave, WAVE)


def live(wave, size, clock=None):
    sound = LiveSound(clock=clock or Clock())
    for i in range(0, len(wave), size):
        sound.push(wave[i:i + size])
    return sound


@pytest.mark.parametrize("size", [333, 4000, 60_000])
def test_pushed_sound_is_the_same_sound(size):
    sound = live(WAVE, size)
    sound.close()
    assert np.array_equal(np.concatenate(list(sound)), WAVE)
    with pytest.raises(UserError, match="was closed"):
        sound.push(WAVE[:10])


def test_late_sound_is_silence_and_then_spoken():
    clock = Clock()
    sound = live(WAVE[:2500], 2500, clock)
    assert len(next(sound)) == 2500                                      # time begins here
    clock.now += 0.5                                                     # 8000 samples should be there
    for _ in range(5):
        piece = next(sound)
        assert len(piece) == FRAME and not piece.any()
    sound.push(WAVE[2500:2600])                                          # late, not lost
    assert np.array_equal(next(sound), WAVE[2500:2600])
    sound.close()
    assert list(sound) == []


def test_sound_is_waited_for_until_its_time_and_not_longer():
    clock = Clock()
    sound = LiveSound(patience_s=0.1, clock=clock)
    got = []
    thread = threading.Thread(target=lambda: got.append(next(sound)), daemon=True)
    thread.start()
    thread.join(0.3)
    assert thread.is_alive()                                             # its time has not come: the clock stands still
    clock.now += 0.17                                                    # one frame and the patience
    thread.join(30)
    assert len(got) == 1 and len(got[0]) == FRAME and not got[0].any()
    thread = threading.Thread(target=lambda: got.append(next(sound)), daemon=True)
    thread.start()
    sound.push(WAVE[:10])                                                # sound ends the wait at once, whatever the clock says
    thread.join(30)
    assert np.array_equal(got[1], WAVE[:10])


def test_a_source_that_is_gone_and_a_stream_that_does_not_keep_up():
    clock = Clock()
    sound = LiveSound(gone_s=3.0, full_s=2.0, clock=clock)
    sound.push(WAVE[:32_000])
    with pytest.raises(UserError, match="2 s of sound wait to be spoken"):
        sound.push(WAVE[:1])
    assert len(next(sound)) == 32_000
    clock.now += 2.9
    assert not next(sound).any()
    clock.now += 0.2
    with pytest.raises(UserError, match="no sound has come for 3.1 s"):
        next(sound)
    sound = live(WAVE[:100], 100)
    sound.close("the microphone was unplugged")
    assert len(next(sound)) == 100
    with pytest.raises(UserError, match="microphone was unplugged"):
        next(sound)


def test_a_live_stream_speaks_listens_and_speaks_again():
    """Sound for chunks 0 and 1, then nothing for two chunks, then more: no stall, the right prompt for each, no sample lost."""
    clock = Clock()
    sound = live(WAVE[:21_700], 500, clock)
    streamer = make_streamer()
    chunks = []
    for chunk in streamer.chunks(IMAGE, sound, listening=-PROMPT["text"], **PROMPT):
        chunks.append(chunk)
        clock.now += 0.75
        if len(chunks) == 2:
            clock.now += 100
        if len(chunks) == 4:
            sound.push(WAVE[21_700:])
            sound.close()
    assert [c.listening for c in chunks[:5]] == [False, False, False, True, False]
    heard = np.concatenate([WAVE[:21_700], np.zeros(24_000, np.float32), WAVE[21_700:]])       # what the clock allowed for
    spoken = np.concatenate([c.wave for c in chunks])
    assert np.array_equal(spoken, np.pad(heard, (0, len(spoken) - len(heard))))                 # what a player must play
    again = list(make_streamer().chunks(IMAGE, heard, listening=-PROMPT["text"], **PROMPT))
    assert [c.frame for c in chunks] == [c.frame for c in again]
    assert all(np.array_equal(a.frames, b.frames) for a, b in zip(chunks, again, strict=True))
