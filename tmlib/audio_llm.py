"""An audio language model with public weights as the partner of a live conversation: it hears the caller's turn and answers in speech.

What is special
- Any model of transformers' AutoModelForMultimodalLM whose processor takes a conversation of several recordings: Qwen2-Audio-Instruct,
  Voxtral, the part of Qwen's Omni models that writes. Whether one does is tried before its weights are read.
- Sound goes in as it is; text comes out, and is spoken sentence by sentence while the rest is being written.
- The history is what was heard, on both sides: recordings, and of each answer the pieces handed over, or what `cut` says of them.
  A turn without an answer is one with the next: speakers alternate, as templates demand. It is bounded in turns and in seconds.
"""
import base64
import io
import re
import threading
import unicodedata
from collections.abc import Iterable, Iterator
from types import SimpleNamespace

import numpy as np
import soundfile
import torch

from . import speech
from .config import RATE, UserError, one_line
from .hub import find_part, load_part, read_json

SYSTEM = "You are in a spoken conversation. Answer briefly, in one to three short sentences of plain English, as one speaks, without lists or markup."
FIX = "give an audio language model for conversations, such as Qwen/Qwen2-Audio-7B-Instruct"
PROMPT = dict(add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt")
STOP = re.compile(r"""[.!?;:…]+["'”’)\]*_`]*(?=\s)|\n|,["'”’*_`]*(?=\s)""")     # in 3.5, 10:30 and 1,000 no space follows
SHORT = re.compile(r"(?:^|[\s(\"'*_])(?:(?:[A-Za-z]\.)*[A-Za-z]|Mrs?|Ms|Dr|St|Prof|vs)$|^\W*\d+$")      # words whose point ends no sentence
SAID = set(".,;:!?…'’\"“”()-–—/&%+=@°$€£")       # beside letters and digits; no voice can say the rest
brief = lambda error: f"{type(error).__name__}: {one_line(error, 200)}"


class AudioLLM:
    """The partner, see `load`; one call at a time, from any thread.

    net, processor: one model's. voice: speech.Voice. system: how to answer; "" for nothing. tokens: the longest answer. turns: earlier
    turns that are kept; seconds: sound that is kept, this turn's included. clause: characters from which a comma ends a piece.
    sample: draw as the model's generation_config says, instead of taking the likeliest token.
    """

    def __init__(self, net, processor, voice, system=SYSTEM, tokens=160, turns=8, seconds=240.0, clause=40, sample=False):
        if tokens < 1 or turns < 0 or seconds <= 0:
            raise UserError(f"audio language model: tokens {tokens} must be at least 1, turns {turns} at least 0, seconds {seconds} above 0")
        self.net, self.processor, self.voice, self.system, self.clause = net, processor, voice, system, clause
        end = net.generation_config.eos_token_id or processor.tokenizer.eos_token_id
        self.turns, self.seconds, self.how = turns, seconds, dict(max_new_tokens=tokens, do_sample=sample, eos_token_id=end)
        self.apart, self.history = takes_system(processor, net.name_or_path), []
        self.lock, self.stop, self.thread = threading.Lock(), threading.Event(), None
        speech.synthesise("Hello.", voice)                                    # a voice that is missing says so now, others are loaded

    def reply(self, wave) -> Iterator[speech.Utterance]:
        """The caller's turn, float32 (n,) at 16 kHz -> the answer in pieces, each as soon as it can be spoken.

        Writing begins at once; an answer still under way is stopped. UserError: now for what is no wave, from the iterator where the model fails.
        """
        wave = np.asarray(wave)
        if wave.ndim != 1 or wave.dtype.kind != "f" or not len(wave) or not np.isfinite(wave).all():
            raise UserError(f"the caller's turn: expected finite float samples (n,), mono at {RATE} Hz, got {wave.dtype} {wave.shape}")
        from transformers import TextIteratorStreamer
        with self.lock:
            self.stop.set()
        if self.thread:
            self.thread.join()                                                # models keep a little state: one writes at a time
        turn, self.stop, failed = self._hear(wave.astype(np.float32)), threading.Event(), []
        streamer = TextIteratorStreamer(self.processor.tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.thread = threading.Thread(target=self._write, args=(self.messages(), streamer, self.stop, failed), daemon=True)
        self.thread.start()
        return self._speak(turn, streamer, self.stop, failed)

    def hush(self):
        """Writing stops at the next token; what was handed over stays as it is."""
        with self.lock:
            self.stop.set()

    def cut(self, heard: str):
        """The caller interrupted: of the last answer only `heard` was spoken. Writing stops at the next token."""
        with self.lock:                                                       # no piece is added behind it
            self.stop.set()
            for turn in self.history[-1:]:
                turn.answer = " ".join(heard.split())

    def forget(self):
        """A new conversation; an answer under way stops."""
        self.cut("")
        self.history = []

    def messages(self) -> list[dict]:
        """The conversation as chat templates take it; the system's words stand in the first turn where a template has no place for them."""
        chat = [{"role": "system", "content": self.system}] if self.system and self.apart else []
        for turn in self.history:
            chat.append({"role": "user", "content": [recording(self.processor, wave) for wave in turn.waves]})
            chat += [{"role": "assistant", "content": turn.answer}] if turn.answer else []
        if self.system and not self.apart:
            chat[0]["content"].insert(0, {"type": "text", "text": f"{self.system}\n"})
        return chat

    def _hear(self, wave):
        """Add to the history, and drop what is too old: whole turns, then the beginning of this one. Returns this turn."""
        if not self.history or self.history[-1].answer:
            self.history.append(SimpleNamespace(waves=[], answer=""))
        waves, longest = self.history[-1].waves, getattr(getattr(self.processor, "feature_extractor", None), "n_samples", 30 * RATE)
        waves += [wave[k:k + longest] for k in range(0, len(wave), longest)]  # processors would cut off the rest
        full = lambda: sum(len(w) for turn in self.history for w in turn.waves) > self.seconds * RATE
        while len(self.history) > 1 and (len(self.history) > self.turns + 1 or full()):
            del self.history[0]
        while len(waves) > 1 and full():
            del waves[0]
        return self.history[-1]

    def _write(self, chat, streamer, stop, failed):
        try:
            inputs = self.processor.apply_chat_template(chat, **PROMPT).to(self.net.device, dtype=self.net.dtype)    # sound alone takes on the dtype
            done = lambda ids, scores, **_: torch.full((len(ids),), stop.is_set(), device=ids.device)                # asked after every token
            self.net.generate(**inputs, streamer=streamer, stopping_criteria=[done], **self.how)
        except Exception as error:                                            # whatever a model may raise: its reader waits
            failed.append(error)
        finally:
            streamer.text_queue.put(streamer.stop_signal)

    def _speak(self, turn, streamer, stop, failed):
        try:
            for piece in pieces(streamer, self.clause):
                try:
                    utterance = speech.synthesise(piece, self.voice)
                except UserError as error:                                    # words that this voice cannot say: the next may do
                    failed.append(error)
                    continue
                with self.lock:
                    if stop.is_set():
                        return
                    turn.answer = f"{turn.answer} {piece}".strip()
                yield utterance
            if failed and not stop.is_set() and not (turn.answer and isinstance(failed[0], UserError)):
                raise UserError(f"{self.net.name_or_path}: no answer ({brief(failed[0])}); if memory ran out, keep fewer turns") from failed[0]
        finally:
            stop.set()                                                        # nobody listens any more


def pieces(texts: Iterable[str], clause: int = 40) -> Iterator[str]:
    """Text in portions of any size -> what can be spoken of it, in sentences or clauses, each as soon as a space behind it is known."""
    text = ""
    for more in texts:
        text += more
        while end := next((m.end() for m in STOP.finditer(text) if not (m[0][0] == "," and m.start() < clause)
                           and not (m[0][0] == "." and SHORT.search(text[:m.start()]))), 0):
            yield from filter(None, [speakable(text[:end])])
            text = text[end:]
    yield from filter(None, [speakable(text)])


def speakable(text: str) -> str:
    """Without markup, addresses and symbols that no voice can say; "" if no word is left."""
    text = re.sub(r"\]\([^)\s]*\)|(?:https?://|www\.)\S+", " ", unicodedata.normalize("NFC", text))       # of a link its words stay
    text = "".join(c if c.isalnum() or c in SAID else " " for c in text)
    return re.sub(r"\s+(?=[.,;:!?…])", "", " ".join(text.split())) if any(c.isalnum() for c in text) else ""


def recording(processor, wave) -> dict:
    """Part of a message: float32 (n,) at 16 kHz, as an array, or for mistral-common as the bytes of a wav file."""
    wave = np.pad(wave, (0, max(RATE // 5 - len(wave), 0)))                   # for less some models have no token
    if type(getattr(processor, "tokenizer", None)).__name__ != "MistralCommonBackend":
        return {"type": "audio", "audio": wave}
    soundfile.write(file := io.BytesIO(), wave, RATE, format="WAV", subtype="FLOAT")
    return {"type": "audio", "base64": "data:audio/wav;base64," + base64.b64encode(file.getvalue()).decode()}


def takes_system(processor, where) -> bool:
    """Whether a conversation may begin with a system message. UserError if there can be none of two recordings."""
    user, line = {"role": "user", "content": [recording(processor, np.zeros(RATE, np.float32))]}, "they make nothing of sound"
    for start in ([{"role": "system", "content": "Listen."}], []):
        try:
            inputs = processor.apply_chat_template([*start, user, {"role": "assistant", "content": "Yes."}, user], **PROMPT)
            if any(torch.is_tensor(x) and x.is_floating_point() for x in inputs.values()):
                return bool(start)
        except Exception as error:                                            # templates are programs, and refuse in ways of their own
            line = brief(error)
    raise UserError(f"{where}: its processor and chat template take no conversation of several recordings ({line}); {FIX}")


def load(name, voice, device: str | None = None, **how) -> AudioLLM:
    """The partner from a folder or a hub id; how: see AudioLLM. bfloat16 on a GPU (the default where there is one), else float32.

    With accelerate installed weights are read straight onto the GPU, else through the CPU's memory. UserError names what is missing or unfit.
    """
    from transformers import AutoConfig, AutoModelForMultimodalLM, AutoProcessor
    from transformers.models.auto.modeling_auto import MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES
    from transformers.utils import is_accelerate_available
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device != "cpu" and not torch.cuda.is_available():
        raise UserError(f"device {device}: this machine has no such GPU, or torch was installed without CUDA; use cpu")
    folder = find_part(name, "audio_llm")
    if (kind := read_json(folder / "config.json").get("model_type")) not in MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES:
        raise UserError(f"{folder / 'config.json'}: is of {kind!r}, which answers no sound; {FIX}")
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True)
        processor = AutoProcessor.from_pretrained(folder, local_files_only=True)
    except Exception as error:
        raise UserError(f"{folder}: processor or tokenizer of this {kind!r} cannot be used ({brief(error)}); copy them again") from error
    takes_system(processor, folder)
    config = getattr(config, "thinker_config", config)                        # of an omni model, the part that writes
    direct = {"device_map": device} if device != "cpu" and is_accelerate_available() else {}
    net = load_part(AutoModelForMultimodalLM, folder, torch.float32 if device == "cpu" else torch.bfloat16, device, config=config, **direct)
    return AudioLLM(net, processor, voice, **how)
