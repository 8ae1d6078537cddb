"""rehearsal: a caller that waits its turn, or does not; and numbers that say what happened."""
from types import SimpleNamespace

import numpy as np
import pytest

from tmlib import rehearsal, speech
from tmlib.config import UserError
from tmlib.conversation import FADE, Event, Line
from tmlib.rehearsal import Call, Caller, Turn, exchanges

TONE = 0.3 * np.sin(np.arange(16_000) * 0.3).astype(np.float32)


def turn(frames, answer="Yes, of course.", **more):
    return Turn("Is it?", answer, np.resize(TONE, frames * 1000).astype(np.float32), **more)


def act(caller, answers, wait=3, length=8):
    """What a caller does when each turn is answered after `wait` frames by `length` frames of sound -> the frames in which it speaks (n,), and the face."""
    speaks, face, since, given = [], [], None, 0
    for _ in range(1000):
        sound = since is not None and wait <= since < wait + length and given in answers
        spoken = caller.speak(sound)
        if spoken is None:
            break
        loud = np.abs(spoken).max() > 0.02
        if loud:
            since, given = 0, caller.now
        elif since is not None:
            since += 1
        speaks.append(bool(loud))
        face.append(sound)
    return np.array(speaks), np.array(face)


def test_a_caller_waits_until_the_answer_has_ended():
    turns = [turn(5), turn(3), turn(4)]
    speaks, face = act(Caller(turns, np.random.default_rng(0)), {0, 1, 2})
    assert speaks.sum() == 12 and not (speaks & face).any() and [t.frame for t in turns] == np.flatnonzero(np.diff(speaks.astype(int), prepend=0) > 0).tolist()
    ends = np.flatnonzero(np.diff(face.astype(int)) < 0)
    assert all(8 <= t.frame - end <= 20 for t, end in zip(turns[1:], ends))


def test_a_caller_breaks_in_and_does_not_wait_for_ever():
    turns = [turn(5), turn(3, interrupts=True), turn(4)]
    speaks, face = act(Caller(turns, np.random.default_rng(0)), {0, 2}, length=40)      # the second is never answered
    assert face[turns[1].frame - 1] and speaks.sum() == 12
    assert 4 * 16 - 1 <= turns[2].frame - (turns[1].frame + 3) <= 4 * 16 + 2


def call(lines, turns, n=80, held=()):
    """A call of n frames, shown when they were due; frames of `held` are the one before once more."""
    number = np.cumsum([k not in held for k in range(n)]) - 1
    return Call(turns, lines, [], number=number.tolist(), at=[k / 16 for k in range(n)], frames=[np.zeros((4, 4, 3), np.uint8)] * n,
                waves=[np.zeros(1000)] * n, spoken=[np.zeros(1000)] * n, late=len(held))


def line(start, frames, text, lead=500, **more):
    wave = np.concatenate([np.zeros(lead, np.float32), np.resize(TONE, frames * 1000 - lead)]).astype(np.float32)
    return Line(wave, 1, text, (speech.Phone("aɪ", lead / 16_000, frames / 16),), start, **more)


def test_a_reply_is_timed_from_sound_to_sound():
    turns = [turn(4), turn(4, answer="No.")]
    turns[0].frame, turns[1].frame = 2, 40
    made = call([line(14_000, 8, "Yes, of course."), line(60_000, 6, "Yes!")], turns, held=(20, 21))
    made.events += [Event("began", 0.2), Event("heard", 0.6), Event("answer", 0.7, "Yes, of course."), Event("heard", 3.2)]
    first, second = exchanges(made)
    lead = int(np.flatnonzero(np.abs(made.lines[0].wave) > rehearsal.LOUD)[0])
    end = (2000 + rehearsal.audible(turns[0].wave)[1] - 1000 + 1000) / 16_000
    assert first["asked"] == pytest.approx(end) and first["reply_ms"] == pytest.approx(1000 * ((14_000 + lead) / 16_000 - end))
    assert first["right"] and not second["right"] and second["said"] == "Yes!" and "hear_ms" not in second
    parts = [first[name] for name in ("hear_ms", "think_ms", "show_ms")]
    assert parts[1] == pytest.approx(100) and sum(parts) == pytest.approx(first["reply_ms"]) and min(parts) > 0
    assert second["answered"] == pytest.approx((62_000 + lead) / 16_000)      # two frames were held before it: it came later than in the stream


def test_an_interruption_is_timed_until_silence():
    turns = [turn(4), turn(4)]
    turns[0].frame, turns[1].frame = 2, 20
    first, second = exchanges(call([line(10_000, 30, "Yes, of course. And so on."), ], turns))
    assert not first["right"] and "interrupted_ms" not in second
    turns[1].interrupts = True
    made = call([line(10_000, 30, "Yes, of", stop=25_000)], turns)
    first, second = exchanges(made)
    begins = rehearsal.audible(turns[1].wave)[0] / 16_000
    assert first["right"] and first["cut"] and second["interrupted_ms"] == pytest.approx(1000 * ((25_000 + FADE) / 16_000 - 20 / 16 - begins))
    assert second["lines"] == [] and not second["right"] and second["reply_ms"] == 4000
    _, second = exchanges(call([line(10_000, 60, "Yes, of course. And so on.")], turns))
    assert second["interrupted_ms"] == 2000                                   # it talked on
    _, second = exchanges(call([line(10_000, 14, "Yes, of course.")], turns))                # 1.5 s, the caller spoke after 1.25
    assert "interrupted_ms" not in second, "over before the caller could be heard"
    _, second = exchanges(call([line(10_000, 14, "Yes, of course."), line(24_000, 20, "And so on.")], turns))
    assert second["interrupted_ms"] == 2000, "its second sentence went on"


def test_a_caller_does_not_wait_for_ever_to_break_into_a_short_answer():
    turns = [turn(5), turn(3, interrupts=True), turn(4)]
    speaks, _ = act(Caller(turns, np.random.default_rng(0)), {0, 1, 2}, length=5)
    assert speaks.sum() == 12


def test_a_rehearsal_is_no_longer_than_what_is_remembered():
    with pytest.raises(UserError, match="60 turns: at most 50"):
        rehearsal.hold(None, Caller([turn(1) for _ in range(60)], np.random.default_rng(0)))


def test_scores_compare_the_mouth_with_what_the_face_says():
    lines = [line(10_000, 20, "Yes, of course."), line(50_000, 20, "Never", stop=60_000)]
    turns = [turn(4), turn(4)]
    turns[0].frame, turns[1].frame = 2, 40
    made = call(lines, turns, n=100, held=(70,))
    true = rehearsal.truth(made)
    assert len(true) == 99 and true[14:28].mean() > 0.3 and true[:8].max() < 0.05 and true[64:].max() < 0.05
    perfect = SimpleNamespace(read=lambda video: None)
    shown = iter([true])
    perfect.read = lambda video: __import__("torch").from_numpy(next(shown)[:, None])[None]
    read, truth = rehearsal.lips(made, perfect)
    numbers = rehearsal.scores([made], [(read, truth)])
    assert np.array_equal(read, truth) and numbers["lip_r"] == pytest.approx(1.0) and numbers["turns"] == 2 and numbers["late"] == 0.01
    assert numbers["listening_opening_mean"] == pytest.approx(0, abs=0.02) and numbers["right_live"] == 0.5
    assert numbers["reply_ms_p95_lo"] <= numbers["reply_ms_p95"] <= numbers["reply_ms_p95_hi"]
    both = rehearsal.scores([made, made], 2 * [(read, truth)])
    assert both["n"] == 2 * numbers["n"] and both["seconds"] == 2 * numbers["seconds"] and both["turns"] == 2, "in each call"
    assert both["right_live_lo"] == both["right_live_hi"] == 0.5                  # over callers, and these two are alike
    assert all(both[key] == pytest.approx(numbers[key]) for key in ("late", "lip_r", "listening_opening_mean", "right_live", "reply_ms_p50"))


def test_a_player_that_is_held_up_is_late_too():
    made = call([], [], n=50)
    assert rehearsal.late(made) == 0 == rehearsal.late(call([], [], n=50)) and rehearsal.late(call([], [], n=50, held=(7, 8))) == 2
    made.at[20:25] = [26 / 16] * 5                                            # frames 20 to 24 in one go, once the machine has time again
    assert rehearsal.late(made) == 5


def test_a_call_in_real_time():
    """A face that answers half a second after the caller has ended: `hold` finds just that."""
    class Face:
        def __init__(self):
            self.lines, self.events, self.late, self.next, self.sound, self.due = [], [], 0, 0, [], None

        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

        def hear(self, wave):
            if np.abs(wave).max() > 0.05:
                self.due = self.next + 8
            elif self.due == self.next:
                self.lines.append(line(self.next * 1000, 4, "Yes, of course.", lead=0))
                self.sound = list(self.lines[-1].wave.reshape(-1, 1000))

        def frame(self):
            self.next += 1
            return np.zeros((4, 4, 3), np.uint8), self.sound.pop(0) if self.sound else np.zeros(1000, np.float32)

    made = rehearsal.hold(Face(), Caller([turn(4), turn(3)], np.random.default_rng(0)))
    rows = exchanges(made)
    assert [r["right"] for r in rows] == [True, True]
    assert all(430 <= r["reply_ms"] <= 900 for r in rows)                     # 500, on a machine that may be busy
    assert made.at[-1] >= (len(made.at) - 1) / 16 - 0.01 and len(made.frames) == len(made.spoken) == len(made.waves)
