"""conversation: what was shown stays, what is to be said is said once, and a take-back gives what full knowledge would have."""
import itertools
import time
import weakref
from types import SimpleNamespace

import fakes
import numpy as np
import pytest
from fakes import IMAGE, PROMPT, WAVE, SharpVAE

from tmlib import conversation, speech
from tmlib.config import UserError
from tmlib.conversation import FADE, Conversation
from tmlib.ear import WINDOW, Ear
from tmlib.placement import Chunk
from tmlib.sound import FRAME, Sound

SAID = WAVE[:23_456]                             # an answer


def make_streamer(**more):
    return fakes.make_streamer(SharpVAE(), **{"undo": 1, **more})


def utterance(wave, text="one two three four"):
    return speech.Utterance(wave, (speech.Phone("sil", 0.0, len(wave) / speech.RATE),), text)


class Partner:
    """Answers each turn with the given utterances; notes what it is told."""

    def __init__(self, *answers):
        self.answers, self.heard, self.cuts, self.hushed = answers, [], [], 0

    def reply(self, wave):
        self.heard.append(wave)
        yield from self.answers

    def hush(self):
        self.hushed += 1

    def cut(self, heard):
        self.cuts.append(heard)

    def forget(self):
        pass


class ScriptedEar:
    """Hears what it is told: the wave's first sample says what."""

    def hear(self, wave):
        return {0: [], 1: [("began", None)], 2: [("heard", wave)]}[int(wave[0])]


BEGIN, TURN = np.full(10, 1.0, np.float32), np.full(10, 2.0, np.float32)


def talk(*answers, **more):
    """A conversation without threads of its own: `make` and `answer` are called by the test."""
    return Conversation(make_streamer(**more), Partner(*answers), IMAGE, ear=ScriptedEar(), clock=lambda: 0.0, **PROMPT)


def answer(c):
    """Let the partner think about all that was heard."""
    c.turns.put(None)
    c.think()


def show(c, n):
    """n frames as a player would take them, chunks made when they are wanted -> frames (n, H, W, 3), sound (1000 n,)."""
    out = []
    for _ in range(n):
        while c.make():
            pass
        out.append(c.frame())
    frames, sound = zip(*out)
    return np.stack(frames), np.concatenate(sound)


def offline(wave, n):
    """The first n frames of a stream whose sound is known from the beginning."""
    return np.concatenate(list(make_streamer().stream(IMAGE, np.pad(wave, (0, max(n * FRAME - len(wave), 0))), **PROMPT)))[:n]


def same(made, known):
    """Where chunks come in parts, sums may be rounded otherwise."""
    return len(made) == len(known) and np.abs(made.astype(int) - known).max(initial=0) <= 1


# ------------------------------------------------------------------------------------------------------- Streamer.rewind
@pytest.mark.parametrize("placement", ["serial", "overlap"])
@pytest.mark.parametrize("at", [9700, 12_000, 20_999, 21_000])
def test_a_chunk_taken_back_is_made_as_if_its_sound_had_been_known(placement, at):
    told = []
    pieces = (told.pop(0) if told else np.zeros(FRAME, np.float32) for _ in itertools.count())
    with make_streamer(placement=placement, depth=1) as streamer:
        stream = streamer.chunks(IMAGE, pieces, **PROMPT)
        first, silent = next(stream).frames, next(stream).frames
        forgotten = streamer.rewind(at)
        assert len(forgotten) and not forgotten.any()
        told.append(SAID)
        again = streamer.resume()
        made = [c for c, _ in zip(again, range(3))]
        again.close()
    if at == 21_000:                             # sound alone, which comes after all frames
        known = np.concatenate([first, silent, *(c.frames for c in made)])
        assert [c.index for c in made] == [2, 3, 4]
    else:
        known = np.concatenate([first, *(c.frames for c in made)])
        assert [c.index for c in made] == [1, 2, 3] and not np.array_equal(made[0].frames, silent)
    wave = np.concatenate([np.zeros(at, np.float32), SAID])
    assert np.array_equal(known, offline(wave, len(known)))


def test_nothing_is_taken_back_that_is_too_far_back():
    streamer = make_streamer()
    with pytest.raises(UserError, match="cannot be taken back"):
        streamer.rewind(0)
    stream = streamer.chunks(IMAGE, WAVE, **PROMPT)
    for _ in range(3):
        next(stream)
    assert streamer.settled == 21_000
    with pytest.raises(UserError, match="undo"):
        streamer.rewind(20_999)
    streamer.rewind(21_000)
    with pytest.raises(UserError, match="undo"):
        streamer.rewind(20_999)                  # nor in two steps


def test_the_chunk_of_a_new_picture_can_be_taken_back():
    def frames(rewind):
        streamer, stream = make_streamer(), None
        stream = streamer.chunks(IMAGE, WAVE, **PROMPT)
        out = [next(stream).frames, next(stream).frames]
        streamer.set_image(255 - IMAGE)
        out.append(next(stream).frames)
        if rewind:
            lost = streamer.rewind(24_000)
            out[-1:], streamer.take.sound.pieces = [], itertools.chain([lost], streamer.take.sound.pieces)
            stream = streamer.resume()
        return np.concatenate(out + [c.frames for c in stream])
    assert np.array_equal(frames(True), frames(False))


def test_without_undo_nothing_more_is_kept():
    streamer = make_streamer(undo=0, resumable=True)
    for _ in streamer.chunks(IMAGE, WAVE, **PROMPT):
        assert len(streamer.take.after) == 1 and not streamer.take.pictures


# ---------------------------------------------------------------------------------------------------------- conversations
@pytest.mark.parametrize("in_parts", [False, True])
@pytest.mark.parametrize("wait", [1, 5, 9, 11, 14, 20, 27])
def test_an_answer_begins_two_frames_after_it_is_known(wait, in_parts):
    c = talk(utterance(SAID), in_parts=in_parts)
    before, silence = show(c, wait)
    c.hear(BEGIN), c.hear(TURN), answer(c)
    after, sound = show(c, 40)
    frames = np.concatenate([before, after])
    lead = int(np.flatnonzero(np.append(silence, sound))[0])
    chunk_end = max(e for e in (9, 21, 33, 45) if e - 15 < wait)             # the last frame made when the answer came
    begins = wait + 2 if wait + 2 <= chunk_end else chunk_end
    assert lead == begins * FRAME and c.late == 0
    assert np.array_equal(np.append(silence, sound)[lead:lead + len(SAID)], SAID)
    quiet, known = offline(np.zeros(1000, np.float32), 60), offline(np.concatenate([np.zeros(lead, np.float32), SAID]), len(frames))
    assert same(frames[:begins], quiet[:begins])
    assert same(frames[begins:], known[begins:]) or begins in (9, 21, 33)      # at a border the last chunk may have looked ahead into silence
    spoke = [e for e in c.events if e.kind == "spoke"]
    assert [e.kind for e in c.events] == ["began", "heard", "answer", "spoke"] and spoke[0].text == "one two three four"


@pytest.mark.parametrize("in_parts", [False, True])
@pytest.mark.parametrize("placement, times", [("serial", 12), ("overlap", 6), ("two_process", 2)])
def test_what_is_said_is_said_once_and_in_order_whenever_it_comes(placement, times, in_parts):
    rng = np.random.default_rng(0)
    for _ in range(times):
        parts = [WAVE[a:b] for a, b in itertools.pairwise(np.sort(rng.integers(100, 50_000, 4)).tolist()) if b - a > 50]
        c = talk(placement=placement, in_parts=in_parts)
        heard = [show(c, int(rng.integers(1, 30)))[1]]
        for part in parts:                                                    # as a slow partner would
            c.to_say.append(conversation.Line(part, 0))
            c.more = True
            heard.append(show(c, int(rng.integers(1, 20)))[1])
        sound = np.concatenate([*heard, show(c, 80)[1]])
        assert c.late == 0
        at = 0
        for line, part in zip(c.lines, parts, strict=True):
            assert np.array_equal(sound[line.start:line.start + len(part)], part) and line.start >= at
            at = line.start + len(part)
        assert np.count_nonzero(sound) == sum(np.count_nonzero(p) for p in parts)
        c.close()


def test_nothing_is_lost_where_parts_of_chunks_are_made_and_shown_in_any_order(monkeypatch):
    """Chunks are taken back when one, two or all of their parts have been made, and when some of those have been shown."""
    rng, places = np.random.default_rng(2), set()
    for _ in range(12):
        parts, c, sound = [WAVE[a:a + 4000] for a in rng.integers(0, 40_000, 3)], talk(in_parts=True), []
        rewind, waiting = c.streamer.rewind, list(parts)
        monkeypatch.setattr(c.streamer, "rewind", lambda at: places.add((c.begins, at > c.streamer.take.after[-1].end)) or rewind(at))
        while c.make():
            pass
        for what in rng.choice(["make", "show", "say"], 300, p=[0.6, 0.35, 0.05]):
            late = c.late
            if what == "make":
                c.make()
            elif what == "show" and (played := c.frame()[1]) is not None and c.late == late:
                sound.append(played)
            elif what == "say" and waiting:
                c.to_say.append(conversation.Line(waiting.pop(0), 0))
                c.more = True
        sound = np.concatenate([*sound, show(c, 80)[1]])
        for line, part in zip(c.lines, parts, strict=False):
            assert np.array_equal(sound[line.start:line.start + len(part)], part)
        assert np.count_nonzero(sound) == sum(np.count_nonzero(part) for part in parts[:3 - len(waiting)])
    assert places >= {(True, False), (False, False), (False, True)}


def test_a_long_call_does_not_grow(monkeypatch):
    monkeypatch.setattr(conversation, "LINES", 5)
    c = talk()
    for _ in range(9):
        c.to_say.append(conversation.Line(SAID[:3000], 0))
        show(c, 6)
    assert len(c.lines) == 5 and c.lines[-1].shown and len(c.ready) < 20 and len(c.streamer.take.after) == 2


def test_an_interruption_fades_and_the_partner_learns_what_was_heard():
    c = talk(utterance(SAID, "one two three four"), utterance(SAID, "never heard"))
    show(c, 3)
    c.hear(BEGIN), c.hear(TURN), answer(c)
    sound = show(c, 2 + 12)[1]                                                # twelve frames of 23.5: two words of four
    c.hear(BEGIN)
    sound = np.append(sound, show(c, 40)[1])
    start, stop = c.lines[0].start, c.lines[0].stop
    assert start == 5 * FRAME and stop == 19 * FRAME
    said = sound[start - 3 * FRAME:]
    assert np.array_equal(said[:stop - start], SAID[:stop - start])
    fade = said[stop - start:stop - start + FADE]
    assert np.allclose(fade, SAID[stop - start:stop - start + FADE] * np.linspace(1, 0, FADE)) and not said[stop - start + FADE:].any()
    c.hear(TURN), answer(c)
    assert c.partner.cuts == ["one two"] and len(c.partner.heard) == 2
    assert [e.kind for e in c.events][:6] == ["began", "heard", "answer", "answer", "spoke", "began"]
    assert show(c, 40)[1].any()                                               # and the next answer is said


def test_a_caller_who_breaks_in_while_chunks_are_taken_back_is_not_talked_over():
    """What an overlapping stage was given too early comes back, but not once its answer is over."""
    c = talk(placement="overlap")
    show(c, 30)
    c.to_say += [conversation.Line(WAVE[:3000], 0, "first"), conversation.Line(WAVE[:3000], 0, "second")]
    c.more, rewind = True, c.streamer.rewind

    def interrupted(at):
        c.hear(BEGIN)
        return rewind(at)

    while c.sample <= c.next * FRAME or not any(x.text == "second" for x in c.lines):
        show(c, 1)
    c.interrupted, c.streamer.rewind = True, interrupted
    c.make()
    assert not [x.text for x in c.to_say if x.text]
    c.close()


def test_who_speaks_on_is_not_answered_twice():
    c = talk(utterance(SAID))
    show(c, 3)
    c.hear(BEGIN), c.hear(TURN), c.hear(BEGIN), c.hear(TURN), answer(c)      # a pause, and on
    assert c.partner.cuts == [] and len(c.partner.heard) == 1 and np.array_equal(c.partner.heard[0], np.append(TURN, TURN)), "all of it, at once"
    sound = show(c, 60)[1]
    assert np.count_nonzero(sound) == np.count_nonzero(SAID)


def test_a_partner_that_thinks_long_is_stopped_at_once():
    c = talk()
    show(c, 3)

    def slow(wave):
        c.hear(BEGIN)                                                         # the caller speaks on while it thinks
        assert c.partner.hushed == 1 and c.partner.cuts == []                 # what was answered before stays as it was
        yield utterance(SAID)
    reply, c.partner.reply = c.partner.reply, slow
    c.hear(BEGIN), c.hear(TURN), answer(c)
    assert not show(c, 40)[1].any() and not {"answer", "nothing"} & {e.kind for e in c.events}
    c.partner.reply = reply
    c.hear(TURN), answer(c)
    assert c.partner.cuts == [""]                                             # of that answer nothing was heard


def test_who_breaks_in_twice_cuts_the_answer_that_was_given():
    c = talk()
    show(c, 3)

    def stuck(wave):
        yield utterance(SAID, "one two three four")
        show(c, 14)
        c.hear(BEGIN), show(c, 20), c.hear(TURN), c.hear(BEGIN)               # before it is asked for more; the voice is silent since long
        yield utterance(SAID)
    c.partner.reply = stuck
    c.hear(BEGIN), c.hear(TURN), answer(c)
    assert c.cut == "one two"


def test_no_answer_is_an_event():
    c = talk()
    c.hear(BEGIN), c.hear(TURN), answer(c)
    assert [e.kind for e in c.events] == ["began", "heard", "nothing"]


def test_an_interruption_in_the_middle_of_a_chunk_does_not_wait_for_its_end():
    """Its parts that are still to be decoded are dropped."""
    c = talk(in_parts=True)
    c.to_say.append(conversation.Line(SAID, 0))
    before = [*show(c, 11)[0]]
    while len(c.ready) >= c.ahead:
        before.append(c.frame()[0])
    assert c.begins and c.make() and not c.begins                             # of the next chunk the first latent frame is there, no more
    c.hear(BEGIN)
    assert c.make() and not c.begins                                          # taken back, and begun again
    after, sound = show(c, 30)
    stop = c.lines[0].stop
    assert stop == (len(before) + 2) * FRAME and c.late == 0
    assert np.array_equal(sound[:2 * FRAME], SAID[len(before) * FRAME:stop]) and not sound[2 * FRAME + FADE:].any()
    assert same(np.stack([*before, *after[:2]]), offline(SAID, len(before) + 2))


class Clocked:
    """A streamer in a time of its own: the DiT takes `dit` seconds a chunk, the decoder `decoder` for a latent frame, and while they work, frames are shown. A frame is its number."""
    chunk = 3

    def __init__(self, in_parts, dit, decoder, wait):
        self.in_parts, self.dit, self.decoder, self.wait, self.ends = in_parts, dit, decoder, wait, [0, 0]

    settled = property(lambda self: self.ends[0])

    def chunks(self, picture, sound):
        self.sound = Sound(sound, 10 * speech.RATE)
        return self.play(0)

    def resume(self):
        return self.play(self.ends[-1] // FRAME)

    def rewind(self, at):
        while at < self.ends[-1]:
            self.ends.pop()
        return self.sound.drop(at)

    def play(self, first):
        while True:
            cuts = [first, *range(first + (1 if first == 0 else 4), first + (10 if first == 0 else 13), 4)]
            self.sound.until((cuts[-1] + 4) * FRAME)
            self.wait(self.dit)
            for begin, end in itertools.pairwise(cuts if self.in_parts else [first, cuts[-1]]):
                self.wait(self.decoder * len([c for c in cuts if begin < c <= end]))
                wave = self.sound.wave[begin * FRAME - self.sound.start:end * FRAME - self.sound.start].copy()
                if end == cuts[-1]:
                    self.ends = [self.ends[-1], end * FRAME]
                yield Chunk(0, begin, begin == 0, end == cuts[-1], wave=wave, frames=np.arange(begin, end))
            first = cuts[-1]

    def close(self):
        pass


@pytest.mark.parametrize("in_parts", [False, True])
@pytest.mark.parametrize("dit, decoder", [(0.4, 0.45), (1, 1), (2, 0.5)])
def test_a_nervous_caller_does_not_make_frames_late(in_parts, dit, decoder):
    """Answers and interruptions at any time, in a made-up time whose unit is a frame: every frame is there when it is due, in order and with its own sound."""
    rng, now, shown, due, news = np.random.default_rng(0), [0.0], [], [0.0], [20.0]

    def wait(frames):
        end = now[0] + frames
        while c is not None and min(due[0], news[0]) <= end:
            now[0] = max(now[0], min(due[0], news[0]))
            if due[0] <= news[0]:
                frame, _ = c.frame()
                shown.append(int(frame))
                due[0] += 1
            elif c.spoken > c.next * FRAME:
                c.interrupt()
                news[0] += rng.uniform(5, 20)
            else:
                c.to_say.append(conversation.Line(np.ones(int(rng.uniform(0.5, 3) * speech.RATE), np.float32), c.turn))
                c.more, news[0] = True, news[0] + rng.uniform(8, 40)
        now[0] = end

    c = None
    talk = Conversation(Clocked(in_parts, dit, decoder, wait), Partner(), IMAGE, ear=ScriptedEar(), clock=lambda: now[0] / 16)
    while talk.make():
        pass
    c, due[0], news[0] = talk, now[0] + 1, now[0] + 20
    while len(shown) < 1500:
        c.make() or wait(0.1)
    assert c.late == 0 and shown == list(range(len(shown)))


def test_frames_behind_others_of_their_chunk_take_longer_to_make_again():
    c = talk(in_parts=True)
    c.cost = {True: 0.2, False: 0.1}
    assert [round(c.until(k), 9) for k in (0, 1, 4, 5, 8, 9, 12, 13, 17, 20, 21)] == [0.2, 0.3, 0.3, 0.4, 0.4, 0.2, 0.2, 0.3, 0.4, 0.4, 0.2]
    c.cost = {True: 0.1, False: 0.02}
    assert [c.keep for c.next in (5, 6)] == [4, 3]                            # up to frame 8, the third part; frame 9 begins the next chunk
    c.streamer.in_parts = False
    assert c.until(8) == c.until(9) == 0.1


def test_a_slow_chunk_does_not_stop_the_taking_back():
    for parts in (False, True):
        c = talk(in_parts=parts)
        c.cost = {True: 60.0, False: 60.0}
        assert c.keep == 12 and c.ahead == 14


def test_silero_leaves_the_number_of_threads_alone(python):
    done = python("-c", "import torch; torch.set_num_threads(2); from tmlib.ear import Ear; Ear(0.35); print(torch.get_num_threads())")
    assert done.stdout.strip() == "2"


def test_a_closed_call_has_not_failed():
    c = Conversation(make_streamer(), Partner(), IMAGE, ear=ScriptedEar(), **PROMPT)
    c.start()
    c.close()
    c.ready.clear()
    while c.make():                                                           # what was read of the sound before is made, then no more
        c.ready.clear()
    assert c.chunks is not None and c.failed is None


def test_a_late_face_holds_still_and_loses_nothing():
    c = talk(utterance(SAID))
    _, first = show(c, 9)
    c.hear(BEGIN), c.hear(TURN), answer(c)
    held = [c.frame() for _ in range(15)]                                     # nobody makes chunks
    frames, sound = show(c, 40)
    assert c.late > 0 and all(np.array_equal(f, held[-1][0]) for f, _ in held[-c.late:])
    assert np.count_nonzero(np.concatenate([w for _, w in held])) + np.count_nonzero(sound) == np.count_nonzero(SAID)


def test_live_threads_and_their_failures():
    c = Conversation(make_streamer(), Partner(utterance(SAID)), IMAGE, ear=ScriptedEar(), **PROMPT)
    with c:
        c.hear(BEGIN), c.hear(TURN)
        sound, until = [], time.monotonic() + 20
        while np.count_nonzero(np.concatenate([np.zeros(0), *sound])) < np.count_nonzero(SAID) and time.monotonic() < until:
            sound.append(c.frame()[1])
            time.sleep(0.005)
        assert np.count_nonzero(np.concatenate(sound)) == np.count_nonzero(SAID)
    c.close()

    def broken(wave):
        raise KeyError("no such word")
        yield
    c = Conversation(make_streamer(), SimpleNamespace(reply=broken, hush=lambda: None), IMAGE, ear=ScriptedEar(), **PROMPT)
    with c, pytest.raises(UserError, match="broke off: KeyError: 'no such word'"):
        c.hear(BEGIN), c.hear(TURN)
        until = time.monotonic() + 20
        while time.monotonic() < until:
            c.frame()
            time.sleep(0.01)


# ------------------------------------------------------------------------------------------------------------------- Ear
HUSH_S = 0.35


def loud(window):
    """A detector for tests: sound is speech."""
    return float(np.abs(window).max() > 0.1)


def call(*parts):
    """Sound and silence in turn, in windows."""
    rng = np.random.default_rng(1)
    return np.concatenate([rng.uniform(-1, 1, n * WINDOW).astype(np.float32) * (i % 2) for i, n in enumerate(parts)])


@pytest.mark.parametrize("size", [1, 160, 512, 1000, 100_000])
def test_pieces_of_any_size_make_the_same_turns(size):
    wave, ear = call(20, 30, 8, 10, 40, 2, 20, 25, 30), Ear(HUSH_S, detector=loud)
    wave = wave[:-7]
    events = [e for i in range(0, len(wave), size) for e in ear.hear(wave[i:i + size])] if size > 1 else [e for x in np.array_split(wave, 31) for e in ear.hear(x)]
    assert [k for k, _ in events] == ["began", "heard", "began", "heard"]     # a pause of 8 windows is part of a turn, 2 windows of sound are none
    first, second = (turn for kind, turn in events if kind == "heard")
    at = 20 * WINDOW
    assert np.array_equal(first[9 * WINDOW:], wave[at:at + len(first) - 9 * WINDOW])      # 0.3 s before it are kept
    assert len(first) == (9 + 30 + 8 + 10 + ear.hush) * WINDOW and len(second) == (9 + 25 + ear.hush) * WINDOW


def test_an_endless_turn_is_cut():
    ear = Ear(HUSH_S, detector=loud, longest_s=1.0)
    kinds = [k for k, _ in ear.hear(call(0, 100))]
    assert kinds[:3] == ["began", "heard", "began"] and kinds.count("heard") == 3


def test_the_real_detector_finds_a_spoken_sentence():
    voices, rng = speech.load_voices(), np.random.default_rng(0)
    for voice in voices["test"][:2] + voices["natural"]:
        said = speech.synthesise("What is the capital of Germany?", voice).wave
        wave = np.pad(said, (12_000, 12_000)) + 1e-3 * rng.standard_normal(len(said) + 24_000).astype(np.float32)
        events = Ear(HUSH_S).hear(wave.astype(np.float32))
        assert [k for k, _ in events] == ["began", "heard"]
        turn = events[1][1]
        assert len(said) * 0.9 < len(turn) < len(said) + 0.9 * speech.RATE
        assert np.square(turn).sum() > 0.97 * np.square(wave).sum()


# -------------------------------------------------------------------------------------------------------------- together
def test_the_demo_answers_and_remembers(tmp_path):
    """Ear, language model, voice, student and decoder, as `make call` has them. The caller has a voice of the training: what unheard ones reach is measured in notebook 68."""
    from PIL import Image

    from tmlib import avatar, config, data
    track = avatar.make_track(np.random.default_rng(0), [], 5, 16)
    frames = data.portrait(avatar.sample_identity(np.random.default_rng([7, 2_000_003]), "flat"), track, 64)[0]
    Image.fromarray(frames[0]).save(tmp_path / "face.png")
    voice, said = speech.load_voices()["train"][0], []
    with conversation.open_call(tmp_path / "face.png", config.DATA / "demo")() as c:
        for question in ("What colour is grass?", "My name is Anna.", "What is my name?"):
            c.hear(np.pad(speech.synthesise(question, voice).wave, (8000, 16_000)))
            sound, until = [], time.monotonic() + 30
            while time.monotonic() < until and not (len(sound) > 8 and max(sound[-8:]) < 0.01 < max(sound) and c.events[-1].kind == "spoke"):     # half a second of silence
                frame, wave = c.frame()
                sound.append(np.abs(wave).max())
                time.sleep(0.02)
            said.append([e.text for e in c.events if e.kind == "spoke"][-1])
        assert "interrupted" not in [e.kind for e in c.events]
        assert c.ear.hush == Ear(config.load("conversation").hush_s).hush     # as in the calls that decide C11
        caches = weakref.ref(c.streamer.take.chain)
    assert caches() is None                                                    # gone with the call, not when Python next looks for circles
    assert frame.shape == (64, 64, 3) and said == ["Grass is green.", "Nice to meet you, Anna.", "Your name is Anna."]


def test_a_call_that_cannot_be_opened_says_why(tmp_path):
    from tmlib import config
    with pytest.raises(UserError, match="voice 'nobody' is none of data/voices.yaml, such as ada, "):
        conversation.open_call(tmp_path / "face.png", config.DATA / "demo", voice="nobody")
    with pytest.raises(UserError, match="nothing.png"):
        conversation.open_call(tmp_path / "nothing.png", config.DATA / "demo")
    with pytest.raises(UserError, match="no such folder; give a folder"):
        conversation.open_call(tmp_path / "face.png", config.DATA / "demo", partner=str(tmp_path / "nowhere"))
