"""A live conversation: the caller's sound goes in, a talking face comes out, frame by frame at the pace of a clock.

    caller -> Ear: whose turn it is -> partner: an audio language model and its voice -> Streamer -> frames and sound

    with Conversation(streamer, partner, picture) as talk:
        talk.hear(wave)                          # any thread: sound as it arrives
        frame, wave = talk.frame()               # 16 times a second: what to show and play now

What is special
- A stream must make a chunk (0.75 s) before it is shown, and to wait for the next chunk is to wait too long for an answer. So chunks are made
  of silence while nothing is to be said, and *taken back* when something is: what was not shown yet is made again with the new sound
  (`Streamer.rewind`). An answer waits for two frames, in which its chunk is made, not for up to two chunks; an interruption likewise.
- With a streamer that gives chunks in parts, a latent frame can be shown as soon as it is decoded: so few frames must wait for what is made again.
- What was shown is never changed, frames and sound stay together, and no answer loses a sample unless it is interrupted: a face that comes late holds still.
- A partner has `reply(wave)`, which yields speech.Utterance, `hush()`, `cut(heard)` and `forget()`: `dialogue.Partner` or `audio_llm.AudioLLM`.
"""
import math
import threading
import time
from collections import deque
from dataclasses import dataclass
from queue import SimpleQueue

import numpy as np

from .config import FPS, FRAME, STRIDE, UserError
from .ear import Ear

LINES = 100                                      # said before, that are remembered: a call may last for hours
FADE = 480                                       # samples in which an interrupted voice fades: 30 ms


@dataclass(frozen=True)
class Event:
    """What happened. began, heard: of the caller's turn; answer: known what to say; spoke: its first frame is shown; interrupted: by the caller;
    nothing: the partner had no answer."""
    kind: str
    at: float                                    # seconds since the conversation began
    text: str = ""


@dataclass
class Line:
    """Something that the stream is given to say."""
    wave: np.ndarray                             # float32 (n,)
    answer: int                                  # to which of the caller's turns
    text: str = ""
    phones: tuple = ()                           # as in speech.Utterance
    start: int | None = None                     # the stream's sample at which it begins, once it is given
    stop: int | None = None                      # that at which it was interrupted
    shown: bool = False                          # its first frame was

    @property
    def end(self) -> int:
        return self.start + len(self.wave) if self.stop is None else self.stop


class Conversation:
    """One caller and one face. streamer: made with undo=1 and, to be quick, in_parts; picture: uint8 (H, W, 3); ear: an Ear.

    text, listening, image_tokens, audio_mask: see `Streamer.stream`. takes_back: else what is made is shown, to measure what that costs.
    clock: seconds, for tests.
    """

    def __init__(self, streamer, partner, picture, *, ear, takes_back=True, clock=time.monotonic, **given):
        self.streamer, self.partner, self.picture, self.given, self.takes_back = streamer, partner, picture, given, takes_back
        self.ear, self.clock = ear, clock
        self.cost, self.begins = {True: 0.0, False: 0.0}, True       # seconds, rather too many, for a part that begins a chunk and for another; which the next one is
        self.size, self.events, self.failed, self.closed = picture.shape[0], [], None, False
        self.lock, self.changed, self.threads = threading.RLock(), threading.Event(), []
        self.ready, self.next, self.late = deque(), 0, 0             # (frame, wave) to show; their first one's number; frames that came late
        self.chunks = None                                           # where they come from
        self.to_say, self.lines = deque(), []                        # Lines that the stream was not given yet, and those it was
        self.sample = self.spoken = 0                                # of the stream's sound: where it ends, and where its last line does
        self.more = self.interrupted = False                         # why what is to come must be made again
        self.turns, self.turn = SimpleQueue(), 0                     # heard, with their number; that of the last one begun
        self.answered, self.thinking, self.cut = 0, False, None      # the turn that the partner was last given; how much of its answer was heard
        self.began = clock()

    # ---- what goes in and comes out

    def hear(self, wave: np.ndarray) -> None:
        """A piece of the caller's sound, float32 (n,) at 16 kHz, of any size, when it arrives; from one thread at a time."""
        for kind, turn in self.ear.hear(wave):
            with self.lock:
                self.note(kind)
                if kind == "began":
                    self.interrupt()
                else:
                    self.turns.put((self.turn, turn))

    def frame(self) -> tuple[np.ndarray, np.ndarray]:
        """What is to be shown and played now: uint8 (H, W, 3), float32 (1000,) at 16 kHz. To be called 16 times a second; never waits."""
        with self.lock:
            if self.failed is not None:
                raise self.failed
            wave = np.zeros(FRAME, np.float32)
            if self.ready:
                self.picture, wave = self.ready.popleft()
                self.next += 1
                for line in self.lines:
                    if not line.shown and line.start < self.next * FRAME:
                        line.shown = True
                        self.note("spoke", line.text)
            else:
                self.late += 1
            if len(self.ready) < self.ahead:
                self.changed.set()
        return self.picture, wave

    def start(self) -> None:
        """Make the first chunk, then let the face live: one thread makes chunks, one lets the partner think."""
        while self.make():
            pass
        self.began = self.clock()
        self.threads = [threading.Thread(target=self.guarded, args=(work,), daemon=True) for work in (self.live, self.think)]
        for thread in self.threads:
            thread.start()

    def close(self) -> None:
        """End the threads; what is in the making is finished first. A second time it does nothing."""
        with self.lock:
            self.closed, self.turn = True, self.turn + 1
        self.changed.set()
        self.turns.put(None)
        self.partner.hush()
        try:
            for thread in self.threads:
                thread.join(10)
            if self.chunks is not None and not any(thread.is_alive() for thread in self.threads):
                self.chunks.close()
        finally:
            self.threads = []
            self.streamer.close()
            self.streamer.take = None            # it holds this call's sound, and so this call: caches would stay until Python looks for circles

    def __enter__(self) -> "Conversation":
        self.start()
        return self

    def __exit__(self, *_) -> None:
        self.close()

    # ---- the face

    def until(self, frame: int) -> float:
        """Seconds until this frame can be made again, with all that stands before it in its chunk."""
        place = (frame + STRIDE - 1) % (STRIDE * self.streamer.chunk)         # the stream's first latent frame has one frame, not four
        return self.cost[True] + self.cost[False] * (place // STRIDE if self.streamer.in_parts else 0)

    @property
    def keep(self) -> int:
        """Frames that stay as they are while those behind them are made again: they are shown meanwhile. Enough too for the part after the one that comes first."""
        most = STRIDE * self.streamer.chunk
        size = STRIDE if self.streamer.in_parts else most

        def enough(k: int) -> bool:
            again, left = self.until(self.next + k), size - (self.next + k + STRIDE - 1) % size      # frames of that first part
            then = self.cost[(self.next + k + left + STRIDE - 1) % most == 0]
            return k >= 1.5 * FPS * again and k + left >= 1.5 * FPS * (again + then)
        return next((k for k in range(2, most) if enough(k)), most)

    @property
    def ahead(self) -> int:
        """So few frames, and the next chunk is made."""
        return min(max(2, math.ceil(1.5 * FPS * self.cost[True])), STRIDE * self.streamer.chunk) + 2

    def live(self) -> None:
        while not self.closed:
            self.changed.clear()
            if not self.make():
                self.changed.wait(0.1)

    def make(self) -> bool:
        """Make a chunk, or the next part of one, anew or again, if one is wanted; returns whether."""
        pressing = self.takes_back and (self.more or self.interrupted) and (self.begins or len(self.ready) >= self.keep)       # or what is there would end before it is made again
        again = pressing and self.take_back()
        with self.lock:
            if self.begins and len(self.ready) >= self.ahead and not again:
                return False
        self.chunks = self.chunks or self.streamer.chunks(self.picture, self.sound(), **self.given)
        began = self.clock()
        chunk = next(self.chunks, None)
        self.cost[self.begins] = max(self.clock() - began, 0.8 * self.cost[self.begins])
        if chunk is None:                                                     # the call was closed meanwhile
            return False
        self.begins = chunk.last
        with self.lock:
            known = self.next + len(self.ready) - chunk.frame                 # frames that stayed as they were
            self.ready += list(zip(chunk.frames, chunk.wave.reshape(-1, FRAME)))[known:]
        return True

    def take_back(self) -> bool:
        """Forget what is to come, from where it changes on: from the first frame that can still be made again or, if there is only
        more to say, from the end of what is being said. Returns whether there was anything to forget."""
        with self.lock:
            interrupted, self.more, self.interrupted = self.interrupted, False, False
            free = (self.next + min(self.keep, len(self.ready))) * FRAME
            at = max(free, 0 if interrupted else self.spoken, self.streamer.settled)
            if at >= self.sample:
                return False                                                  # all that is made is wanted
            while self.next + len(self.ready) > at // FRAME:
                self.ready.pop()
        self.chunks.close()
        forgotten = self.streamer.rewind(at)
        with self.lock:
            back, self.lines = [x for x in self.lines if x.start >= at], [x for x in self.lines if x.start < at]
            self.sample, self.spoken = at, min(self.spoken, at)
            self.to_say.extendleft(reversed([x for x in back if x.answer == self.turn]))        # given too early to an overlapping stage
            if interrupted:
                self.fade(forgotten)
        self.chunks, self.begins = self.streamer.resume(), True
        return True

    def fade(self, forgotten: np.ndarray) -> None:
        """An interrupted voice fades: it does not click."""
        for line in self.lines:
            if line.end > self.sample:
                line.stop = self.sample
                rest = forgotten[:FADE]
                self.to_say.appendleft(Line(rest * np.linspace(1, 0, len(rest), dtype=np.float32), line.answer))
                self.note("interrupted", line.text)

    def sound(self):
        """The stream's sound: what there is to say, else silence, a frame at a time."""
        while not self.closed:
            with self.lock:
                line = self.to_say.popleft() if self.to_say else None
                wave = np.zeros(FRAME, np.float32) if line is None else line.wave
                if line is not None:
                    line.start, self.spoken = self.sample, self.sample + len(wave)
                    self.lines = [*self.lines[1 - LINES:], line]
                self.sample += len(wave)
            yield wave

    # ---- the partner

    def think(self) -> None:
        before = []                              # turns that the caller went on from before they could be answered
        while (heard := self.turns.get()) is not None:
            number, wave = heard
            with self.lock:
                if number != self.turn:
                    before.append(wave)
                    continue
                self.answered, self.thinking, cut, self.cut = number, True, self.cut, None
            if cut is not None:
                self.partner.cut(cut)
            known, wave, before = len(self.events), np.concatenate([*before, wave]), []
            for said in self.partner.reply(wave):
                with self.lock:
                    if number != self.turn:
                        break
                    self.note("answer", said.text)
                    self.to_say.append(Line(said.wave, number, said.text, said.phones))
                    self.more = True
                self.changed.set()
            with self.lock:
                self.thinking = False
                if number == self.turn and not any(e.kind == "answer" for e in self.events[known:]):
                    self.note("nothing")

    def interrupt(self) -> None:
        """The caller speaks: what was being said or thought ends, and the partner will be told how much of it was heard."""
        speaking = self.spoken > self.next * FRAME
        if speaking or self.thinking or self.to_say:
            self.cut = self.heard_of(self.answered)
        if self.thinking:
            self.partner.hush()                  # a slow model need not finish
        self.turn += 1
        self.to_say.clear()
        self.interrupted |= speaking
        self.changed.set()

    def heard_of(self, answer: int) -> str:
        """The words of an answer that are shown by now, or until it was interrupted, each line's by their share of its time."""
        out, now = [], self.next * FRAME
        for line in self.lines:
            if line.answer == answer:
                words = line.text.split()
                out += words[:round(len(words) * max(min(now, line.end) - line.start, 0) / len(line.wave))]
        return " ".join(out)

    def note(self, kind: str, text: str = "") -> None:
        if kind != "spoke" or text:              # a fading voice is no news
            self.events.append(Event(kind, self.clock() - self.began, text))

    def guarded(self, work) -> None:
        try:
            work()
        except UserError as error:
            self.failed = error
        except Exception as error:               # of any kind: a thread has nobody else to tell
            self.failed = UserError(f"the conversation broke off: {type(error).__name__}: {error}")


def open_call(face, folder, seed: int = 0, prompt: str = "", partner: str | None = None, voice: str | None = None, speed: str | None = None, placement: str = "serial"):
    """Load everything once -> what makes the Conversation of one call with this face. UserError names what is missing.

    partner: folder or hub id of a public audio language model; None: that of the models' folder. A public one goes to a second GPU where there is one. voice: a name of
    data/voices.yaml. speed: see `talk.load_models`; placement: of the decoder, see `placement`.
    """
    import torch

    from . import audio_llm, config, dialogue, media, speech, stream, talk
    hush_s = config.load("conversation").hush_s
    voices = {v.name: v for some in speech.load_voices().values() for v in some}
    speaker = voices.get(voice) or speech.load_voices()["test"][0]
    if voice not in (None, *voices):
        raise UserError(f"voice {voice!r} is none of data/voices.yaml, such as {', '.join(name for name in voices if not name.startswith('drawn'))}")
    m = talk.load_models(folder, "cuda" if torch.cuda.is_available() else "cpu", speed)
    beside = str(stream.another(m.dit.device))
    mind = audio_llm.load(partner, speaker, beside) if partner else dialogue.load_partner(folder, m.encoder, speaker, beside)
    if isinstance(mind, dialogue.Partner):
        print("who answers is a miniature, which learned from synthetic voices and may not understand yours. Ask it, for example: What colour is the sky? "
              "Where does a whale live? (data/dialogue.yaml has all it knows; --partner: a public model)", flush=True)
    picture = media.read_image(face, m.how["size"])
    shown = talk.shown(m, picture, prompt)
    streamer = lambda: talk.make_streamer(m, seed=seed, placement=placement, undo=1, in_parts=True)
    if m.dit.device.type == "cuda":              # the first call should not wait for kernels to load, or, with a speed, for minutes of compilation
        print("warming up", flush=True)
        with streamer() as first:
            talk.warm(first, picture, **shown)

    def call() -> Conversation:
        mind.forget()
        return Conversation(streamer(), mind, picture, ear=Ear(hush_s), **shown)
    return call
