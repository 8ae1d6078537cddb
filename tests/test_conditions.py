"""conditions: what diffusers' pipeline gives, from disk the second time, without an encoder in memory or a library at hand."""
import gc
import json
import shutil
import sys
import weakref

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from tmlib import conditions as c
from tmlib.conditions import image_tokens, read_tokens, text_tokens
from tmlib.config import UserError

WORDS = ["<pad>", "</s>", "<unk>", *("\u2581" + w for w in ("a", "face", "speaking", "listening", "&", "anime"))]      # \u2581: a space
PROMPTS = ["a face speaking", "a anime face listening a anime face", ""]
CLIP_PICTURES = {"crop_size": {"height": 224, "width": 224}, "do_center_crop": True, "do_convert_rgb": True, "do_normalize": True,
                 "do_rescale": True, "do_resize": True, "image_mean": [0.48145466, 0.4578275, 0.40821073], "resample": 3,
                 "image_std": [0.26862954, 0.26130258, 0.27577711], "rescale_factor": 1 / 255, "size": {"shortest_edge": 224},
                 "image_processor_type": "CLIPImageProcessor"}


def save_tokenizer(folder):
    """UMT5's kind, one token a word: pieces with scores, </s> behind them, 0 for padding."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    t = Tokenizer(models.Unigram([(w, -float(i)) for i, w in enumerate(WORDS)], unk_id=2))
    t.pre_tokenizer = pre_tokenizers.Metaspace()
    t.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    t.add_special_tokens(WORDS[:3])
    folder.mkdir()
    t.save(str(folder / "tokenizer.json"))
    names = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "T5TokenizerFast", **names}))


def stirred(net):
    for p in net.parameters():
        p.data.add_(0.1 * torch.randn_like(p))
    return net.eval().requires_grad_(False)


@pytest.fixture(scope="module")
def house(tmp_path_factory):
    """A folder in diffusers' layout with a tiny UMT5 (of Wan's kind: gated GELU) and a tiny CLIP of real proportions in tokens."""
    from transformers import CLIPVisionConfig, CLIPVisionModel, UMT5Config, UMT5EncoderModel
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("wan")
    text = stirred(UMT5EncoderModel(UMT5Config(vocab_size=len(WORDS), d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2,
                                               pad_token_id=0, eos_token_id=1, feed_forward_proj="gated-gelu")))
    image = stirred(CLIPVisionModel(CLIPVisionConfig(hidden_size=16, intermediate_size=24, num_hidden_layers=3, num_attention_heads=2,
                                                     image_size=224, patch_size=14, hidden_act="gelu", projection_dim=8)))
    text.save_pretrained(folder / "text_encoder")
    image.save_pretrained(folder / "image_encoder")
    (folder / "image_processor").mkdir()
    (folder / "image_processor" / "preprocessor_config.json").write_text(json.dumps(CLIP_PICTURES))
    save_tokenizer(folder / "tokenizer")
    return folder


def picture(h=40, w=30, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (h, w, 3), dtype=np.uint8)


def encode(kind, source, cache, **how):
    how = dict(dtype=torch.float32, **how)
    return text_tokens(["a face"], source, cache, **how) if kind == "text" else image_tokens([picture()], source, cache, **how)


# ---- diffusers' numbers ------------------------------------------------------------------------

@pytest.fixture(scope="module")
def pipe(house):
    from diffusers import WanImageToVideoPipeline
    from diffusers.pipelines.wan import pipeline_wan_i2v
    from transformers import AutoImageProcessor, AutoTokenizer, CLIPVisionModel, UMT5EncoderModel
    if not hasattr(pipeline_wan_i2v, "ftfy"):
        pipeline_wan_i2v.ftfy = type("Ftfy", (), {"fix_text": staticmethod(lambda text: text)})          # on sound text it does nothing
    return WanImageToVideoPipeline(
        tokenizer=AutoTokenizer.from_pretrained(house / "tokenizer"), text_encoder=UMT5EncoderModel.from_pretrained(house / "text_encoder"),
        vae=None, scheduler=None, image_encoder=CLIPVisionModel.from_pretrained(house / "image_encoder"),
        image_processor=AutoImageProcessor.from_pretrained(house / "image_processor", backend="pil"))


def test_text_is_that_of_the_pipeline(house, pipe, tmp_path):
    prompts = [*PROMPTS, "  a &amp;amp;  face\n", " ".join(["face speaking"] * 300)]         # entities, white space, far too long
    with torch.no_grad():
        want = pipe._get_t5_prompt_embeds(prompts, max_sequence_length=512, device=torch.device("cpu"))
    got = text_tokens(prompts, house, tmp_path, torch.float32)
    assert got.shape == (5, 512, 16)
    torch.testing.assert_close(got, want, atol=1e-5, rtol=0)
    for tokens, real in zip(got, (4, 8, 1, 4, 512)):
        assert not tokens[real:].any() and (tokens[:real].norm(dim=-1) > 0.1).all()          # words and </s>, then zeros
    assert torch.equal(text_tokens("a face speaking", house, tmp_path, torch.float32), got[:1])


def test_pictures_are_those_of_the_pipeline(house, pipe, tmp_path):
    from PIL import Image
    images = [picture(40, 30), picture(300, 260, 1), picture(224, 224, 2)]
    got = image_tokens(images, house, tmp_path)
    assert got.shape == (3, 257, 16)                                                         # the class, then 16 x 16 patches
    for image, tokens in zip(images, got):
        with torch.no_grad():
            want = pipe.encode_image(Image.fromarray(image), torch.device("cpu"))
        torch.testing.assert_close(tokens[None], want, atol=1e-5, rtol=0)
    assert (got[0] - got[1]).abs().max() > 1e-3


def test_full_size_configurations():
    """UMT5-XXL and ViT-H/14: 4096 wide, and 257 x 1280 from the layer before the last."""
    from transformers import CLIPVisionConfig, CLIPVisionModel, UMT5Config, UMT5EncoderModel
    with torch.device("meta"):
        text = UMT5EncoderModel(UMT5Config(vocab_size=256384, d_model=4096, d_kv=64, d_ff=10240, num_layers=24, num_heads=64,
                                           feed_forward_proj="gated-gelu"))
        image = CLIPVisionModel(CLIPVisionConfig(hidden_size=1280, intermediate_size=5120, num_hidden_layers=32, num_attention_heads=16,
                                                 patch_size=14, hidden_act="gelu", projection_dim=1024))
        states = image(torch.zeros(1, 3, 224, 224), output_hidden_states=True).hidden_states
    assert sum(p.numel() for p in text.parameters()) == 5_680_910_336 and text.config.d_model == 4096
    assert len(states) == 33 and states[-2].shape == (1, 257, 1280)


# ---- kept on disk ------------------------------------------------------------------------------

@pytest.mark.parametrize("kind", ["text", "image"])
def test_the_second_time_needs_no_encoder(house, tmp_path, kind, monkeypatch):
    first = encode(kind, house, tmp_path)
    assert [p.name.split("-")[0] for p in tmp_path.iterdir()] == [kind]
    monkeypatch.setitem(sys.modules, "transformers", None)                                   # not even the library
    assert torch.equal(encode(kind, house, tmp_path), first)
    stored = read_tokens(next(tmp_path.iterdir()))
    assert torch.equal(stored, first[0, :len(stored)]) and not first[0, len(stored):].any()


@pytest.mark.parametrize("kind", ["text", "image"])
def test_the_encoder_is_let_go(house, tmp_path, kind, monkeypatch):
    seen, load_part = [], c.load_part

    def watched(*how, **more):
        net = load_part(*how, **more)
        seen.append(weakref.ref(net))
        return net

    monkeypatch.setattr(c, "load_part", watched)
    encode(kind, house, tmp_path)
    gc.collect()
    assert len(seen) == 1 and seen[0]() is None
    encode(kind, house, tmp_path)
    assert len(seen) == 1                                                                    # loaded once


def test_one_loading_serves_all_that_is_new(house, tmp_path, monkeypatch):
    loads, load_part = [], c.load_part
    monkeypatch.setattr(c, "load_part", lambda cls, *how, **more: loads.append(cls) or load_part(cls, *how, **more))
    text_tokens(PROMPTS[:1], house, tmp_path, torch.float32)
    text_tokens(PROMPTS + PROMPTS[:1], house, tmp_path, torch.float32)
    assert len(loads) == 2 and len(list(tmp_path.iterdir())) == 3


def test_every_difference_has_its_own_file(house, tmp_path):
    """Prompt, number format, model: what changes the tokens changes the key; what does not, does not."""
    other, cache = tmp_path / "other", tmp_path / "cache"
    shutil.copytree(house, other)
    count = lambda: len(list(cache.iterdir()))
    a = text_tokens(["a face"], house, cache, torch.float32)
    text_tokens([" a  face "], other, cache, torch.float32)                                  # the same prompt, a copy of the model
    assert count() == 1
    text_tokens(["a anime"], house, cache, torch.float32), text_tokens(["a face"], house, cache, torch.bfloat16)
    assert count() == 3
    path = other / "text_encoder" / "model.safetensors"
    state = load_file(path)
    save_file({k: v * 1.5 for k, v in state.items()}, path, {"format": "pt"})                # tuned: same names, same sizes
    b = text_tokens(["a face"], other, cache, torch.float32)
    assert count() == 4 and (a - b).abs().max() > 1e-3
    image_tokens([picture(), picture(30, 40), picture()], house, cache)
    assert count() == 6
    how = json.loads((other / "image_processor" / "preprocessor_config.json").read_text())
    (other / "image_processor" / "preprocessor_config.json").write_text(json.dumps({**how, "do_normalize": False}))
    image_tokens([picture()], other, cache)
    assert count() == 7


# ---- files -------------------------------------------------------------------------------------

def test_public_names(house, tmp_path):
    """Files of the hub: CLIP's names have a prefix and an index of positions; UMT5 has its embedding under either name, or both."""
    want = encode("text", house, tmp_path / "a"), encode("image", house, tmp_path / "a")
    named = tmp_path / "named"
    shutil.copytree(house, named)
    path = named / "image_encoder" / "model.safetensors"
    state = {"vision_model." + k.removeprefix("vision_model."): v for k, v in load_file(path).items()}
    save_file({**state, "vision_model.embeddings.position_ids": torch.arange(257)[None]}, path, {"format": "pt"})
    torch.testing.assert_close(encode("image", named, tmp_path / "b"), want[1])
    path = named / "text_encoder" / "model.safetensors"
    state = load_file(path)
    table = next(state.pop(k) for k in ("shared.weight", "encoder.embed_tokens.weight") if k in state)
    for names in (["shared.weight"], ["encoder.embed_tokens.weight"], ["shared.weight", "encoder.embed_tokens.weight"]):
        save_file({**state, **{n: table.clone() for n in names}}, path, {"format": "pt"})
        torch.testing.assert_close(encode("text", named, tmp_path / "-".join(names)), want[0])


def test_sharded_weights(house, tmp_path):
    from transformers import UMT5EncoderModel
    want, parts = encode("text", house, tmp_path / "a"), tmp_path / "parts"
    shutil.copytree(house, parts)
    (parts / "text_encoder" / "model.safetensors").unlink()
    UMT5EncoderModel.from_pretrained(house / "text_encoder").save_pretrained(parts / "text_encoder", max_shard_size="4KB")
    shards = sorted((parts / "text_encoder").glob("model-*.safetensors"))
    assert len(shards) > 2 and torch.equal(encode("text", parts, tmp_path / "b"), want)
    shards[1].unlink()
    with pytest.raises(UserError, match=f"{shards[1].name}: missing"):
        encode("text", parts, tmp_path / "c")


BROKEN = [
    ("text", "text_encoder/model.safetensors", None, "missing"), ("text", "text_encoder/config.json", None, "missing"),
    ("text", "tokenizer/tokenizer.json", None, "missing"), ("text", "tokenizer/tokenizer_config.json", None, "missing"),
    ("text", "text_encoder/model.safetensors", b"x" * 40, "not a complete"), ("text", "tokenizer/tokenizer.json", b"{", "cannot be used"),
    ("text", "text_encoder/config.json", b"{", "not readable as JSON"),
    ("image", "image_encoder/model.safetensors", None, "missing"), ("image", "image_processor/preprocessor_config.json", None, "missing"),
    ("image", "image_processor/preprocessor_config.json", b"{", "cannot be used"),
]


@pytest.mark.parametrize("kind, name, content, match", BROKEN, ids=lambda v: str(v)[:40])
def test_bad_files_say_so_in_a_line(house, tmp_path, kind, name, content, match):
    bad, cache = tmp_path / "bad", tmp_path / "cache"
    shutil.copytree(house, bad)
    (bad / name).unlink() if content is None else (bad / name).write_bytes(content)
    with pytest.raises(UserError, match=match) as caught:
        encode(kind, bad, cache)
    assert str(bad / name) in str(caught.value) and "\n" not in str(caught.value)
    assert not cache.exists() or not list(cache.iterdir())                                   # nothing half-written


def test_weights_of_another_model_are_refused(house, tmp_path):
    bad = tmp_path / "bad"
    shutil.copytree(house, bad)
    for kind, part, value in (("text", "text_encoder", {"num_layers": 3}), ("image", "image_encoder", {"num_hidden_layers": 5})):
        path = bad / part / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **value}))
        with pytest.raises(UserError, match="weights missing, such as") as caught:
            encode(kind, bad, tmp_path / "cache")
        assert str(bad / part) in str(caught.value)


def test_a_broken_store_says_what_to_delete(house, tmp_path):
    encode("text", house, tmp_path)
    path = next(tmp_path.iterdir())
    path.write_bytes(path.read_bytes()[:50])
    with pytest.raises(UserError, match="delete it and run again") as caught:
        encode("text", house, tmp_path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("image", [np.zeros((4, 4), np.uint8), np.zeros((4, 4, 4), np.uint8), np.zeros((4, 4, 3), np.float32)], ids=str)
def test_wrong_pictures_are_refused(house, tmp_path, image):
    with pytest.raises(UserError, match="uint8"):
        image_tokens([image], house, tmp_path)


@pytest.mark.parametrize("lost", ["text_encoder/model.safetensors", "tokenizer/tokenizer.json", "image_encoder/config.json", "image_processor/preprocessor_config.json"])
def test_only_whole_encoders_are_linked_to(house, tmp_path, lost):
    from tmlib.readers import FaceEncoder, LipReader, save_readers
    shutil.copytree(house, tmp_path / "wan")
    (tmp_path / "wan" / lost).unlink()
    with pytest.raises(UserError, match=f"{tmp_path / 'wan' / lost}: missing"):
        save_readers(LipReader(), FaceEncoder(3, 8), tmp_path / "models", str(tmp_path / "wan"))
    assert not (tmp_path / "models").exists()


def test_a_folder_of_models_tells_the_model_what_it_says(house, root, monkeypatch):
    from tmlib.latents import prompt
    from tmlib.readers import FaceEncoder, LipReader, load_readers, save_readers
    lips, face = LipReader().eval(), FaceEncoder(3, 8).eval()
    frames = torch.rand(3, 3, 64, 64) * 2 - 1
    save_readers(lips, face, root)
    told = c.load_conditions(root)
    assert torch.equal(told.tokens(frames), face.tokens(frames)) and torch.equal(told.prompt("flat", "speaking", 8), prompt("flat", "speaking", 8))
    save_readers(lips, face, root, str(house))
    told, loads, load = c.load_conditions(root, keep=True), [], c.load_part
    monkeypatch.setattr(c, "load_part", lambda *how, **more: loads.append(how[0].__name__) or load(*how, **more))
    pictures = ((frames + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()
    want = image_tokens(list(pictures), house, root / "elsewhere")
    loads.clear()
    assert torch.equal(torch.cat([told.tokens(frames[:1]), told.tokens(frames[1:])]), want) and loads == ["CLIPVisionModel"]     # once
    serving = c.load_conditions(root)
    for other in (-frames[:1], -frames[1:2], -frames[:1]):
        serving.tokens(other)
    assert loads == 3 * ["CLIPVisionModel"]                                               # for each new picture, and let go: a DiT needs the room
    assert torch.equal(told.prompt("anime", "speaking", 16), text_tokens(["anime style. " + c.SENTENCES["speaking"]], house, root / "elsewhere")[0])
    assert not torch.equal(told.prompt(None, "listening", 16), told.prompt(None, "speaking", 16))
    with pytest.raises(UserError, match="16 wide, the model takes 8; set latents.text_dim"):
        told.prompt(None, None, 8)
    assert torch.equal(load_readers(root)[1].tokens(frames), face.tokens(frames))         # the ruler lies beside the link
