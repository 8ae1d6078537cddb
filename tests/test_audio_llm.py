"""audio_llm: answers are those of transformers' own generate, spoken while they are written; the history is what was heard; one line per mistake."""
import base64
import io
import json
import shutil
import threading
from types import SimpleNamespace

import numpy as np
import pytest
import soundfile
import torch

from tmlib import audio_llm, speech
from tmlib.audio_llm import AudioLLM, load, pieces, speakable
from tmlib.config import UserError
from tmlib.speech import RATE

VOICE = speech.load_voices()["train"][0]
SCRIPT = ("Hello there, my friend. **It is** 3.5 degrees 🙂 outside at 10:30 today, and that feels rather warm, say all # of "
          "us! See [the page](http://x.y/z) now; bye Mr. Smith")
SAID = ["Hello there, my friend.", "It is 3.5 degrees outside at 10:30 today,", "and that feels rather warm, say all of us!", "See the page now;",
        "bye Mr. Smith"]
WORDS = [w for w in SCRIPT.split() if w != "#"] + "yes no. maybe, one! two? three four five; six seven eight: nine ten".split()
AUDIO, START, END = "<|AUDIO|>", "<|im_start|>", "<|im_end|>"
PIECE = 2                                                                    # seconds that one recording may have, for Whisper's 30


def tokenizer():
    """Whole words, with and without the space before them, so that a prompt can be read off its ids."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast
    special = ["<pad>", "<unk>", START, END, "<|audio_bos|>", "<|audio_eos|>", AUDIO]
    words = ["\n", " #", "user", "assistant", "system", *WORDS]
    vocabulary = {w: i for i, w in enumerate(dict.fromkeys([*special, *words, *(f" {w}" for w in WORDS), *(f" {w}" for w in ("You", "will"))]))}
    made = Tokenizer(models.WordLevel(vocabulary, "<unk>"))
    made.pre_tokenizer = pre_tokenizers.Split(Regex(r"\n| ?[^\s]+"), "isolated")
    made.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=made, pad_token="<pad>", unk_token="<unk>", eos_token=END, extra_special_tokens=special[2:])


@pytest.fixture(scope="module")
def house(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("qwen2_audio"))


def save_model(folder):
    """`folder` with a Qwen2-Audio as it lies on the hub: its classes, its processor and its chat template, two layers, two seconds, 80 words."""
    from transformers import Qwen2AudioConfig, Qwen2AudioForConditionalGeneration, Qwen2AudioProcessor, WhisperFeatureExtractor
    words = tokenizer()
    ears = dict(num_mel_bins=16, d_model=32, encoder_layers=1, encoder_attention_heads=2, encoder_ffn_dim=32, max_source_positions=50 * PIECE)
    text = dict(model_type="qwen2", vocab_size=len(words), hidden_size=128, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
                num_key_value_heads=2, max_position_embeddings=4096, initializer_range=0.4)
    torch.manual_seed(3)
    config = Qwen2AudioConfig(audio_config={"model_type": "qwen2_audio_encoder", **ears}, text_config=text, initializer_range=0.4,
                              audio_token_index=words.convert_tokens_to_ids(AUDIO))
    net = Qwen2AudioForConditionalGeneration(config)
    net.generation_config.update(eos_token_id=words.eos_token_id, pad_token_id=words.pad_token_id)
    net.save_pretrained(folder)
    Qwen2AudioProcessor(WhisperFeatureExtractor(feature_size=16, chunk_length=PIECE), words).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def models(house):
    """(random, scripted): a model whose words follow from all that it heard, and one that says SCRIPT to everything."""
    partners = load(house, VOICE, "cpu"), load(house, VOICE, "cpu")
    net, words = partners[1].net, partners[1].processor.tokenizer
    with torch.no_grad():                                                    # each word points at the next one, no layer adds anything
        for layer in net.model.language_model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        net.get_input_embeddings().weight.copy_(torch.eye(len(words), 128))
        net.lm_head.weight.zero_()
        ids = [words.convert_tokens_to_ids("\n"), *words(SCRIPT).input_ids, words.eos_token_id]
        assert len(set(ids)) == len(ids) and words.unk_token_id not in ids, "a word that comes twice would lead in a circle"
        for a, b in zip(ids, ids[1:]):
            net.lm_head.weight[b, a] = 1
    return partners


@pytest.fixture
def random(models):
    return fresh(models[0], tokens=50)


@pytest.fixture
def scripted(models):
    return fresh(models[1])


def fresh(partner, **how):
    return AudioLLM(partner.net, partner.processor, VOICE, **how)


def noise(seconds, seed=0):
    return (0.1 * np.random.default_rng(seed).standard_normal(int(seconds * RATE))).astype(np.float32)


def say(partner, wave):
    return [u.text for u in partner.reply(wave)]


def prompts(partner, monkeypatch):
    """What `generate` is given from now on."""
    seen, generate = [], partner.net.generate
    monkeypatch.setattr(partner.net, "generate", lambda **inputs: (seen.append(inputs), generate(**inputs))[1])
    return seen


def text_of(partner, inputs):
    """The prompt as a person reads it: one mark for each recording, however many tokens it has."""
    ids, seen = inputs["input_ids"][0].tolist(), []
    for i in ids:
        if i != partner.net.config.audio_token_id or seen[-1] != i:
            seen.append(i)
    return partner.processor.tokenizer.decode(seen)


class Gate:
    """Lets `n` forward passes of a model through, then holds it until `open`."""

    def __init__(self, partner, n):
        self.calls, self.n, self.reached, self.opened = 0, n, threading.Event(), threading.Event()
        self.hook = partner.net.register_forward_pre_hook(self)

    def __call__(self, *_):
        self.calls += 1
        if self.calls == self.n:
            self.reached.set()
            assert self.opened.wait(10)

    def open(self):
        self.opened.set()


@pytest.fixture
def gate():
    made = []
    yield lambda partner, n: made.append(Gate(partner, n)) or made[-1]
    for g in made:
        g.open()
        g.hook.remove()


# ---- answers -----------------------------------------------------------------------------------

@pytest.mark.parametrize("seconds, clause", [(0.05, 40), (0.7, 10), (1.9, 40)])
def test_the_answer_is_that_of_one_plain_generate(random, seconds, clause):
    random.clause, wave = clause, noise(seconds, seed=int(10 * seconds))
    heard = np.pad(wave, (0, max(RATE // 5 - len(wave), 0)))
    chat = [{"role": "system", "content": random.system}, {"role": "user", "content": [{"type": "audio", "audio": heard}]}]
    inputs = random.processor.apply_chat_template(chat, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt")
    ids = random.net.generate(**inputs, max_new_tokens=50, do_sample=False)[0, inputs["input_ids"].shape[1]:]
    whole = random.processor.tokenizer.decode(ids, skip_special_tokens=True)
    spoken = list(random.reply(wave))
    assert len(ids) > 20 and len(spoken) > 1
    assert " ".join(u.text for u in spoken) == speakable(whole) == random.history[-1].answer
    for u in spoken:
        assert u.wave.dtype == np.float32 and len(u.wave) > 1000 and u.phones[-1].end == pytest.approx(len(u.wave) / RATE)


def test_what_is_heard_makes_the_answer(random):
    answers = []
    for seed in (0, 1, 0):
        random.forget()
        answers.append(say(random, noise(1, seed)))
    assert answers[0] == answers[2] != answers[1]


def test_pieces_of_a_known_answer(scripted):
    assert say(scripted, noise(0.5)) == SAID


def test_the_first_piece_is_spoken_while_the_rest_is_not_yet_written(scripted, gate):
    held = gate(scripted, 8)                                                 # four words, one more, and a few to spare
    answer = scripted.reply(noise(0.5))
    assert next(answer).text == SAID[0] and scripted.thread.is_alive()
    assert held.reached.wait(5) and held.calls == 8 and scripted.history[-1].answer == SAID[0]
    held.open()
    assert [u.text for u in answer] == SAID[1:]
    scripted.thread.join(5)
    assert not scripted.thread.is_alive() and scripted.history[-1].answer == " ".join(SAID)


def test_half_precision(house, monkeypatch):
    partner = load(house, VOICE, "cpu", tokens=12)
    partner.net.bfloat16()
    seen = prompts(partner, monkeypatch)
    assert say(partner, noise(0.5)) and seen[0]["input_features"].dtype == torch.bfloat16 and seen[0]["input_ids"].dtype == torch.int64


def test_the_longest_answer(scripted, monkeypatch):
    seen = prompts(scripted, monkeypatch)
    scripted = fresh(scripted, tokens=3)
    assert say(scripted, noise(0.5)) == ["Hello there, my"] and seen[0]["max_new_tokens"] == 3


# ---- history -----------------------------------------------------------------------------------

def test_the_second_turn_hears_the_first(scripted, monkeypatch):
    seen, first, second = prompts(scripted, monkeypatch), noise(0.5, 1), noise(1.1, 2)
    say(scripted, first)
    say(scripted, second)
    words = scripted.processor.tokenizer
    said_again = words.decode(words(" ".join(SAID)).input_ids)               # words that this tokenizer has not are one mark
    a, b = (text_of(scripted, inputs) for inputs in seen)
    assert a.count(AUDIO) == 1 and b.count(AUDIO) == 2 and b.startswith(a)
    assert b[len(a):].startswith(f"{said_again}{END}\n{START}user\n") and b.endswith(f"{START}assistant\n")
    features = scripted.processor.feature_extractor([first, second], sampling_rate=RATE, return_tensors="pt", padding="max_length").input_features
    assert torch.equal(seen[1]["input_features"], features) and torch.equal(seen[0]["input_features"], features[:1])
    tokens = lambda n: ((n // 160 - 1) // 2 + 1 - 2) // 2 + 1                                          # Whisper's stride, then two halvings
    count = (seen[1]["input_ids"] == scripted.net.config.audio_token_id).sum().item()
    assert count == tokens(len(first)) + tokens(len(second))


def test_cut_stops_the_writing_and_leaves_what_was_heard(scripted, monkeypatch, gate):
    seen, held = prompts(scripted, monkeypatch), gate(scripted, 9)
    answer = scripted.reply(noise(0.5))
    assert next(answer).text == SAID[0] and held.reached.wait(5)
    scripted.cut(" Hello  there,")
    held.open()
    scripted.thread.join(5)
    assert not scripted.thread.is_alive() and held.calls == 9, "the pass under way is the last one"
    assert list(answer) == [] and scripted.history[-1].answer == "Hello there,"
    assert say(scripted, noise(0.6)) == SAID                                 # a new answer is whole again
    prompt = text_of(scripted, seen[1])
    assert "assistant\nHello there,<|im_end|>" in prompt and "friend" not in prompt


def test_cut_after_the_end(scripted):
    say(scripted, noise(0.5))
    scripted.cut("Hello")
    assert [t.answer for t in scripted.history] == ["Hello"]
    fresh(scripted).cut("nothing was ever said")                             # and is no mistake


def test_a_turn_without_an_answer_is_one_with_the_next(scripted, monkeypatch):
    seen = prompts(scripted, monkeypatch)
    say(scripted, noise(0.5, 1))
    scripted.cut("")
    say(scripted, noise(0.5, 2))
    prompt = text_of(scripted, seen[1])
    assert prompt.count(AUDIO) == 2 and prompt.count(f"{START}user") == 1 and prompt.count(f"{START}assistant") == 1
    assert len(scripted.history) == 1


def test_a_new_turn_stops_the_old_answer(scripted, gate):
    held = gate(scripted, 9)
    old = scripted.reply(noise(0.5))
    assert next(old).text == SAID[0] and held.reached.wait(5)
    first = scripted.thread
    threading.Timer(0.1, held.open).start()
    new = scripted.reply(noise(0.6))
    assert not first.is_alive() and held.calls < len(SCRIPT.split())
    assert list(old) == [] and [u.text for u in new] == SAID
    assert [t.answer for t in scripted.history] == [SAID[0], " ".join(SAID)]


def test_who_stops_listening_stops_the_writing(scripted, gate):
    held = gate(scripted, 9)
    answer = scripted.reply(noise(0.5))
    next(answer)
    assert held.reached.wait(5)
    answer.close()
    held.open()
    scripted.thread.join(5)
    assert not scripted.thread.is_alive() and held.calls == 9 and scripted.history[-1].answer == SAID[0]


def test_forget(scripted, monkeypatch, gate):
    seen, held = prompts(scripted, monkeypatch), gate(scripted, 9)
    answer = scripted.reply(noise(0.5))
    assert held.reached.wait(5)
    scripted.forget()
    held.open()
    assert list(answer) == [] and scripted.history == []
    say(scripted, noise(0.6))
    assert text_of(scripted, seen[1]).count(AUDIO) == 1


@pytest.mark.parametrize("turns", [0, 2])
def test_so_many_earlier_turns_are_kept(scripted, monkeypatch, turns):
    seen, scripted = prompts(scripted, monkeypatch), fresh(scripted, turns=turns, system="")
    for k in range(4):
        say(scripted, noise(0.3 + 0.1 * k, k))
    assert [text_of(scripted, p).count(AUDIO) for p in seen] == [min(k, turns) + 1 for k in range(4)]
    assert [text_of(scripted, p).count("friend.") for p in seen] == [min(k, turns) for k in range(4)]
    assert [len(t.waves[0]) for t in scripted.history] == [int((0.3 + 0.1 * k) * RATE) for k in range(3 - turns, 4)]


def test_so_many_seconds_are_kept_and_long_turns_are_heard_whole(scripted, monkeypatch):
    seen, scripted = prompts(scripted, monkeypatch), fresh(scripted, seconds=6)
    say(scripted, noise(1))
    say(scripted, noise(PIECE * 2 + 0.5))                                    # more than one recording of this model may have
    assert [[len(w) / RATE for w in t.waves] for t in scripted.history] == [[1], [2, 2, 0.5]] and len(seen[1]["input_features"]) == 4
    say(scripted, noise(3))
    assert [[len(w) / RATE for w in t.waves] for t in scripted.history] == [[2, 1]]
    say(scripted, noise(PIECE * 4, seed=5))
    (last,) = scripted.history
    assert np.array_equal(np.concatenate(last.waves), noise(PIECE * 4, seed=5)[-6 * RATE:]), "of a turn that is too long the end is kept"


def test_the_system_prompt(scripted, monkeypatch):
    """As a message, or, where a template takes none, as text before the first recording."""
    seen, scripted = prompts(scripted, monkeypatch), fresh(scripted, system="You will")
    say(scripted, noise(0.5))
    assert scripted.apart and text_of(scripted, seen[0]).startswith(f"{START}system\n")
    refuses = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no such role') }}{% endif %}" + scripted.processor.chat_template
    monkeypatch.setattr(scripted.processor, "chat_template", refuses)
    scripted = fresh(scripted, system="yes no.")
    for _ in range(2):
        say(scripted, noise(0.5))
    assert not scripted.apart and all(text_of(scripted, p).count("yes no.") == 1 for p in seen[1:])
    assert [part["type"] for part in scripted.messages()[0]["content"]] == ["text", "audio"]
    assert scripted.messages()[2]["content"][0]["type"] == "audio"


class MistralCommonBackend:
    """By its name alone that tokenizer is known."""


def test_a_processor_of_mistral_gets_a_wav_file():
    wave = noise(0.1)
    part = audio_llm.recording(SimpleNamespace(tokenizer=MistralCommonBackend()), wave)
    kind, data = part["base64"].split(",")
    heard, rate = soundfile.read(io.BytesIO(base64.b64decode(data)), dtype="float32")
    assert part["type"] == "audio" and kind == "data:audio/wav;base64" and rate == RATE and len(heard) == RATE // 5
    assert np.array_equal(heard[:len(wave)], wave) and not heard[len(wave):].any()
    assert np.array_equal(audio_llm.recording(SimpleNamespace(), wave)["audio"], heard)


# ---- another kind ------------------------------------------------------------------------------

@pytest.mark.parametrize("version, apart", [("v7", False), ("v13", True)])
def test_voxtral(tmp_path, monkeypatch, version, apart):
    """Takes its sound as the bytes of a file, its embeddings are tied, and older ones hear no system message beside sound."""
    pytest.importorskip("mistral_common.tokens.tokenizers.tekken", reason="needs mistral-common[audio]")
    from transformers import MistralCommonBackend, VoxtralConfig, VoxtralForConditionalGeneration, VoxtralProcessor, WhisperFeatureExtractor
    marks = dict(enumerate("<unk> <s> </s> [INST] [/INST] [AVAILABLE_TOOLS] [/AVAILABLE_TOOLS] [TOOL_RESULTS] [/TOOL_RESULTS] [TOOL_CALLS] [IMG] "
                           "<pad> [IMG_BREAK] [IMG_END] [PREFIX] [MIDDLE] [SUFFIX] [SYSTEM_PROMPT] [/SYSTEM_PROMPT] [TOOL_CONTENT]".split()))
    marks |= dict(enumerate("[AUDIO] [BEGIN_AUDIO]".split(), 24)) | dict(enumerate("[TRANSCRIBE] [ARGS] [CALL_ID] [THINK] [/THINK]".split(), 34))
    special = [{"rank": i, "token_str": marks.get(i, f"<SPECIAL_{i}>"), "is_control": True} for i in range(40)]
    letters = [{"rank": i, "token_bytes": base64.b64encode(bytes([i])).decode(), "token_str": None} for i in range(256)]
    sizes = dict(num_vocab_tokens=256, default_vocab_size=256 + len(special), default_num_special_tokens=len(special))
    spectrum = dict(num_mel_bins=16, hop_length=160, window_size=400)
    (tmp_path / "tekken.json").write_text(json.dumps({
        "config": {"pattern": r"\s+|\S+", "version": version, **sizes}, "vocab": letters, "special_tokens": special,
        "audio": dict(sampling_rate=RATE, frame_rate=12.5, chunk_length_s=30.0, audio_encoding_config=spectrum)}))
    ears = dict(model_type="voxtral_encoder", num_mel_bins=16, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64)
    text = dict(model_type="llama", vocab_size=296, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
                num_key_value_heads=1, head_dim=16, initializer_range=0.4, tie_word_embeddings=True)
    torch.manual_seed(0)
    net = VoxtralForConditionalGeneration(VoxtralConfig(audio_config=ears, text_config=text, audio_token_id=24, tie_word_embeddings=True))
    net.generation_config.update(eos_token_id=2, pad_token_id=11)
    net.save_pretrained(tmp_path)
    VoxtralProcessor(WhisperFeatureExtractor(feature_size=16), MistralCommonBackend.from_pretrained(tmp_path)).save_pretrained(tmp_path)
    partner = load(tmp_path, VOICE, "cpu", tokens=30, system="Listen.")
    seen, first, second = prompts(partner, monkeypatch), noise(0.5, 1), noise(1, 2)
    say(partner, first)
    partner.cut("I heard it")
    say(partner, second)
    assert partner.apart == apart and (seen[1]["input_ids"] == 24).sum() == 2 * 375 == 2 * (seen[0]["input_ids"] == 24).sum()
    prompt = partner.processor.tokenizer.decode(seen[1]["input_ids"][0].tolist())
    assert "I heard it" in prompt and "Listen." in prompt
    want = partner.processor.feature_extractor([first, second], sampling_rate=RATE, return_tensors="pt").input_features
    assert torch.allclose(seen[1]["input_features"], want, atol=1e-5)


# ---- text --------------------------------------------------------------------------------------

@pytest.mark.parametrize("text, want", [
    ("It costs 3.5 dollars. Really? Yes!", ["It costs 3.5 dollars.", "Really?", "Yes!"]),
    ("At 10:30, or 1,000 times; so: this.", ["At 10:30, or 1,000 times;", "so:", "this."]),
    ("One, two, and then much more of what comes behind it, as you see.",
     ["One, two, and then much more of what comes behind it,", "as you see."]),
    ("Mr. Smith of the U.S. army met Dr. No. He left.", ["Mr. Smith of the U.S. army met Dr. No.", "He left."]),
    ("# Plan\n\n1. **Eat** _well_.\n2. Sleep `a lot`!\n", ["Plan", "1. Eat well.", "2. Sleep a lot!"]),
    ("Fine 🙂👍🏽. ✨ See [my page](https://a.b/c?d=e) or www.x.org today — naïve café.", ["Fine.", "See my page or today — naïve café."]),
    ('She said "go." Then left... and "stayed"?!', ['She said "go."', "Then left...", 'and "stayed"?!']),
    ("*** --- ... 🙂", []), ("", []), ("No end", ["No end"]), ("Wait... what?\r\nNow.", ["Wait...", "what?", "Now."]),
])
def test_pieces(text, want):
    assert list(pieces([text])) == want
    for n in (1, 2, 3, 7):                                                   # however it comes
        assert list(pieces(text[k:k + n] for k in range(0, len(text), n))) == want


def test_a_piece_waits_for_nothing_but_a_space():
    taken = []
    chunks = (taken.append(c) or c for c in ["Hi the", "re. ", "Mo", "re."])
    assert next(pieces(chunks)) == "Hi there." and len(taken) == 2


# ---- mistakes ----------------------------------------------------------------------------------

def test_a_word_that_the_voice_cannot_say_is_passed_over(scripted, monkeypatch):
    real = speech.synthesise
    monkeypatch.setattr(speech, "synthesise", lambda text, voice: real(text if "page" not in text else "", voice))
    assert say(scripted, noise(0.5)) == [s for s in SAID if "page" not in s]
    monkeypatch.setattr(speech, "synthesise", lambda text, voice: real("", voice))
    with pytest.raises(UserError, match="nothing to say"):
        say(scripted, noise(0.5))


def test_a_model_that_fails_says_so_and_goes_on(scripted, monkeypatch):
    def fail(*_):
        raise RuntimeError("out of\nmemory")
    hook = scripted.net.register_forward_pre_hook(fail)
    answer = scripted.reply(noise(0.5))
    with pytest.raises(UserError, match=r"qwen2_audio.*: no answer \(RuntimeError: out of memory\); if memory ran out"):
        list(answer)
    hook.remove()
    assert say(scripted, noise(0.5)) == SAID


@pytest.mark.parametrize("wave", [np.zeros((2, 9), np.float32), np.zeros(0, np.float32), np.zeros(9, np.int16), np.full(9, np.nan)])
def test_what_is_no_wave(scripted, wave):
    with pytest.raises(UserError, match="the caller's turn: expected finite float"):
        scripted.reply(wave)
    assert scripted.history == [] and scripted.thread is None


@pytest.mark.parametrize("how", [dict(tokens=0), dict(turns=-1), dict(seconds=0)])
def test_settings_that_make_no_sense(scripted, how):
    with pytest.raises(UserError, match="must be at least"):
        fresh(scripted, **how)


def test_a_voice_that_is_none(models):
    with pytest.raises(UserError, match="voices.yaml"):
        AudioLLM(models[0].net, models[0].processor, SimpleNamespace(name="x", engine="none"))


def test_where_there_is_no_model(tmp_path, monkeypatch):
    import huggingface_hub

    def offline(*_, **__):
        raise ConnectionError("no network")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    for name, line in (("no/such/folder", "no such folder"), (tmp_path / "x", "no such folder"), (tmp_path, "config.json: missing"),
                       ("Some/Model", "Some/Model: no folder here.*ConnectionError")):
        with pytest.raises(UserError, match=line):
            load(name, VOICE)
    if not torch.cuda.is_available():
        with pytest.raises(UserError, match="device cuda: this machine has no such GPU"):
            load(tmp_path, VOICE, "cuda")


def changed(house, folder, **configuration):
    shutil.copytree(house, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **configuration}))
    return folder


def test_models_that_hold_no_conversation(house, tmp_path):
    with pytest.raises(UserError, match="config.json: is of 'qwen2', which answers no sound; give an audio language model.*Qwen2-Audio"):
        load(changed(house, tmp_path / "text", model_type="qwen2"), VOICE, "cpu")
    with pytest.raises(UserError, match="config.json: is of 'ultra', which answers no sound"):
        load(changed(house, tmp_path / "unknown", model_type="ultra"), VOICE, "cpu")
    one, deaf = changed(house, tmp_path / "one"), changed(house, tmp_path / "deaf")
    template = one / "chat_template.jinja"
    template.write_text("{% if messages | length > 2 %}{{ raise_exception('one question only') }}{% endif %}" + template.read_text())
    (one / "model.safetensors").unlink()                                     # told before any weights are read
    with pytest.raises(UserError, match="one: its processor and chat template take no conversation of several recordings .*one question only"):
        load(one, VOICE, "cpu")
    for name in ("processor_config.json", "preprocessor_config.json"):
        (deaf / name).unlink(missing_ok=True)
    with pytest.raises(UserError, match="deaf: processor or tokenizer of this 'qwen2_audio' cannot be used .*feature extractor"):
        load(deaf, VOICE, "cpu")
    words = tokenizer()                                                      # what AutoProcessor gives for a model of text
    words.chat_template = "{% for m in messages %}{{ m.role }}{% endfor %}"
    with pytest.raises(UserError, match="here: its processor.*they make nothing of sound"):
        audio_llm.takes_system(words, "here")


def test_files_that_are_missing_or_broken(house, tmp_path):
    for name, line in (("model.safetensors", "model.safetensors: missing"), ("tokenizer.json", "tokenizer of this 'qwen2_audio' cannot be used")):
        folder = changed(house, tmp_path / name.split(".")[0])
        (folder / name).unlink()
        with pytest.raises(UserError, match=line):
            load(folder, VOICE, "cpu")
    broken = changed(house, tmp_path / "broken")
    (broken / "config.json").write_text("{")
    with pytest.raises(UserError, match="config.json: not readable as JSON"):
        load(broken, VOICE, "cpu")
