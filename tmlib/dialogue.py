"""A miniature audio language model: it hears what a caller says and answers in words, which a voice speaks.

    caller's sound -> speech encoder -> eight tokens a second -> causal transformer -> words -> text to speech

What is special
- No text of the caller exists anywhere: the speech encoder's features go straight into the transformer (transformers' Llama, small), between
  the words of its own earlier answers. So it can be asked what was said before.
- What it can talk about stands in data/dialogue.yaml. Of each fact one way of asking is held out for the test and one for validation, as their voices are.
- `reply`, `hush`, `cut` and `forget` are what a `conversation` asks of a partner; `audio_llm.AudioLLM`, with public weights, has the same.
"""
import re
import zlib
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import recited, speech
from .config import DATA, FRAME, STRIDE, Progress, UserError, one_line
from .hub import linked, load_own, save_own

PAD, ANSWER, END = "<pad>", "<answer>", "<end>"
MEMORY = 4                                       # exchanges that a sequence holds, the present one included: as in training
SPLITS = ("train", "valid", "test")
LONGEST = 24                                     # words of an answer
KINDS = {"fact": 0.45, "tell": 0.2, "ask": 0.2, "small_talk": 0.09, "again": 0.06}         # how often each, in a script
PRACTICE = {"fact": 0.36, "tell": 0.2, "ask": 0.22, "small_talk": 0.06, "again": 0.16}      # and in training: what asks for memory is learnt last
KNOWN, FIRST = 0.8, 0.4                          # of the questions for what was told: so many are for something that was; if nothing was, so often something is told instead


# ------------------------------------------------------------------------------------------------------ what to talk about
@dataclass(frozen=True)
class Exchange:
    question: str
    answer: str
    kind: str                                    # of KINDS


class Book:
    """data/dialogue.yaml: every question that has an answer, and scripts of several exchanges that go together."""

    def __init__(self, path: Path | None = None):
        from ruamel.yaml import YAML, YAMLError
        path = path or DATA / "dialogue.yaml"
        try:
            page = YAML(typ="safe", pure=True).load(path.read_text(encoding="utf-8"))
            self.facts = {split: self._facts(page["facts"].values(), split) for split in SPLITS}
            self.remember, self.again, self.openers = list(page["remember"].values()), page["again"], page["openers"]
            self.small_talk = [Exchange(ask, row["answer"], "small_talk") for row in page["small_talk"] for ask in row["ask"]]
            self.tells = {split: [self._tells(row, split) for row in self.remember] for split in SPLITS}
        except (OSError, KeyError, TypeError, AttributeError, YAMLError) as error:
            raise UserError(f"{path}: facts, remember, small_talk, again and openers are wanted there, as git checkout data/dialogue.yaml has them "
                            f"({one_line(error)})") from None

    @staticmethod
    def _facts(topics, split: str) -> list[Exchange]:
        return [Exchange(ask.format(x=x), sentence(t["answer"].format(x=x, y=y)), "fact")
                for t in topics for x, y in t["values"].items() for ask in _ways(t["ask"], x, split)]

    @staticmethod
    def _tells(row, split: str) -> list[tuple[str, Exchange]]:
        return [(x, Exchange(tell.format(x=x), row["reply"].format(x=x), "tell")) for x in row["values"] for tell in _ways(row["tell"], x, split)]

    def script(self, rng, split: str, length: int, kinds: dict[str, float] = KINDS) -> list[Exchange]:
        """`length` exchanges in a row that make sense together, to a partner who remembers MEMORY of them."""
        out, told = [], [(-MEMORY, None)] * len(self.remember)                # when, what
        while len(out) < length:
            kind = rng.choice(list(kinds), p=list(kinds.values()))
            known = [k for k, (at, _) in enumerate(told) if len(out) - at < MEMORY]
            if kind == "ask" and not known and rng.random() < FIRST:
                kind = "tell"
            if kind == "tell":
                k = rng.integers(len(told))
                x, exchange = _one(rng, self.tells[split][k])
                told[k] = len(out), x
            elif kind == "ask":
                k = _one(rng, known) if known and rng.random() < KNOWN else rng.integers(len(told))
                exchange = self._ask(rng, k, told[k][1] if k in known else None)
            elif kind == "again":
                exchange = Exchange(_one(rng, self.again), out[-1].answer if out else "I have not said anything yet.", kind)
            else:
                exchange = _one(rng, self.facts[split] if kind == "fact" else self.small_talk)
            out.append(exchange)
        return out

    def recall(self, rng, split: str) -> list[Exchange]:
        """Four exchanges: a fact, what the caller says of himself, a fact, and the question for what he said."""
        k = rng.integers(len(self.remember))
        x, tell = _one(rng, self.tells[split][k])
        return [_one(rng, self.facts[split]), tell, _one(rng, self.facts[split]), self._ask(rng, k, x)]

    def _ask(self, rng, k: int, x: str | None) -> Exchange:
        row = self.remember[k]
        return Exchange(_one(rng, row["ask"]), row["unknown"] if x is None else row["answer"].format(x=x), "ask")

    def alone(self) -> list[str]:
        """Questions whose words are hardly heard in others: small talk, and those about what was said before."""
        return [ask for row in self.remember for ask in row["ask"]] + self.again + [e.question for e in self.small_talk]

    def questions(self, split: str) -> list[str]:
        """All that a caller may say in this split's scripts."""
        return self.alone() + [e.question for e in self.facts[split]] + [e.question for some in self.tells[split] for _, e in some]

    def words(self) -> list[str]:
        """All words of all answers, in alphabetical order."""
        answers = [e.answer for split in SPLITS for e in self.facts[split] + [e for some in self.tells[split] for _, e in some]]
        answers += [row["answer"].format(x=x) for row in self.remember for x in row["values"]] + [row["unknown"] for row in self.remember]
        return sorted({w for a in [*answers, *(e.answer for e in self.small_talk), "I have not said anything yet."] for w in split_words(a)})


def _ways(asks: list[str], x: str, split: str) -> list[str]:
    """The ways of asking for x that belong to a split: one is the test's and one validation's, others for each x."""
    drawn, n = zlib.crc32(f"unheard {x}".encode()), len(asks)
    test = drawn % n
    owner = {test: "test", (test + 1 + drawn // n % (n - 1)) % n: "valid"}
    return [ask for k, ask in enumerate(asks) if owner.get(k, "train") == split]


def _one(rng, some: list):
    return some[rng.integers(len(some))]


def sentence(text: str) -> str:
    return text[0].upper() + text[1:]


def split_words(text: str) -> list[str]:
    """"It is Anna. Good!" -> it, is, Anna, ., good, !: where a sentence begins, a capital letter means nothing."""
    words = re.findall(r"[\w']+|[.,!?]", text)
    return [w.lower() if before in ".!?" and w != "I" else w for before, w in zip([".", *words], words)]


def join_words(words: list[str]) -> str:
    """Back again."""
    text = re.sub(r" ([.,!?])", r"\1", " ".join(words))
    return re.sub(r"(^|[.!?] )(\w)", lambda m: m[1] + m[2].upper(), text)


def same(a: str, b: str) -> bool:
    return split_words(a) == split_words(b)


# ------------------------------------------------------------------------------------------------------------- the model
@dataclass
class DialogueConfig:
    words: list[str]
    heard: int = 256                             # numbers of sound, each eighth of a second
    width: int = 192
    layers: int = 4
    heads: int = 4


class DialogueLM(nn.Module):
    """A causal transformer over sound and words: [sound of a turn] <answer> words <end> [sound of the next turn] <answer> ..."""

    def __init__(self, cfg: DialogueConfig):
        super().__init__()
        from transformers import LlamaConfig, LlamaModel
        self.cfg, self.vocabulary = cfg, [PAD, ANSWER, END, *cfg.words]
        self.ids = {w: i for i, w in enumerate(self.vocabulary)}
        self.ears = nn.Sequential(nn.LayerNorm(cfg.heard), nn.Linear(cfg.heard, cfg.width), nn.GELU(), nn.Linear(cfg.width, cfg.width))
        self.words = nn.Embedding(len(self.vocabulary), cfg.width)
        shape = LlamaConfig(vocab_size=1, bos_token_id=None, eos_token_id=None, hidden_size=cfg.width, intermediate_size=3 * cfg.width, num_hidden_layers=cfg.layers,
                            num_attention_heads=cfg.heads, num_key_value_heads=cfg.heads, max_position_embeddings=2048, attn_implementation="sdpa")
        self.blocks = LlamaModel(shape)
        self.blocks.embed_tokens = None          # what goes in are embeddings of either kind
        self.head = nn.Linear(cfg.width, len(self.vocabulary))

    def encode(self, text: str) -> list[int]:
        return [self.ids[w] for w in split_words(text)]

    def embed(self, turns: list[tuple]) -> tuple[Tensor, Tensor]:
        """Turns -> embeddings (L, width), and what each place has to say next (L,), -100 where nothing.

        A turn is (heard (n, heard), answer's ids), or these and of how many words the caller broke it off: the others were never said.
        """
        parts, targets, device = [], [], self.head.weight.device
        for heard, answer, *spoken in turns:
            n = spoken[0] if spoken else len(answer)
            parts += [self.ears(heard.to(device)), self.words(torch.tensor([self.ids[ANSWER], *answer[:n]], device=device))]
            targets += [torch.full((len(heard),), -100, device=device), torch.tensor([*answer, self.ids[END]][:n + 1], device=device)]
        return torch.cat(parts), torch.cat(targets)

    def loss(self, batch: list[list[tuple]]) -> Tensor:
        """Mean cross-entropy of the answers' words."""
        rows, targets = zip(*map(self.embed, batch))
        pad = lambda some, value: nn.utils.rnn.pad_sequence(list(some), batch_first=True, padding_value=value)
        hidden = self.blocks(inputs_embeds=pad(rows, 0.0)).last_hidden_state               # padding stands behind: causal attention never sees it
        wanted = pad(targets, -100)
        asked = wanted != -100
        return F.cross_entropy(self.head(hidden[asked]), wanted[asked])

    @torch.no_grad()
    def write(self, turns: list[tuple[Tensor, list[int]]]) -> Iterator[int]:
        """The likeliest answer to the last turn, word by word; the last turn's own answer must be empty."""
        x, past = self.embed(turns)[0][None], None
        for _ in range(LONGEST):
            out = self.blocks(inputs_embeds=x, cache=past, use_cache=True)
            word, past = int(self.head(out.last_hidden_state[0, -1]).argmax()), out.cache
            if word == self.ids[END]:
                return
            yield word
            x = self.words(torch.tensor([[word]], device=x.device))


def heard(encoder, wave: np.ndarray) -> Tensor:
    """Wave (n,) at 16 kHz -> what the language model hears: a row for two video frames (2 ceil(n / (STRIDE FRAME)), 2 per_frame dim), on the CPU."""
    latents = max(-(-len(wave) // (STRIDE * FRAME)), 1)
    tokens = encoder.tokens(wave, 1, latents)                                 # (latents, tokens, D), their context on both sides
    own = encoder.cfg.per_frame * encoder.cfg.context
    return tokens[:, own:tokens.shape[1] - own].reshape(2 * latents, -1).cpu()


class Partner:
    """The language model in a conversation: hears a turn, speaks its answer in `voice` (speech.Voice), remembers the last exchanges."""

    def __init__(self, lm: DialogueLM, encoder, voice):
        self.lm, self.encoder, self.voice = lm, encoder, voice
        self.forget()

    def reply(self, wave: np.ndarray) -> Iterator[speech.Utterance]:
        """The answer to a turn of the caller, wave float32 (n,) at 16 kHz: sentence by sentence, each as soon as it is known."""
        self.turns = [*self.turns[1 - MEMORY:], (heard(self.encoder, wave), [])]
        said = self.turns[-1][1]
        pending = []
        for word in self.lm.write(self.turns):
            said.append(word)
            pending.append(self.lm.vocabulary[word])
            if pending[-1] in ".!?":
                yield from self._speak(pending)
                pending = []
        yield from self._speak(pending)

    def _speak(self, words: list[str]) -> Iterator[speech.Utterance]:
        if any(w.isalnum() for w in words):
            yield speech.synthesise(join_words(words), self.voice)

    def hush(self) -> None:
        """Stop writing: it takes a moment anyway."""

    def cut(self, heard: str) -> None:
        """The caller interrupted: of the last answer only `heard` was spoken."""
        if self.turns:
            self.turns[-1][1][:] = [self.lm.ids[w] for w in split_words(heard) if w in self.lm.ids]

    def forget(self) -> None:
        """A new conversation."""
        self.turns = []


def load_partner(folder: Path, encoder, voice, device: str | None = None):
    """The partner of a folder of models: its own miniature, or the public model that its dialogue.safetensors links to, on `device` unless the link names one."""
    if not (how := linked(Path(folder) / "dialogue.safetensors")):
        return Partner(load(folder), encoder, voice)
    from . import audio_llm
    return audio_llm.load(how.pop("source"), voice, **{"device": device, **how})


# -------------------------------------------------------------------------------------------------------------- training
def bank(book: Book, split: str, voices: list, each: int, alone: int, encoder, rng) -> dict[str, list[Tensor]]:
    """What every question of a split sounds like to the language model, in `each` ways of speaking, `alone` for those of `Book.alone`: {question: [(rows, heard)]}.

    Voices in turn, at a rate of their own each time; half of the questions with an opener, or they would always stand at the same place; reciters speak without.
    """
    out, rare = defaultdict(list), set(book.alone())
    ways = {question: alone if question in rare else each for question in book.questions(split)}
    progress = Progress(sum(ways.values()), "questions spoken")
    for question, n in ways.items():
        able = [v for v in voices if recited.able(v, question)]
        for k in rng.permutation(len(able))[np.arange(n) % len(able)]:
            voice = replace(able[k], rate=round(able[k].rate * rng.uniform(0.85, 1.2)))
            said = _one(rng, book.openers) + question if rng.random() < 0.5 else question
            out[question].append(heard(encoder, turn(rng, speech.synthesise(said if recited.able(voice, said) else question, voice).wave)))
            progress.step()
    return dict(out)


def turn(rng, wave: np.ndarray, lead=(0.1, 0.5), tail=(0.0, 0.4), noise=1e-3) -> np.ndarray:
    """A wave as an ear cuts it out of a call: some quiet before and after, at another loudness."""
    around = [int(speech.RATE * rng.uniform(*s)) for s in (lead, tail)]
    wave = np.pad(wave * rng.uniform(0.4, 1.4), around)
    return (wave + noise * rng.uniform(0, 1) * rng.standard_normal(len(wave))).astype(np.float32)


def batch(book: Book, sounds: dict[str, list[Tensor]], lm: DialogueLM, n: int, broken: float, rng) -> list[list[tuple]]:
    """n training scripts of one to MEMORY exchanges, as `DialogueLM.loss` takes them; broken: the share of answers that the caller breaks off."""
    scripts = [book.script(rng, "train", rng.integers(1, MEMORY + 1), PRACTICE) for _ in range(n)]
    return [[(blurred(_one(rng, sounds[e.question]), rng), *broken_off(lm.encode(e.answer), broken, rng)) for e in script] for script in scripts]


def broken_off(answer: list[int], share: float, rng) -> tuple:
    """(answer,), or in this share of cases (answer, how many of its words were spoken): from none to all but one."""
    return (answer, int(rng.integers(len(answer)))) if rng.random() < share else (answer,)


def blurred(heard: Tensor, rng, spans: int = 3, longest: int = 3, noise: float = 0.6) -> Tensor:
    """What is heard (n, D) with noise, and nothing in some short spans (SpecAugment, Park et al. 2019): so few voices are soon known by heart."""
    heard = heard + noise * rng.uniform() * torch.from_numpy(rng.standard_normal(heard.shape, np.float32))
    for _ in range(rng.integers(spans + 1)):
        at = rng.integers(len(heard))
        heard[at:at + rng.integers(1, longest + 1)] = 0
    return heard


def save(lm: DialogueLM, folder: Path) -> None:
    """Writes `dialogue.safetensors`, see `hub.save_own`."""
    save_own(Path(folder) / "dialogue.safetensors", lm.state_dict(), lm.cfg)


def load(folder: Path) -> DialogueLM:
    """Reads what `save` wrote, see `hub.load_own`."""
    return load_own(Path(folder) / "dialogue.safetensors", lambda **cfg: DialogueLM(DialogueConfig(**cfg)), "language model")
