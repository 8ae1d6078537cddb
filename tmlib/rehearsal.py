"""A call with a caller of our own, in real time: asks, listens, waits, asks on, breaks in; and what such a call is worth.

Times are those of the clock while it ran: `hear` gets each sixteenth of a second of the caller's sound when it is over, `frame` is asked for
when it is due. What is missing to a call by telephone is the way there and back.
"""
import time
from dataclasses import dataclass, field

import numpy as np

from . import avatar, metrics, speech
from .config import FPS, FRAME, RATE, Progress, UserError
from .conversation import FADE, LINES
from .dialogue import split_words

LOUD = 0.01                                      # samples above this are heard
PATIENCE_S, BROKE_S, OVER_S = 4.0, 2.0, 0.5      # a caller waits no longer for an answer; an interruption has failed; it was none, if the answer has ended by itself so soon


@dataclass
class Turn:
    """What the caller says, and what becomes of it."""
    question: str
    answer: str                                  # the right one
    wave: np.ndarray                             # float32 (n,)
    interrupts: bool = False                     # it breaks into the answer before
    frame: int | None = None                     # of the call, in which it begins


class Caller:
    """Speaks one Turn after the other, each once the answer to the one before has ended. `speak(heard)`: a frame's sound (1000,), None at the end."""

    def __init__(self, turns: list[Turn], rng, pause_s=(0.5, 1.2), break_in_s=0.7, patience_s=PATIENCE_S, noise=1e-3):
        self.turns, self.rng, self.noise = turns, rng, noise
        self.pauses = (np.array([rng.uniform(*pause_s) for _ in turns]) * FPS).round().astype(int)
        self.break_in, self.patience = round(break_in_s * FPS), round(patience_s * FPS)
        self.k, self.now, self.left = 0, -1, np.zeros(0, np.float32)          # frame of the call; turn; what it has still to say
        self.waited = self.heard = self.hush = 0                              # frames since it spoke, with sound, and without since

    def speak(self, heard: bool) -> np.ndarray | None:
        if not len(self.left):
            self.waited, self.heard, self.hush = self.waited + 1, self.heard + heard, 0 if heard else self.hush + 1
            if self.due():
                self.now += 1
                if self.now == len(self.turns):
                    return None
                turn = self.turns[self.now]
                turn.frame, self.left, self.waited, self.heard = self.k, turn.wave, 0, 0
        out, self.left = self.left[:FRAME], self.left[FRAME:]
        self.k += 1
        return (np.pad(out, (0, FRAME - len(out))) + self.noise * self.rng.standard_normal(FRAME)).astype(np.float32)

    def due(self) -> bool:
        if self.now < 0 or self.waited >= self.patience and not self.heard:
            return self.waited >= FPS // 2
        breaks_in = any(turn.interrupts for turn in self.turns[self.now + 1:self.now + 2])
        return breaks_in and self.heard >= self.break_in or self.heard > 0 and self.hush >= self.pauses[self.now]      # an answer may be too short to break into


@dataclass
class Call:
    """What was shown and heard: frame k of the call was due at k / 16 s."""
    turns: list[Turn]
    lines: list                                  # conversation.Lines
    events: list
    late: int = 0                                # frames that were not there in time
    frames: list = field(default_factory=list)   # uint8 (H, W, 3)
    waves: list = field(default_factory=list)    # of the face, (1000,)
    spoken: list = field(default_factory=list)   # of the caller, (1000,)
    number: list = field(default_factory=list)   # of the frame in the face's stream; held frames repeat it
    at: list = field(default_factory=list)       # seconds on the clock


def hold(talk, caller: Caller) -> Call:
    """One call, from beginning to end, in real time. UserError for more turns than a conversation remembers."""
    if 2 * len(caller.turns) > LINES:
        raise UserError(f"a rehearsal of {len(caller.turns)} turns: at most {LINES // 2}, of which a conversation remembers all that was said")
    call, heard, progress = Call(caller.turns, talk.lines, talk.events), False, Progress(len(caller.turns), "turns of a live call")
    with talk:
        began = time.monotonic()
        while (spoken := caller.speak(heard)) is not None:
            frame, wave = talk.frame()
            call.at.append(time.monotonic() - began)
            for name, value in (("frames", frame), ("waves", wave), ("spoken", spoken), ("number", talk.next - 1)):
                getattr(call, name).append(value)
            heard = bool(np.abs(wave).max() > LOUD)
            progress.step(caller.now - progress.done if caller.now > progress.done else 0)
            time.sleep(max(0.0, began + len(call.at) / FPS - time.monotonic()))
            talk.hear(spoken)
        call.late, call.lines = talk.late, talk.lines
    return call


# ---------------------------------------------------------------------------------------------------------------- its worth
def seconds_of(call: Call, sample: int) -> float | None:
    """When the stream's sample was played, in seconds of the call; None: never."""
    k = int(np.searchsorted(call.number, sample // FRAME))
    return call.at[k] + sample % FRAME / RATE if k < len(call.number) and call.number[k] == sample // FRAME else None


def audible(wave: np.ndarray) -> tuple[int, int]:
    """The first sample that is heard, and the one after the last."""
    loud = np.flatnonzero(np.abs(wave) > LOUD)
    return (int(loud[0]), int(loud[-1]) + 1) if len(loud) else (0, len(wave))


def talks(call: Call, second: float) -> bool:
    """Whether one of the face's answers sounds at that second of the call."""
    spans = [[seconds_of(call, x.start + n) for n in audible(x.wave)] for x in call.lines if x.text]
    return any(begin is not None and begin <= second and (end is None or second < end) for begin, end in spans)


def exchanges(call: Call) -> list[dict]:
    """Each turn with its answer: asked and answered (s), reply_ms and its parts, right, lines; interrupted_ms where it broke in. No answer counts
    as one after PATIENCE_S, a voice that talks on as silent after BROKE_S."""
    out, starts = [], [t.frame / FPS for t in call.turns] + [float("inf")]
    for turn, begin, following in zip(call.turns, starts, starts[1:]):
        first, last = audible(turn.wave)
        end = begin + last / RATE
        lines = [x for x in call.lines if x.text and (t := seconds_of(call, x.start)) is not None and end <= t < following + 0.25]
        said = [w for x in lines for w in split_words(x.text)]
        wanted = split_words(turn.answer)
        cut = any(x.stop is not None for x in lines)
        row = {"turn": turn, "asked": end, "lines": lines, "said": " ".join(x.text for x in lines), "cut": cut,
               "right": bool(said) and said == (wanted[:len(said)] if cut else wanted), "reply_ms": 1000 * PATIENCE_S}         # if none came, or too late
        if lines:
            row["answered"] = seconds_of(call, lines[0].start + audible(lines[0].wave)[0])
            row["reply_ms"] = 1000 * (row["answered"] - end)
            heard, known = (next((e.at for e in call.events if e.kind == kind and end <= e.at <= row["answered"]), None) for kind in ("heard", "answer"))
            if heard and known:                                               # where the time goes: to hear that the turn has ended, to think, to show
                row |= {"hear_ms": 1000 * (heard - end), "think_ms": 1000 * (known - heard), "show_ms": 1000 * (row["answered"] - known)}
        if turn.interrupts:
            spoke = begin + first / RATE
            ends = [seconds_of(call, x.stop + FADE) for x in call.lines if x.stop is not None]
            silent = min((t - spoke for t in ends if t is not None and spoke <= t < spoke + BROKE_S), default=BROKE_S)
            if silent < BROKE_S or talks(call, spoke + OVER_S):
                row["interrupted_ms"] = 1000 * silent                         # else the answer was over before the caller could be heard: nothing was interrupted
        out.append(row)
    return out


def truth(call: Call) -> np.ndarray:
    """The mouth's opening that the face's sound asks for, in every frame of its stream (n,)."""
    phones, end = [], 0.0
    for x in call.lines:
        begin, phones = x.start / RATE, [*phones, speech.Phone("sil", end, x.start / RATE)]
        end = x.end / RATE
        phones += [speech.Phone(p.symbol, begin + p.start, min(begin + p.end, end)) for p in x.phones if begin + p.start < end]
    phones.append(speech.Phone("sil", end, end + 1))
    return avatar.mouth_track(phones, call.number[-1] + 1, FPS)[:, 0]


def lips(call: Call, reader) -> tuple[np.ndarray, np.ndarray]:
    """Opening read off what was shown, and its truth, both (n,) in frames of the stream; held frames count once."""
    from .data import to_float
    shown = np.unique(call.number, return_index=True)[1]
    pictures = np.stack([call.frames[k] for k in shown])
    read = np.concatenate([reader.read(to_float(part[None]))[0, :, 0].numpy() for part in np.array_split(pictures, -(-len(pictures) // 256))])
    return read, truth(call)[np.array(call.number)[shown]]


def late(call: Call) -> int:
    """Frames that were not there in time, or were shown a frame too late because the player itself was held up."""
    return max(call.late, sum(at > (k + 1) / FPS for k, at in enumerate(call.at)))


def scores(calls: list[Call], tracks: list[tuple[np.ndarray, np.ndarray]]) -> dict:
    """Numbers of some calls together; tracks: of each its `lips`."""
    each, r, quiet = [exchanges(call) for call in calls], [], []
    for call, (read, true) in zip(calls, tracks):
        spans = [(x.start // FRAME, -(-x.end // FRAME)) for x in call.lines if x.text]
        r += [metrics.pearson(read[a:b], true[a:b]) for a, b in spans if b - a >= 8 and b <= len(read)]
        listening = np.ones(len(read), bool)
        for a, b in spans:
            listening[max(a - 6, 0):b + 6] = False
        quiet.append(read[listening])
    rows, quiet, frames = sum(each, []), np.concatenate(quiet), sum(len(call.frames) for call in calls)
    numbers = {"turns": min(sum(bool(x["lines"]) for x in some) for some in each), "n": len(rows), "answers": len(r), "interruptions": sum("interrupted_ms" in x for x in rows), "seconds": frames / FPS,
               "late": sum(late(call) for call in calls) / frames, "listening_opening_mean": float(quiet.mean()) if len(quiet) else None}
    callers = [k for k, some in enumerate(each) for _ in some]                                        # a voice and a memory each
    numbers |= metrics.interval("right_live", np.array([x["right"] for x in rows]), callers) | (metrics.interval("lip_r", np.array(r)) if r else {})
    for name in ("reply_ms", "hear_ms", "think_ms", "show_ms"):
        if some := [x[name] for x in rows if name in x]:
            numbers |= {f"{name}_p50": float(np.median(some)), **percentile(f"{name}_p95", np.array(some), 95)}
    if numbers["interruptions"]:
        numbers["interrupted_ms_max"] = max(x.get("interrupted_ms", 0.0) for x in rows)
    return numbers


def percentile(name: str, values: np.ndarray, q: float, n: int = 2000, seed: int = 0) -> dict[str, float]:
    """A percentile with its 95 % bootstrap interval: name, name_lo, name_hi."""
    drawn = np.random.default_rng(seed).choice(values, (n, len(values)))
    lo, hi = np.percentile(np.percentile(drawn, q, axis=1), [2.5, 97.5]).tolist()
    return metrics.named(name, (float(np.percentile(values, q)), lo, hi))
