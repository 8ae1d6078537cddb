"""The streaming runtime: sound in pieces of any size goes in, frames come out chunk by chunk, for ever."""

import itertools

import numpy as np
import torch

from . import flow
from .chain import Chain, noise_maker
from .config import UserError
from .vae import i2v_condition

RATE, FPS, STRIDE = 16_000, 16, 4                 # samples per second, frames per second, frames per latent frame
PLACEMENTS = ("serial",)


class Sound:
    """The last seconds of an endless waveform, gathered from pieces of any size; constant memory."""

    def __init__(self, pieces, history):
        self.pieces = iter([pieces] if hasattr(pieces, "shape") else pieces)
        self.history, self.start, self.count = history, 0, 0
        self.ended, self.total = False, None                 # total: all samples there were, once known
        self.wave = np.zeros(0, np.float32)                  # samples start .. start + len

    @property
    def end(self):
        return self.start + len(self.wave)

    def until(self, end):
        """Read until sample `end` is known; past the last piece comes silence."""
        parts, have = [self.wave], self.end
        while have < end and not self.ended:
            piece = next(self.pieces, None)
            if piece is None:
                self.ended, self.total = True, have
            else:
                parts.append(self.checked(piece))
                have += len(parts[-1])
        self.wave = np.concatenate([*parts, np.zeros(max(end - have, 0), np.float32)])

    def checked(self, piece):
        piece = np.asarray(piece)
        self.count += 1
        if piece.ndim != 1 or piece.dtype.kind != "f" or not np.isfinite(piece).all():
            raise UserError(f"audio piece {self.count}: expected finite float samples (n,), mono at {RATE} Hz, "
                            f"got {piece.dtype} {piece.shape}; read files with media.read_audio")
        return piece.astype(np.float32)

    def forget(self, before):
        """Drop whole seconds that lie `history` samples before sample `before`."""
        drop = (before - self.history - self.start) // RATE * RATE
        if drop > 0:
            self.wave, self.start = self.wave[drop:].copy(), self.start + drop


class Streamer:
    """A talking face for ever: `for frames in streamer.stream(image, audio_chunks)` yields uint8 (t, H, W, 3), chunk by chunk.

    dit, vae, audio_encoder: in one place, see `WanDiT`, `VideoVAE` (encode, decode) and `SpeechEncoder` (tokens,
    lookahead_samples). history_s: sound that is kept, by default what the encoder needs. Memory and time per chunk do not grow. placement: "serial" (one device, denoise then decode).
    steps and shift, or `timesteps` outright; chunk, cache, guidance, renoise, context_noise, first_ts: see `Chain`.
    """

    def __init__(self, dit, vae, audio_encoder, placement="serial", chunk=None, steps=2, cache="per_step", shift=5.0,
                 timesteps=None, seed=0, window=21, history_s=None, **chain):
        if placement not in PLACEMENTS:
            raise UserError(f"placement {placement!r} is unknown; choose one of {', '.join(PLACEMENTS)}")
        self.dit, self.vae, self.audio_encoder = dit, vae, audio_encoder
        self.chunk, self.seed, self.window = chunk or dit.chunk, seed, window
        self.history = getattr(audio_encoder, "history_samples", 8 * RATE) if history_s is None else int(history_s * RATE)
        self.chain = dict(chain, cache=cache, chunk=self.chunk, ts=timesteps or flow.timesteps(steps, shift))
        self.text = None

    def set_text(self, text):
        """Change the prompt embedding (1, tokens, text_dim) from the next chunk on: speaking, listening, another mood."""
        self.text = None if text is None else text.to(self.dit.device)

    @torch.no_grad()
    def stream(self, image, audio_chunks, *, text=None, image_tokens=None, audio_mask=None):
        """Yield frames of picture `image` speaking `audio_chunks`: 1 + 4 (chunk - 1) frames first, then 4 chunk each time.

        image: uint8 (H, W, 3). audio_chunks: an iterable of float waveforms (n,), mono 16 kHz, of any sizes, endless if you
        like; silence is added at its end until the last sample has its frame. text (1, tokens, D), image_tokens
        (1, tokens, D), audio_mask (h, w) in token units. Raises UserError for a bad picture or bad sound.
        """
        self.set_text(text)
        chain, noise = self.begin(image)
        sound, decoder = Sound(audio_chunks, self.history), None
        image_tokens, audio_mask = self.placed(image_tokens, audio_mask)
        for index in itertools.count():
            first = index * self.chunk
            audio = self.hear(sound, first)
            if audio is None:
                return
            x_0 = chain.next(noise(slice(first, first + self.chunk)), text=self.text, image=image_tokens, audio=audio,
                             audio_mask=audio_mask)
            video, decoder = self.vae.decode(x_0, decoder)
            yield to_frames(video)

    def begin(self, image):
        """The chain for a picture, and where its noise comes from."""
        cond = i2v_condition(self.vae, to_video(image).to(self.dit.device), self.window, self.dit.config.condition)
        shape = (1, 16, *cond.shape[-2:])
        return Chain(self.dit, cond, **self.chain), noise_maker(shape, None, torch.Generator().manual_seed(self.seed), cond.device)

    def hear(self, sound, first):
        """Audio tokens (1, chunk, tokens, D) of latent frames first .., or None when the sound ended before them."""
        samples = lambda latent: max(STRIDE * latent - STRIDE + 1, 0) * RATE // FPS       # where a latent frame begins
        end = samples(first + self.chunk)
        sound.until(end + self.audio_encoder.lookahead_samples)
        if sound.ended and sound.total <= samples(first):
            if sound.total == 0:
                raise UserError("there is no sound to speak: the audio is empty")
            return None
        tokens = self.audio_encoder.tokens(sound.wave, first, self.chunk, sound.start)   # (chunk, tokens, D)
        sound.forget(end)
        return tokens[None].to(self.dit.device)

    def placed(self, image_tokens, audio_mask):
        device = self.dit.device
        if audio_mask is not None:
            audio_mask = audio_mask.to(device).expand(1, self.chunk, *audio_mask.shape[-2:])
        return None if image_tokens is None else image_tokens.to(device), audio_mask


def to_video(image):
    """uint8 (H, W, 3) -> float (1, 3, 1, H, W) in [-1, 1]."""
    image = np.asarray(image)
    if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8:
        raise UserError(f"the picture must be uint8 (H, W, 3), got {image.dtype} {image.shape}; read it with media.read_image")
    image = torch.from_numpy(image.copy())
    return (image.float() / 127.5 - 1).permute(2, 0, 1)[None, :, None]


def to_frames(video):
    """float (1, 3, T, H, W) in [-1, 1] -> uint8 numpy (T, H, W, 3)."""
    return ((video[0].float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).permute(1, 2, 3, 0).cpu().numpy()
