"""dialogue: held out means held out, scripts make sense, cached = full, and the model learns to answer what it hears."""
import itertools

import numpy as np
import pytest
import torch

from tmlib import audio, dialogue, hub, recited, speech
from tmlib.config import UserError
from tmlib.dialogue import MEMORY, Book, DialogueConfig, DialogueLM, Partner, join_words, same, split_words

WORDS = ["the", "sky", "is", "blue", "red", ".", "!", "hello"]


@pytest.fixture(scope="module")
def book():
    return Book()


@pytest.fixture(scope="module")
def encoder():
    torch.manual_seed(0)
    return audio.SpeechEncoder(audio.SpeechConfig(dim=8, hidden=8, layers=1, mels=16)).eval().requires_grad_(False)


def tiny(words=WORDS, heard=32, **more):
    torch.manual_seed(1)
    return DialogueLM(DialogueConfig(list(words), heard, **{"width": 32, "layers": 2, "heads": 2, **more})).eval()


def sounds(n, seed=0, size=32):
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(int(torch.randint(3, 9, (), generator=g)), size, generator=g) for _ in range(n)]


# ------------------------------------------------------------------------------------------------------------------ Book
def test_of_every_fact_one_way_of_asking_is_the_tests_and_one_validations(book):
    asked = {split: {e.question for e in book.facts[split]} for split in dialogue.SPLITS}
    answers = {split: {e.answer for e in book.facts[split]} for split in dialogue.SPLITS}
    for a, b in itertools.combinations(dialogue.SPLITS, 2):
        assert not asked[a] & asked[b] and answers[a] == answers[b]
        for some, others in zip(book.tells[a], book.tells[b], strict=True):
            assert not {e.question for _, e in some} & {e.question for _, e in others} and {x for x, _ in some} == {x for x, _ in others}
    assert len(book.facts["test"]) == len(answers["test"]) == len(book.facts["valid"])


@pytest.mark.parametrize("n", [3, 4, 10])
def test_other_ways_are_held_out_for_each_thing(n):
    asks = [f"{{x}} {k}" for k in range(n)]
    held = [[dialogue._ways(asks, x, split) for split in dialogue.SPLITS] for x in ("coal", "snow", "tea", "salt", "milk", "grass", "blood", "Rome")]
    assert all(sorted(sum(ways, [])) == asks and len(ways[1]) == len(ways[2]) == 1 for ways in held)
    assert all(len({ways[k][0] for ways in held}) > 1 for k in (1, 2)), "not always the same way of asking"


def test_no_question_has_two_answers(book):
    for split in dialogue.SPLITS:
        asked = [(e.question, e.answer) for e in book.facts[split] + book.small_talk]
        assert len(dict(asked)) == len(set(asked)) == len(asked)


def test_every_word_is_known_and_comes_back(book):
    words = set(book.words())
    rng = np.random.default_rng(0)
    for split in dialogue.SPLITS:
        for e in (e for _ in range(100) for e in book.script(rng, split, 4)):
            assert set(split_words(e.answer)) <= words
            assert same(join_words(split_words(e.answer)), e.answer) and join_words(split_words(e.answer))[0].isupper()
    assert join_words(["hello", "!", "it", "is", ",", "well", ",", "good", "."]) == "Hello! It is, well, good."
    assert split_words("I know Anna. Is it so?") == ["I", "know", "Anna", ".", "is", "it", "so", "?"] and split_words("Nice to") == ["nice", "to"]
    assert not same("The sky is blue.", "The sky is red.")


def test_scripts_make_sense(book):
    rng, seen = np.random.default_rng(1), set()
    rows = book.remember
    for _ in range(200):
        told, last = [None] * len(rows), "I have not said anything yet."
        for i, e in enumerate(book.script(rng, "train", 10)):
            seen.add(e.kind)
            if e.kind == "tell":
                k = next(k for k, some in enumerate(book.tells["train"]) if e in [x for _, x in some])
                told[k] = i, next(x for x, other in book.tells["train"][k] if other == e)
            if e.kind == "ask":
                k = next(k for k, row in enumerate(rows) if e.question in row["ask"])
                known = told[k] is not None and i - told[k][0] < dialogue.MEMORY              # of exchanges, this one included
                assert e.answer == (rows[k]["answer"].format(x=told[k][1]) if known else rows[k]["unknown"])
                seen.add((told[k] is not None, known))
            if e.kind == "again":
                assert e.answer == last
            last = e.answer
    assert seen == {*dialogue.KINDS, (False, False), (True, True), (True, False)}


def test_what_was_told_is_asked_for(book):
    rng = np.random.default_rng(2)
    asked = [e.answer not in {row["unknown"] for row in book.remember} for _ in range(300) for e in book.script(rng, "train", 4) if e.kind == "ask"]
    assert 0.3 < np.mean(asked) < 0.6, "neither hardly ever nor always known"
    for split in dialogue.SPLITS:
        tells = {e.question: x for some in book.tells[split] for x, e in some}
        for script in (book.recall(rng, split) for _ in range(50)):
            assert [e.kind for e in script] == ["fact", "tell", "fact", "ask"] and tells[script[1].question] in script[3].answer


@pytest.mark.parametrize("text", ["", "facts: 3", "facts: {a: {ask: [x]}}\nremember: {}", "facts: [", "- a"])
def test_a_bad_page_is_named(tmp_path, text):
    (tmp_path / "page.yaml").write_text(text)
    with pytest.raises(UserError, match="page.yaml: facts, remember, small_talk, again and openers are wanted"):
        Book(tmp_path / "page.yaml")
    with pytest.raises(UserError, match="none.yaml"):
        Book(tmp_path / "none.yaml")


def test_every_question_and_answer_can_be_spoken(book):
    voice = speech.load_voices()["test"][0]
    some = [*book.questions("test")[::25], *sorted({e.answer for e in book.facts["test"]})[::20]]
    assert all(len(speech.synthesise(text, voice).wave) > 4000 for text in some)


# ----------------------------------------------------------------------------------------------------------------- model
def test_heard_has_eight_rows_a_second_and_the_context_cut_off(encoder):
    wave = np.random.default_rng(0).standard_normal(20_500).astype(np.float32)
    heard = dialogue.heard(encoder, wave)
    assert heard.shape == (12, 2 * 2 * 8)
    tokens = encoder.tokens(wave, 1, 6)                                       # frames 1 .. 24, two tokens each, a frame of context on either side
    assert torch.equal(heard[0].reshape(4, 8), tokens[0, 2:6]) and torch.equal(heard[5].reshape(4, 8), tokens[2, 6:10])


def test_written_word_by_word_equals_the_whole_sequence():
    lm = tiny()
    heard = sounds(3)
    turns = [(heard[0], [4, 5]), (heard[1], [6]), (heard[2], [])]
    words = list(lm.write(turns))
    assert 0 < len(words) <= dialogue.LONGEST
    x, _ = lm.embed([*turns[:-1], (heard[2], words)])
    with torch.no_grad():
        best = lm.head(lm.blocks(inputs_embeds=x[None]).last_hidden_state[0]).argmax(-1)
    first = len(x) - 1 - len(words)
    assert best[first:first + len(words)].tolist() == words
    assert len(words) == dialogue.LONGEST or best[-1] == lm.ids["<end>"]


def test_a_batch_is_its_rows():
    lm = tiny()
    heard = sounds(4)
    rows = [[(heard[0], [3, 4])], [(heard[1], [5]), (heard[2], [6, 7, 8])], [(heard[3], [])]]
    alone = [lm.loss([row]).item() for row in rows]
    words = [3, 2 + 4, 1]                                                     # each answer's words, and its end
    assert lm.loss(rows).item() == pytest.approx(np.average(alone, weights=words), rel=1e-5)


def test_of_a_broken_off_answer_nothing_after_the_next_word_is_asked_for():
    lm = tiny()
    heard = sounds(2)
    x, wanted = lm.embed([(heard[0], [3, 4, 5], 1), (heard[1], [6])])
    n, m = len(heard[0]), len(heard[1])
    assert wanted.tolist() == [-100] * n + [3, 4] + [-100] * m + [6, lm.ids["<end>"]]
    assert torch.equal(x, lm.embed([(heard[0], [3]), (heard[1], [6])])[0])     # and this is how a conversation remembers it
    assert lm.embed([(heard[0], [3, 4, 5], 0)])[1].tolist() == [-100] * n + [3]


def test_answers_are_broken_off_anywhere_but_at_their_end():
    rng, answer = np.random.default_rng(0), [4, 5, 6]
    assert dialogue.broken_off(answer, 0.0, rng) == (answer,)
    assert {dialogue.broken_off(answer, 1.0, rng)[1] for _ in range(50)} == {0, 1, 2}
    assert 20 < sum(len(dialogue.broken_off(answer, 0.3, rng)) == 2 for _ in range(100)) < 40


def test_it_learns_what_was_asked_and_what_was_said_before():
    """Two sounds with an answer each, and one that asks for the answer before."""
    sky, blood, again = sounds(3, seed=4)
    lm = tiny().train()
    a, b = lm.encode("The sky is blue."), lm.encode("Hello! Red.")
    batch = [[(sky, a), (again, a)], [(blood, b), (again, b)], [(blood, b), (sky, a)], [(sky, a), (blood, b), (again, b)]]
    optimiser = torch.optim.AdamW(lm.parameters(), 5e-3)
    for _ in range(80):
        optimiser.zero_grad()
        lm.loss(batch).backward()
        optimiser.step()
    lm.eval()
    said = lambda *turns: join_words([lm.vocabulary[w] for w in lm.write(list(turns))])
    assert said((sky, [])) == "The sky is blue." and said((blood, [])) == "Hello! Red."
    assert said((sky, a), (again, [])) == "The sky is blue." and said((blood, b), (again, [])) == "Hello! Red."


def test_blurring_leaves_the_bank_alone():
    heard = sounds(1)[0]
    before, rng = heard.clone(), np.random.default_rng(0)
    some = [dialogue.blurred(heard, rng) for _ in range(20)]
    assert torch.equal(heard, before) and any((x == 0).all(1).any() for x in some) and not any(torch.equal(a, b) for a, b in itertools.pairwise(some))


def test_saved_is_loaded(tmp_path):
    lm, heard = tiny(), sounds(1)[0]
    dialogue.save(lm, tmp_path)
    again = dialogue.load(tmp_path)
    assert again.cfg == lm.cfg and list(again.write([(heard, [])])) == list(lm.write([(heard, [])]))
    (tmp_path / "dialogue.safetensors").write_bytes(b"nothing")
    with pytest.raises(UserError, match="dialogue.safetensors is no language model of this project"):
        dialogue.load(tmp_path)
    with pytest.raises(UserError, match="dialogue.safetensors is missing"):
        dialogue.load(tmp_path / "elsewhere")


# --------------------------------------------------------------------------------------------------------------- Partner
class Parrot:
    """A language model that says what it is told to, and notes what it was asked."""

    vocabulary = ["<pad>", "<answer>", "<end>", *WORDS]
    ids = {w: i for i, w in enumerate(vocabulary)}

    def __init__(self, text):
        self.text, self.asked = text, []

    def write(self, turns):
        self.asked.append([(len(heard), list(answer)) for heard, answer in turns])
        for word in split_words(self.text):
            yield self.ids[word]


def test_a_sentence_is_spoken_as_soon_as_it_is_known(encoder):
    lm = Parrot("Hello! The sky is blue.")
    partner = Partner(lm, encoder, speech.load_voices()["test"][0])
    reply = partner.reply(np.zeros(8000, np.float32))
    assert next(reply).text == "Hello!" and len(partner.turns[-1][1]) == 2    # the rest is not even thought of
    assert [u.text for u in reply] == ["The sky is blue."] and len(partner.turns[-1][1]) == 7


def test_partner_remembers_the_last_exchanges_and_what_was_heard_of_them(encoder):
    lm = Parrot("The sky is blue.")
    partner = Partner(lm, encoder, speech.load_voices()["test"][0])
    for n in range(6):
        list(partner.reply(np.zeros(4000 * (n + 1), np.float32)))
        if n == 1:
            partner.cut("The sky")
    assert [len(x) for x in lm.asked] == [1, 2, 3, MEMORY, MEMORY, MEMORY]
    sky = [lm.ids[w] for w in ("the", "sky", "is", "blue", ".")]
    assert lm.asked[2] == [(2, sky), (4, sky[:2]), (6, [])] and lm.asked[-1][0][0] == 6
    partner.forget()
    partner.cut("nothing was said")
    list(partner.reply(np.zeros(4000, np.float32)))
    assert len(lm.asked[-1]) == 1


def test_nothing_to_say_is_no_utterance(encoder):
    assert list(Partner(Parrot("! ."), encoder, speech.load_voices()["test"][0]).reply(np.zeros(4000, np.float32))) == []


def test_a_link_leads_to_the_public_model(tmp_path, monkeypatch, encoder):
    from tmlib import audio_llm
    hub.link(tmp_path / "dialogue.safetensors", "some/model", turns=3)
    monkeypatch.setattr(audio_llm, "load", lambda *a, **k: (a, k))
    assert dialogue.load_partner(tmp_path, encoder, "voice") == (("some/model", "voice"), {"turns": 3, "device": None})
    assert dialogue.load_partner(tmp_path, encoder, "voice", "cuda:1")[1]["device"] == "cuda:1"
    hub.link(tmp_path / "dialogue.safetensors", "some/model", device="cuda:3")               # a link that names one is obeyed
    assert dialogue.load_partner(tmp_path, encoder, "voice", "cuda:1")[1]["device"] == "cuda:3"


def test_the_bank_holds_every_question_by_several_voices(encoder, book, monkeypatch):
    monkeypatch.setattr(Book, "questions", lambda self, split: ["Hello!", "What colour is snow?", "Hello!"])
    rng = np.random.default_rng(0)
    made = dialogue.bank(book, "train", speech.load_voices()["train"], 3, 5, encoder, rng)
    assert {q: len(some) for q, some in made.items()} == {"Hello!": 5, "What colour is snow?": 3}                # small talk has its words for itself
    assert len({tuple(x.flatten()[:8].tolist()) for x in made["Hello!"]}) == 5


def test_a_question_stands_alone_or_shares_its_words_with_others(book):
    alone = set(book.alone())
    for split in ("train", "valid", "test"):
        assert alone < set(book.questions(split))
        assert not alone & {e.question for e in book.facts[split]} and not alone & {e.question for some in book.tells[split] for _, e in some}


def test_a_reciter_speaks_in_the_bank_what_he_has_recited_and_without_an_opener(encoder, book, monkeypatch):
    known = min(set(book.questions("train")) & set(recited.texts("slt")))
    monkeypatch.setattr(Book, "questions", lambda self, split: [known, "Nobody recites this."])
    said = []
    monkeypatch.setattr(speech, "synthesise", lambda text, voice: said.append((text, voice.engine)) or speech.Utterance(np.zeros(8000, np.float32), (), text))
    some = [v for v in speech.reciters() if v.language == "slt"][:3] + speech.load_voices()["train"][:1]
    made = dialogue.bank(book, "train", some, 8, 8, encoder, np.random.default_rng(0))
    assert {q: len(heard) for q, heard in made.items()} == {known: 8, "Nobody recites this.": 8}
    by = {engine: [text for text, other in said if other == engine] for engine in ("recited", "espeak")}
    assert by["recited"] == [known] * 6 and sum(text.endswith("Nobody recites this.") for text in by["espeak"]) == 8
