"""Waveform -> features -> audio tokens per latent frame.

What is special
- One interface for both scales: an encoder maps 16 kHz speech to features at 50 Hz; `tokens` samples them at the video's
  clock and cuts one window per latent frame. The miniature's encoder is trained on phonemes.
- Exact streaming: features depend on a bounded stretch of sound, so tokens cut from a moving buffer equal those cut from
  the whole clip, and `lookahead_samples` says how much future sound a latent frame needs.
- Silence and *no* audio differ: silence is sound that is quiet; the null condition of guidance is all-zero tokens.

Window rule (video frames): latent 0 covers [0, 1), latent k covers [4k - 3, 4k + 1), widened by `context` frames each side.
"""
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .config import RATE
from .hub import load_own, save_own

HOP = 320                                        # samples per feature: 50 Hz, as Wav2Vec2
MEL_HOP, MEL_WINDOW = 160, 400                   # 10 ms and 25 ms
FLOOR = 1e-5                                     # mel power that counts as silence


@dataclass
class SpeechConfig:
    dim: int = 64                                # width of a feature
    hidden: int = 96
    layers: int = 4
    kernel: int = 5
    past: tuple[int, ...] = ()                   # dilations of further layers, which look back only: who speaks here, and how loud
    mels: int = 64
    classes: int = 41                            # phonemes, silence included
    fps: int = 16
    per_frame: int = 2                           # tokens per video frame
    context: int = 1                             # video frames of context on each side of a latent's window

    def __post_init__(self):
        self.past = tuple(self.past)                                          # a file has a list


class LogMel(nn.Module):
    """Log-mel spectrogram without centring: frame i sees samples [160 i - 120, 160 i + 280), zeros outside."""

    def __init__(self, mels: int):
        super().__init__()
        from torchaudio.functional import melscale_fbanks
        self.register_buffer("window", torch.hann_window(MEL_WINDOW), persistent=False)
        self.register_buffer("bank", melscale_fbanks(MEL_WINDOW // 2 + 1, 40.0, 7600.0, mels, RATE, norm="slaney"), persistent=False)

    def forward(self, wave: Tensor) -> Tensor:                                # (B, n) -> (B, n // 160, mels)
        side = (MEL_WINDOW - MEL_HOP) // 2
        frames = F.pad(wave, (side, side)).unfold(1, MEL_WINDOW, MEL_HOP)     # (B, n // 160, 400)
        power = torch.fft.rfft(frames * self.window).abs().square()
        return (torch.log(power @ self.bank + FLOOR) + 4.0) / 4.0


class SpeechEncoder(nn.Module):
    """Residual convolutions over log-mels, 100 Hz -> 50 Hz, with a phoneme head that trains them. What comes later costs delay, so far sight is to the past."""

    def __init__(self, cfg: SpeechConfig = SpeechConfig()):
        super().__init__()
        self.cfg = cfg
        dilations = [1] * cfg.layers + list(cfg.past)
        self.mel = LogMel(cfg.mels)
        self.inp = nn.Conv1d(cfg.mels, cfg.hidden, 4, stride=2, padding=1)
        self.convs = nn.ModuleList(nn.Conv1d(cfg.hidden, cfg.hidden, cfg.kernel, dilation=d) for d in dilations)
        self.norms = nn.ModuleList(nn.LayerNorm(cfg.hidden) for _ in dilations)
        side = (cfg.kernel // 2, cfg.kernel // 2)
        self.sides = [side] * cfg.layers + [((cfg.kernel - 1) * d, 0) for d in cfg.past]
        self.out = nn.Linear(cfg.hidden, cfg.dim)
        self.norm = nn.LayerNorm(cfg.dim)
        self.head = nn.Linear(cfg.dim, cfg.classes)

    def features(self, wave: Tensor) -> Tensor:
        """Waveform (B, n), n a multiple of 320 -> features (B, n / 320, dim)."""
        x = self.inp(self.mel(wave).mT)                                       # (B, hidden, L)
        for conv, norm, sides in zip(self.convs, self.norms, self.sides):
            x = x + conv(F.pad(F.gelu(norm(x.mT).mT), sides))
        return self.norm(self.out(F.gelu(x.mT)))                              # (B, L, dim)

    def forward(self, wave: Tensor) -> Tensor:
        """Phoneme logits (B, n / 320, classes)."""
        return self.head(self.features(wave))

    @property
    def reach(self) -> int:
        """Later features that one feature depends on."""
        return self.cfg.layers * (self.cfg.kernel // 2) + 2

    @property
    def memory(self) -> int:
        """Earlier features that one feature depends on."""
        return self.reach + (self.cfg.kernel - 1) * sum(self.cfg.past)

    @property
    def tokens_per_latent(self) -> int:
        return (4 + 2 * self.cfg.context) * self.cfg.per_frame

    @property
    def lookahead_samples(self) -> int:
        """Sound that must be known after the end of a latent frame's last video frame."""
        return int(self.cfg.context * RATE / self.cfg.fps) + (self.reach + 1) * HOP

    @property
    def history_samples(self) -> int:
        """Sound that must be kept before a latent frame's first video frame."""
        return int(self.cfg.context * RATE / self.cfg.fps) + (self.memory + 2) * HOP

    def times(self, first: int, n: int) -> Tensor:
        """When each token listens, in seconds: (n, tokens); before the clip begins, its first moment repeats."""
        c = self.cfg
        slot = torch.arange(self.tokens_per_latent, dtype=torch.float64) + 0.5
        frame = 4.0 * torch.arange(first, first + n, dtype=torch.float64)[:, None] - 3 - c.context + slot / c.per_frame
        return frame.clamp_min(0.5 / c.per_frame) / c.fps

    @torch.no_grad()
    def tokens(self, wave, first: int, n: int, start: int = 0) -> Tensor:
        """Tokens of latent frames first .. first + n - 1.

        wave: float32 (m,), whose sample 0 is sample `start` of the stream; what lies outside counts as silence.
        Returns (n, tokens_per_latent, dim).
        """
        device = self.head.weight.device
        place = self.times(first, n) * (RATE / HOP) - 0.5                     # in features, (n, tokens)
        lo = int(place.min().floor()) - self.memory                           # found before the device is asked for anything: it would be waited for
        hi = int(place.max().floor()) + 2 + self.reach
        feats = self.features(cut(wave, lo * HOP - start, hi * HOP - start).to(device)[None])[0]
        place = place.to(device)
        left = place.floor()
        a, b = feats[(left - lo).long()], feats[(left - lo + 1).long()]
        return torch.lerp(a, b, (place - left).float()[..., None])            # (n, tokens, dim)


def cut(wave, lo: int, hi: int) -> Tensor:
    """Samples [lo, hi) of a waveform, zeros where it has none."""
    wave = torch.as_tensor(np.asarray(wave), dtype=torch.float32) if not torch.is_tensor(wave) else wave
    inside = wave[max(lo, 0):max(hi, 0)]
    before = min(max(-lo, 0), hi - lo)
    return F.pad(inside, (before, hi - lo - before - len(inside)))


def other_voice(wave: Tensor, ids: Tensor, g: torch.Generator, reach: float = 0.15) -> tuple[Tensor, Tensor]:
    """The same speech from a longer or shorter vocal tract and another microphone.

    wave (B, n) and phonemes (B, n / 320) are stretched alike, by one random factor in 1 -+ reach a batch (speed perturbation,
    Ko et al. 2015); each wave gets a spectral tilt of its own.
    """
    factor = 1 + reach * (2 * float(torch.rand((), generator=g)) - 1)
    length = int(ids.shape[1] / factor)
    wave = F.interpolate(wave[:, None], size=length * HOP, mode="linear")[:, 0]
    tilt = torch.empty(len(wave), 1).uniform_(-0.5, 0.7, generator=g)
    return wave - tilt * F.pad(wave, (1, 0))[:, :-1], ids[:, (torch.arange(length) + 0.5).mul(ids.shape[1] / length).long()]


def degrade(wave: Tensor, g: torch.Generator) -> Tensor:
    """Training augmentation (B, n): random loudness; up to 30 dB below the speech noise of random colour or, oftener, one to three others talking."""
    B = wave.shape[0]
    u = lambda lo, hi: torch.empty(B, 1).uniform_(lo, hi, generator=g)
    rms = lambda x: x.square().mean(1, keepdim=True).sqrt()
    noise = torch.randn(wave.shape, generator=g)
    noise = noise - u(0.0, 0.95) * F.pad(noise, (1, 0))[:, :-1] * torch.where(u(-1, 1) > 0, 1.0, -1.0)
    crowd = sum(wave.roll(k, 0) * (u(0, 3) > k - 1) for k in (1, 2, 3))       # the batch's other voices
    noise = torch.where(u(0, 1) < 0.7, crowd, noise)
    return (wave + noise * rms(wave) / (rms(noise) + 1e-6) * 10 ** (-u(0, 30) / 20)) * 10 ** (u(-12, 6) / 20)


def overheard(waves: Tensor, speaks: Tensor, share: float, g: torch.Generator) -> Tensor:
    """Waves (n, samples) of whom some speak, bool (n,): this share of the others, by chance, hears one who does, if anybody does."""
    if not speaks.any():
        return waves
    others = waves[speaks][torch.randint(int(speaks.sum()), (len(waves),), generator=g)]
    return torch.where((torch.rand(len(waves), 1, generator=g) < share) & ~speaks[:, None], others, waves)


def save_encoder(encoder: SpeechEncoder, folder: Path) -> None:
    """Writes `speech.safetensors`, see `hub.save_own`."""
    save_own(Path(folder) / "speech.safetensors", encoder.state_dict(), encoder.cfg)


def load_encoder(folder: Path) -> SpeechEncoder:
    """Reads what `save_encoder` wrote, see `hub.load_own`."""
    return load_own(Path(folder) / "speech.safetensors", lambda **cfg: SpeechEncoder(SpeechConfig(**cfg)), "speech encoder")
