"""The streaming runtime: sound in pieces of any size goes in, frames come out chunk by chunk, for ever.

    sound = LiveSound()                                      # another thread calls sound.push(wave), and at last sound.close()
    with Streamer(dit, vae, encoder, "two_process", timesteps=flow.timesteps(2, 3.0), resumable=True) as streamer:
        for chunk in streamer.chunks(picture, sound, text=speaking, listening=listening):
            play(chunk.frames, chunk.wave)

- Where its two stages run is `placement`'s matter; a live call's sound is `sound.LiveSound`.
- Prompts and pictures may change while it runs; they take effect at the next chunk's border.
- No memory left, a source of sound or a decoder's process that fails: one UserError ends the stream. What was delivered stays valid, and a
  resumable stream goes on from there. Any other mistake in this process shows itself as it is.
"""

import threading
from collections import deque
from contextlib import closing, contextmanager
from dataclasses import dataclass, field

import numpy as np
import torch

from .attention import WINDOW
from .chain import Chain, noise_maker
from .config import FRAME, RATE, STRIDE, UserError
from .placement import PLACEMENTS, Chunk, ahead, by_latent, clearly, decoded, device_of, mark, ready
from .sound import Sound
from .vae import i2v_condition

BUSY_S = 10                                      # longest that `resume` waits for a chunk still in the making


@dataclass
class Take:
    """What a running stream holds; `resume` picks it up again."""
    sound: Sound
    draw: torch.Generator                        # of the noise
    image_tokens: torch.Tensor | None
    audio_mask: torch.Tensor | None
    chain: Chain | None = None                   # of the present picture
    offset: int = 0                              # the sound's sample at which this picture began
    index: int = 0                               # of the next chunk
    after: deque = field(default_factory=deque)  # Checkpoints behind the last chunks delivered
    pictures: dict = field(default_factory=dict) # that begin at a chunk still to be made, or made again: {index: (image, tokens)}
    busy: threading.Lock = field(default_factory=threading.Lock)         # held while a chunk is in the making
    run: int = 0                                 # how often it was picked up: threads of earlier runs make no more chunks


@dataclass(frozen=True)
class Checkpoint:
    """Where a stream may go on from: behind a chunk that was delivered, or its beginning."""
    end: int = 0                                 # the sound's sample at which that chunk ends
    state: "State | None" = None                 # the DiT's stage after it
    past: list | None = None                     # the decoder's cache after it


@dataclass(frozen=True)
class State:
    """All that the DiT's next chunk depends on, copied."""
    index: int
    offset: int
    image_tokens: torch.Tensor | None
    chain: Chain
    place: int                                   # chunks that the chain has made
    caches: list                                 # `KVCache.saved` of its caches
    draw: torch.Tensor                           # where the noise goes on

    @classmethod
    def of(cls, take: Take) -> "State":
        return cls(take.index, take.offset, take.image_tokens, take.chain, take.chain.index, [c.saved() for c in take.chain.distinct()], take.draw.get_state())

    def restore(self, take: Take) -> None:
        take.index, take.offset, take.image_tokens, take.chain, take.chain.index = self.index, self.offset, self.image_tokens, self.chain, self.place
        for cache, saved in zip(self.chain.distinct(), self.caches, strict=True):
            cache.restore(saved)
        take.draw.set_state(self.draw)


class Streamer:
    """A talking face for ever: `for frames in streamer.stream(image, audio_chunks)` yields uint8 (t, H, W, 3), chunk by chunk.

    dit, vae, audio_encoder: see `WanDiT`, `VideoVAE` (encode, decode) and `SpeechEncoder` (tokens, lookahead_samples).
    Memory and time per chunk do not grow. timesteps: of the denoising steps, falling, see `flow.timesteps`; chunk, cache: see `Chain`.
    placement: see `placement`; two_device and two_process decode on another GPU if there is one. depth: chunks that each stage may be ahead.
    resumable: keep after each chunk what `resume` needs (a copy of the previous chunk's K/V: cheap for a miniature, gigabytes a chunk at full
    size). undo: chunks that `rewind` may take back (each one more copy). in_parts: chunks come latent frame by latent frame, each as soon as it
    is decoded, the same frames (`placement.by_latent`); `resume` and `rewind` go on from whole ones. blocking: two_process without overlap of
    transfers. worker: a two_process.Decoder to share with a streamer that does not stream at the same time.
    """

    def __init__(self, dit, vae, audio_encoder, placement="serial", *, timesteps, chunk=None, cache="per_step", seed=0, depth=1,
                 resumable=False, undo=0, in_parts=False, blocking=False, worker=None):
        if placement not in PLACEMENTS:
            raise UserError(f"placement {placement!r} is unknown; choose one of {', '.join(PLACEMENTS)}")
        self.dit, self.vae, self.audio_encoder = dit, vae, audio_encoder
        self.placement, self.depth, self.resumable, self.undo, self.blocking = placement, depth, resumable or undo > 0, undo, blocking
        self.chunk, self.seed, self.in_parts = chunk or dit.chunk, seed, in_parts
        if self.chunk % (group := getattr(getattr(audio_encoder, "cfg", None), "group", 1)):
            raise UserError(f"the speech encoder hears {group} latent frames at a time, and chunks of {self.chunk} are no whole groups: load it with `load_speech(folder, {self.chunk})`")
        self.chain = dict(cache=cache, chunk=self.chunk, ts=timesteps)
        self.text = self.listening = self.take = None
        self.prompts = deque(maxlen=4)           # the last ones, as given and on the DiT's device
        self.worker = worker
        self.pictures = deque(maxlen=1)          # the one to begin with at the next chunk's border
        self.vae_device = another(dit.device)
        if placement == "two_device" and hasattr(vae, "to"):
            vae.to(self.vae_device)
        if placement == "two_process":
            self.decoder()                       # it may start while other things load

    # What a stream may be told while it runs

    def set_text(self, text):
        """Change the prompt embedding (1, tokens, text_dim) from the next chunk on: speaking, listening, another mood."""
        self.text = self.moved(text)

    def moved(self, prompt):
        """A prompt on the DiT's device. The same words stay the same tensor: what is remembered of them is known by it."""
        if prompt is None:
            return None
        known = next((placed for given, placed in self.prompts if given is prompt), None)
        if known is None:
            known = prompt.to(self.dit.device)
            self.prompts.append((prompt, known))
        return known

    def set_image(self, image, image_tokens=None):
        """Change the picture, uint8 (H, W, 3) of the same size, at the next chunk's border: a new first chunk, the same sound."""
        self.pictures.append((image, image_tokens))

    def close(self):
        """Let go of the decoder's process, if there is one."""
        if self.worker is not None:
            self.worker.close()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    # Streams

    def stream(self, image, audio_chunks, *, text=None, listening=None, image_tokens=None, audio_mask=None):
        """Yield frames of picture `image` speaking `audio_chunks`: first 1 + 4 (chunk - 1) frames, then 4 chunk for each chunk (in parts: 1, then 4 each).

        image: uint8 (H, W, 3). audio_chunks: an iterable of float waveforms (n,), mono 16 kHz, of any sizes, endless if you
        like, or a LiveSound; silence is added at its end until the last sample has its frame. text (1, tokens, D): the prompt;
        listening: the prompt of chunks whose sound is digital silence (None: the same). image_tokens (1, tokens, D), audio_mask
        (h, w) in token units. Raises UserError for a bad picture or bad sound, no memory left, and a decoder's process that ends.
        """
        given = dict(text=text, listening=listening, image_tokens=image_tokens, audio_mask=audio_mask)
        with closing(self.chunks(image, audio_chunks, **given)) as chunks:
            for chunk in chunks:
                yield chunk.frames

    def chunks(self, image, audio_chunks, *, text=None, listening=None, image_tokens=None, audio_mask=None):
        """`stream` with all that is known of each chunk: see `placement.Chunk`."""
        self.set_text(text)
        self.listening = self.moved(listening)
        if audio_mask is not None:
            audio_mask = audio_mask.to(self.dit.device).expand(1, self.chunk, *audio_mask.shape[-2:])
        if self.take is not None:
            with self.halted(self.take):
                self.take = None
        self.take = Take(Sound(audio_chunks, self.history()), torch.Generator().manual_seed(self.seed), None, audio_mask)
        self.take.after = deque([Checkpoint()], self.undo + 1)
        self.set_image(image, image_tokens)
        yield from self.play(self.take)

    def resume(self, audio_chunks=None):
        """`chunks` after the last one delivered whole, whatever ended the stream: the same as if nothing had happened.

        audio_chunks: where the sound comes from if its source was lost, from the first sample not heard on.
        """
        take = self.take
        if take is None or not self.resumable:
            raise UserError("there is no stream to go on with: begin one with `stream`, on a Streamer(..., resumable=True)")
        if audio_chunks is not None:
            take.sound.follow(audio_chunks)
        last = take.after[-1]
        with self.halted(take):
            if last.state is not None:
                last.state.restore(take)
            else:                                # it ended before anything was delivered: begin again
                take.chain, take.index, take.offset = None, 0, 0
                take.draw.manual_seed(self.seed)
        yield from self.play(take, last.past)

    @property
    def settled(self):
        """The sample before which `rewind` cannot go."""
        return self.take.after[0].end

    def rewind(self, sample):
        """Forget the sound from `sample` on, and every delivered chunk that has frames there: `resume` makes these again.

        What comes next from the sound's source stands at `sample`. So a live stream may run ahead of what is known, and still say
        at once what turns up. Returns the sound forgotten (n,). UserError where more than `undo` chunks would have to go.
        """
        take = self.take
        if take is None or sample < self.settled:
            raise UserError("that part of the stream cannot be taken back: give Streamer(..., undo=chunks)")
        with self.halted(take):
            while sample < take.after[-1].end:
                take.after.pop()
            return take.sound.drop(sample)

    def history(self):
        """Samples to keep before the present chunk; `resume` may go back by all the chunks that were under way."""
        needed = getattr(self.audio_encoder, "history_samples", 8 * RATE)
        return needed + self.resumable * (2 * self.depth + 3 + self.undo) * self.chunk * STRIDE * FRAME

    @contextmanager
    def halted(self, take):
        """No thread of an earlier run makes a chunk of this take, now or later."""
        if not take.busy.acquire(timeout=BUSY_S):
            raise UserError("the stream before still waits for its sound: end that source first")
        take.run += 1
        try:
            if self.dit.device.type == "cuda":
                torch.cuda.synchronize(self.dit.device)      # what such a thread handed over has been done, on whichever CUDA stream
            yield
        finally:
            take.busy.release()

    def play(self, take, past=None):
        with closing(self.placed(self.denoised(take, take.run), past)) as chunks:
            for chunk in chunks:
                if chunk.last:
                    take.after.append(Checkpoint((chunk.frame + len(chunk.frames)) * FRAME, chunk.state, chunk.past))
                    for shown in [k for k in list(take.pictures) if k <= chunk.index - self.undo]:
                        take.pictures.pop(shown)
                chunk.state = chunk.past = None
                yield chunk

    def placed(self, chunks, past):
        """Chunks of latents decoded, where `placement` says."""
        chunks, depth = (by_latent(chunks), self.depth * self.chunk) if self.in_parts else (chunks, self.depth)      # as many frames in advance
        if self.placement == "serial":
            return decoded(chunks, self.vae, self.resumable, past)
        if self.placement == "two_process":
            return self.decoder().run(chunks, depth, self.resumable, past, self.blocking)
        return ahead(decoded(ahead(chunks, depth, self.dit.device), self.vae, self.resumable, past), depth, device_of(self.vae), "vae")

    def decoder(self):
        from .two_process import Decoder
        if self.worker is None or not self.worker.alive:
            self.close()
            self.worker = Decoder(self.vae, self.vae_device, self.dit.device)
        return self.worker

    # The DiT's stage

    def denoised(self, take, run):
        """Chunks of latents, as long as there is sound."""
        while (chunk := self.made(take, run)) is not None:
            yield chunk

    @torch.no_grad()
    def made(self, take, run):
        """The next chunk of latents, or None when the sound has ended."""
        with take.busy, clearly(f"denoising chunk {take.index}"):
            if run != take.run:
                return None
            self.turn(take)
            first = take.chain.index * self.chunk
            chunk = Chunk(take.index, self.sample(take, first) // FRAME, opens=first == 0)
            with mark(chunk, "hear"):
                audio = self.hear(take, chunk, first)
            if audio is None:
                return None
            with mark(chunk, "dit"):
                noise = noise_maker((1, 16, *take.chain.cond.shape[-2:]), None, take.draw, self.dit.device)
                chunk.latents = take.chain.next(noise(slice(first, first + self.chunk)), image=take.image_tokens, audio=audio,
                                                text=self.listening if chunk.listening else self.text, audio_mask=take.audio_mask)
            chunk.ready = ready(chunk.latents)
            take.index += 1
            if self.resumable:
                chunk.state = State.of(take)
            return chunk

    def turn(self, take):
        """Begin with a picture if there is a new one: its chain starts here, with the sound that comes next."""
        picture = self.pictures.pop() if self.pictures else take.pictures.get(take.index)
        if picture is None:
            return
        image, tokens = take.pictures[take.index] = picture
        cond = i2v_condition(self.vae, to_video(image).to(device_of(self.vae)), WINDOW, self.dit.config.condition)
        take.image_tokens = None if tokens is None else tokens.to(self.dit.device)
        take.offset = self.sample(take, take.chain.index * self.chunk) if take.chain else 0
        getattr(self.dit, "forget", lambda: None)()          # recordings of the picture before, and with them its caches (`fast.Graphed`)
        take.chain = None                                    # its own caches go before new ones come
        take.chain = Chain(self.dit, cond.to(self.dit.device), **self.chain)

    @staticmethod
    def sample(take, latent):
        """The stream's sample at which latent frame `latent` of the present picture begins."""
        return take.offset + max(STRIDE * latent - STRIDE + 1, 0) * FRAME

    def hear(self, take, chunk, first):
        """Audio tokens (1, chunk, tokens, D) of latent frames first .., or None when the sound ended before them."""
        sound, begin, end = take.sound, self.sample(take, first), self.sample(take, first + self.chunk)
        sound.until(end + self.audio_encoder.lookahead_samples)
        if sound.ended and sound.total <= begin:
            if sound.total == 0:
                raise UserError("there is no sound to speak: the audio is empty")
            return None
        chunk.wave = sound.wave[begin - sound.start:end - sound.start].copy()
        chunk.listening = self.listening is not None and not chunk.wave.any()            # digital silence: a pause, or sound too late
        tokens = self.audio_encoder.tokens(sound.wave, first, self.chunk, sound.start - take.offset)     # (chunk, tokens, D)
        sound.forget(end)
        return tokens[None].to(self.dit.device)


def another(device):
    """Another GPU than this one, or the same device where there is no other."""
    gpus = torch.cuda.device_count() if device.type == "cuda" else 1
    return torch.device("cuda", ((device.index or 0) + 1) % gpus) if gpus > 1 else device


def to_video(image):
    """A picture, uint8 (H, W, 3) -> float (1, 3, 1, H, W) in [-1, 1]."""
    image = np.asarray(image)
    if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8:
        raise UserError(f"the picture must be uint8 (H, W, 3), got {image.dtype} {image.shape}; read it with media.read_image")
    if image.shape[0] % 16 or image.shape[1] % 16:
        raise UserError(f"the picture is {image.shape[0]} x {image.shape[1]} pixels, of which each must be a multiple of 16; read it with media.read_image at the models' size")
    image = torch.from_numpy(image.copy())
    return (image.float() / 127.5 - 1).permute(2, 0, 1)[None, :, None]
