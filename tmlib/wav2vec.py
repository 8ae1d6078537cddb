"""Wav2Vec2 speech features at full size, behind the interface of the miniature's `audio.SpeechEncoder`.

What is special
- Wav2Vec2 attends to the whole clip, the future included, so its features cannot be cut from a stream. Here every `group` of
  latent frames is encoded from a window of its own: `past_s` seconds before it, `ahead_s` after it. Tokens are a function of
  that window alone: a whole clip and a stream in pieces give the same, and memory and time never grow. Only a clip that ends
  inside the last windows lacks their look-ahead; give it `lookahead_samples` more of its recording, or of zeros.
- Where the window holds the whole clip, tokens are those of transformers' model on the whole clip. Otherwise they differ, for
  each model by another amount: `context_error` measures it, and says what more past or look-ahead would buy.
- Loudness as Wav2Vec2's feature extractor has it, zero mean and unit variance, but over the window: a clip's statistics are not
  known until it ends, and running ones would make tokens depend on when a stream began.
- Hidden states that are used are a parameter: one (FantasyTalking: the last), or several, joined or averaged (MultiTalk: 1-12).

Windows of latent frames, clock and sampling are those of `SpeechEncoder.times`. Feature i of a window sees samples
[320 i, 320 i + 400) of it and stands for the middle of that stretch.
"""
from dataclasses import dataclass, replace
from math import ceil, prod
from pathlib import Path

import torch
from torch import Tensor, nn

from .audio import SpeechEncoder, cut, load_encoder
from .config import RATE, UserError
from .hub import find_part, linked, load_part, read_json

FLOOR = 1e-7                                     # under the variance, as in transformers' feature extractor


@dataclass
class Wav2VecConfig:
    layers: tuple[int, ...] = (-1,)              # hidden states: 0 enters the first layer, -1 is the model's output
    join: str = "concat"                         # of several hidden states: "concat" or "mean"
    fps: int = 16
    per_frame: int = 2                           # tokens per video frame
    context: int = 1                             # video frames of context on each side of a latent's window
    group: int = 3                               # latent frames encoded together: those of a chunk
    past_s: float = 6.0                          # sound heard before a group's window
    ahead_s: float = 0.2                         # and after it: this much latency
    normalise: bool = True                       # zero mean and unit variance, as the model was trained
    quiet: float = 0.0                           # deviation below which a window is not made louder (0: as transformers)

    def __post_init__(self):
        self.layers = tuple(self.layers)
        if self.join not in ("concat", "mean") or not self.layers:
            raise UserError(f'wav2vec: join {self.join!r} of layers {self.layers}: choose "concat" or "mean" of some')
        if min(self.past_s, self.ahead_s, self.context) < 0 or min(self.group, self.per_frame, self.fps) < 1:
            raise UserError(f"wav2vec: past_s {self.past_s}, ahead_s {self.ahead_s} and context {self.context} must be at least 0, "
                            f"group {self.group}, per_frame {self.per_frame} and fps {self.fps} must be at least 1")


class Wav2VecEncoder(nn.Module):
    """Wraps a transformers.Wav2Vec2Model."""

    def __init__(self, net, cfg: Wav2VecConfig = Wav2VecConfig()):
        super().__init__()
        states = net.config.num_hidden_layers + 1
        if wrong := [i for i in cfg.layers if not -states <= i < states]:
            raise UserError(f"wav2vec: hidden state {wrong[0]} does not exist: this model has {states}, 0 to {states - 1}")
        self.net, self.cfg = net, cfg
        kernels, strides = net.config.conv_kernel, net.config.conv_stride
        self.hop = prod(strides)                                              # samples from feature to feature: 320
        self.sees = 1 + sum((k - 1) * prod(strides[:i]) for i, k in enumerate(kernels))      # samples of a feature: 400

    times = SpeechEncoder.times                                               # one clock for both encoders
    tokens_per_latent = SpeechEncoder.tokens_per_latent

    @property
    def dim(self) -> int:
        """Width of a token."""
        return self.net.config.hidden_size * (len(self.cfg.layers) if self.cfg.join == "concat" else 1)

    @property
    def lookahead_samples(self) -> int:
        """Sound that must be known after a group's last video frame; whoever streams chunks makes them whole groups."""
        c = self.cfg
        last = (c.context - 0.5 / c.per_frame) / c.fps * RATE                 # the last token, after that frame's end
        return max(0, ceil(last + self.sees / 2 + self.hop) + int(c.ahead_s * RATE))

    @property
    def history_samples(self) -> int:
        """Sound that must be kept before a group's first video frame."""
        c = self.cfg
        return ceil((c.context / c.fps + c.past_s) * RATE + self.sees / 2 + 2 * self.hop)

    def features(self, wave: Tensor) -> Tensor:
        """Samples (m,) -> features (L, dim) float32, L = (m - 400) // 320 + 1: transformers' hidden states and nothing else."""
        if self.cfg.normalise:
            wave = wave - wave.mean()
            wave = wave / (wave.var(correction=0) + FLOOR).sqrt().clamp_min(self.cfg.quiet)
        out = self.net(wave[None].to(self.net.dtype), output_hidden_states=True)
        states = [*out.hidden_states[:-1], out.last_hidden_state]             # large models' last norm: not in every version's [-1]
        picked = torch.stack([states[i][0] for i in self.cfg.layers], 1).float()              # (L, layers, hidden)
        return picked.flatten(1) if self.cfg.join == "concat" else picked.mean(1)

    def window(self, seconds: Tensor, end: int) -> tuple[int, int]:
        """Samples [lo, hi) that tokens at `seconds` are encoded from, in a stream known until sample `end`.

        Before the stream there is nothing, not silence. Behind its end a token still hears silence, but look-ahead stops there.
        """
        feature = lambda t: int((t * RATE - self.sees / 2) // self.hop)       # the last one centred at or before t
        lo = max(0, feature(seconds.min().item()) - ceil(self.cfg.past_s * RATE / self.hop)) * self.hop
        need = (max(feature(seconds.max().item()), -1) + 1) * self.hop + self.sees
        return lo, max(need, min(need + int(self.cfg.ahead_s * RATE), end))

    @torch.no_grad()
    def tokens(self, wave, first: int, n: int, start: int = 0) -> Tensor:
        """Tokens of latent frames first .. first + n - 1, whichever way the stream is asked for them.

        wave: float32 (m,), whose sample 0 is sample `start` of the stream. Returns (n, tokens_per_latent, dim). Raises UserError
        when the past that belongs to them has been forgotten.
        """
        group, parts = self.cfg.group, []
        for k in range(first // group, -(-(first + n) // group)):
            seconds = self.times(k * group, group)                            # (group, tokens)
            lo, hi = self.window(seconds, start + len(wave))
            if lo < start:
                raise UserError(f"wav2vec: sound from {lo / RATE:.2f} s on is needed, the buffer begins at {start / RATE:.2f} s; "
                                f"keep {self.history_samples / RATE:.2f} s or lower past_s")
            feats = self.features(cut(wave, lo - start, hi - start).to(self.net.device))
            place = ((seconds * RATE - lo - self.sees / 2) / self.hop).clamp(0, len(feats) - 1).to(feats.device)
            left = place.long()
            right = (left + 1).clamp_max(len(feats) - 1)
            parts.append(torch.lerp(feats[left], feats[right], (place - left).float()[..., None]))
        skip = first % group
        return torch.cat(parts)[skip:skip + n]                                # (n, tokens, dim)


def context_error(encoder: Wav2VecEncoder, wave, n: int) -> float:
    """How far tokens of n latent frames from bounded windows are from those of the whole wave, RMS over RMS (0: the same)."""
    whole = Wav2VecEncoder(encoder.net, replace(encoder.cfg, past_s=len(wave) / RATE, ahead_s=len(wave) / RATE))
    bounded, whole = encoder.tokens(wave, 0, n), whole.tokens(wave, 0, n)
    return ((bounded - whole).square().mean() / whole.square().mean()).sqrt().item()


def load_wav2vec(source, cfg: Wav2VecConfig = Wav2VecConfig(), dtype=torch.float32, device="cpu") -> Wav2VecEncoder:
    """A transformers folder or hub id of any Wav2Vec2 model (heads are left out); UserError names the file that does not fit.

    What its preprocessor_config.json says of loudness overrides `cfg.normalise`.
    """
    from transformers import Wav2Vec2Model
    folder = find_part(source, "audio_encoder")
    config = read_json(folder / "config.json")
    if config.get("model_type") != "wav2vec2":
        raise UserError(f"{folder / 'config.json'}: is of {config.get('model_type')!r}, not of a wav2vec2 model; give one")
    if (path := folder / "preprocessor_config.json").is_file():
        extractor = read_json(path)
        if extractor.get("sampling_rate", RATE) != RATE:
            raise UserError(f"{path}: {extractor['sampling_rate']} samples per second; give a model of {RATE}")
        cfg = replace(cfg, normalise=extractor.get("do_normalize", True))
    net = load_part(Wav2Vec2Model, folder, dtype, device, optional=("masked_spec_embed",))    # that one trains only
    return Wav2VecEncoder(net, cfg).eval()


def load_speech(folder, chunk: int | None = None) -> SpeechEncoder | Wav2VecEncoder:
    """The speech encoder of a folder of models: the miniature's own, or the pretrained one that its speech.safetensors links to.

    chunk: of a stream, in latent frames, where it is another than the one that the link was written for.
    """
    path = Path(folder) / "speech.safetensors"
    if not (how := linked(path)):
        return load_encoder(folder)
    how |= {"group": chunk} if chunk else {}
    try:
        cfg = Wav2VecConfig(**{name: value for name, value in how.items() if name != "source"})
    except TypeError as error:
        raise UserError(f"{path}: not settings of a Wav2Vec2 encoder ({error}); correct speech.wav2vec in params.yaml") from error
    return load_wav2vec(how["source"], cfg, device="cuda" if torch.cuda.is_available() else "cpu")
