"""The sound of a stream: gathered from pieces of any size, in constant memory; live, from another thread, at any pace."""

import threading
import time
from collections import deque

import numpy as np

from .config import FRAME, RATE, UserError


class Sound:
    """The last seconds of an endless waveform, gathered from pieces of any size; constant memory."""

    def __init__(self, pieces, history):
        self.history, self.start, self.count = history, 0, 0
        self.total = None                                    # all samples there were, once known
        self.wave = np.zeros(0, np.float32)                  # samples start .. start + len
        self.follow(pieces)

    def follow(self, pieces):
        """From here on the sound comes from `pieces`."""
        self.pieces, self.ended = iter([pieces] if hasattr(pieces, "shape") else pieces), False

    @property
    def end(self):
        return self.start + len(self.wave)

    def until(self, end):
        """Read until sample `end` is known; past the last piece comes silence."""
        parts, have = [self.wave], self.end
        try:
            while have < end and not self.ended:
                piece = self.next(have)
                if piece is None:
                    self.ended, self.total = True, have
                else:
                    parts.append(self.checked(piece))
                    have += len(parts[-1])
        except UserError:
            self.wave = np.concatenate(parts)                # what came before a failure was heard
            raise
        self.wave = np.concatenate([*parts, np.zeros(max(end - have, 0), np.float32)])

    def next(self, have):
        try:
            return next(self.pieces, None)
        except UserError:
            raise
        except Exception as error:                           # whatever a source of sound may raise
            raise UserError(f"the source of the sound failed after {have / RATE:.1f} s: {type(error).__name__}: {error}; "
                            "all frames delivered before are valid") from error

    def checked(self, piece):
        piece = np.asarray(piece)
        self.count += 1
        if piece.ndim != 1 or piece.dtype.kind != "f" or not np.isfinite(piece).all():
            raise UserError(f"audio piece {self.count}: expected finite float samples (n,), mono at {RATE} Hz, "
                            f"got {piece.dtype} {piece.shape}; read files with media.read_audio")
        return piece.astype(np.float32)

    def drop(self, sample):
        """Forget the samples from `sample` on, and return them (n,): what the source gives next stands there instead."""
        kept, dropped = np.split(self.wave, [max(sample - self.start, 0)])
        self.wave = kept.copy()
        return dropped

    def forget(self, before):
        """Drop whole seconds that lie `history` samples before sample `before`."""
        drop = (before - self.history - self.start) // RATE * RATE
        if drop > 0:
            self.wave, self.start = self.wave[drop:].copy(), self.start + drop


class LiveSound:
    """The sound of a live call: any thread may `push` pieces (n,), at any pace; give it to a Streamer as its sound.

    What is there is taken at once. Where nothing is there when its time comes, a frame of silence takes its place: the avatar
    listens, the stream never stalls, and what arrives late is spoken late. Time begins with the first sample asked for.

    patience_s: how long after its time a sample may come. full_s: most sound that may wait; beyond it the stream does not keep
    up, and `push` raises UserError. gone_s: after so long without a piece the source counts as gone, and the stream ends with
    a UserError; None: never. clock: seconds, for tests.
    """

    def __init__(self, patience_s=0.0, full_s=30.0, gone_s=None, clock=time.monotonic):
        self.patience, self.full, self.gone, self.clock = patience_s, full_s, gone_s, clock
        self.changed, self.pieces = threading.Condition(), deque()
        self.waiting, self.given, self.began, self.heard, self.end = 0, 0, None, None, None

    def push(self, wave):
        """Take in a piece of sound."""
        with self.changed:
            if self.end is not None:
                raise UserError("this live sound was closed; begin a new stream with a new one")
            if (self.waiting + len(wave)) / RATE > self.full:
                raise UserError(f"{self.waiting / RATE:.0f} s of sound wait to be spoken: the stream does not keep up, or its frames "
                                "are not taken; send less, or stop the stream")
            self.pieces.append(wave)
            self.waiting, self.heard = self.waiting + len(wave), self.clock()
            self.changed.notify()

    def close(self, error: str | None = None):
        """No more sound comes: the stream ends once all is spoken; with a UserError if the source says what went wrong."""
        with self.changed:
            self.end = error or ""
            self.changed.notify()

    def __iter__(self):
        return self

    def __next__(self):
        with self.changed:
            now = self.clock()
            if self.began is None:
                self.began, self.heard = now, now if self.heard is None else self.heard
            while not self.pieces and self.end is None:
                self.check_source(now)
                due = self.began + (self.given + FRAME) / RATE + self.patience
                if now >= due:
                    self.given += FRAME
                    return np.zeros(FRAME, np.float32)
                self.changed.wait(due - now)
                now = self.clock()
            if not self.pieces:
                if self.end:
                    raise UserError(f"the source of the sound failed: {self.end}; all frames delivered before are valid")
                raise StopIteration
            piece = self.pieces.popleft()
            self.waiting, self.given = self.waiting - len(piece), self.given + len(piece)
            return piece

    def check_source(self, now):
        if self.gone is not None and now - self.heard > self.gone:
            raise UserError(f"no sound has come for {now - self.heard:.1f} s: its source is gone; all frames delivered before are valid")
