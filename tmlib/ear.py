"""Whose turn it is: cuts turns out of a caller's sound, as it arrives, by silero's voice activity detector."""
from collections import deque

import numpy as np

from .config import RATE

WINDOW = 512                                     # samples that silero's detector judges at once: 32 ms
BEGINS, ENDS = 0.5, 0.35                         # its probability of speech from which somebody speaks, and below which nobody does


class Ear:
    """Cuts turns out of a caller's sound (silero's voice activity detector).

    hush_s: silence that ends a turn (`conversation.hush_s` of params.yaml, with which C11 is measured); onset_s: speech that begins one; lead_s: sound before it that is kept; longest_s: a turn is cut there.
    """

    def __init__(self, hush_s: float, onset_s: float = 0.13, lead_s: float = 0.3, longest_s: float = 20.0, detector=None):
        count = lambda seconds: max(1, round(seconds * RATE / WINDOW))
        self.hush, self.onset, self.longest = count(hush_s), count(onset_s), count(longest_s)
        self.detector = detector or detect()
        self.rest = np.zeros(0, np.float32)
        self.before, self.turn = deque(maxlen=count(lead_s) + self.onset), None                # windows
        self.voiced = self.quiet = 0             # windows in a row

    def hear(self, wave: np.ndarray) -> list[tuple[str, np.ndarray | None]]:
        """A piece of sound of any size, float32 (n,) at 16 kHz -> what happened in it: ("began", None) or ("heard", the turn's wave)."""
        self.rest = np.concatenate([self.rest, np.asarray(wave, np.float32)])
        whole = len(self.rest) // WINDOW * WINDOW
        windows, self.rest = self.rest[:whole].reshape(-1, WINDOW), self.rest[whole:].copy()
        return [event for window in windows if (event := self.judge(window)) is not None]

    def judge(self, window: np.ndarray):
        p = self.detector(window)
        if self.turn is None:
            self.before.append(window)
            self.voiced = self.voiced + 1 if p >= BEGINS else 0
            if self.voiced >= self.onset:
                self.turn, self.quiet = list(self.before), 0
                return "began", None
            return None
        self.turn.append(window)
        self.quiet = self.quiet + 1 if p < ENDS else 0
        if self.quiet >= self.hush or len(self.turn) >= self.longest:
            wave, self.turn, self.voiced = np.concatenate(self.turn), None, 0
            self.before.clear()
            return "heard", wave
        return None


def detect():
    """silero's detector as a function: a window (512,) at 16 kHz -> the probability that somebody speaks. It remembers the windows before."""
    import torch
    threads = torch.get_num_threads()
    from silero_vad import load_silero_vad
    model = load_silero_vad()
    torch.set_num_threads(threads)               # importing it sets one thread for everybody

    def probability(window: np.ndarray) -> float:
        with torch.no_grad():
            return model(torch.from_numpy(window), RATE).item()
    return probability
