"""Text and picture conditioning at full size: UMT5 and CLIP speak once, their words are kept on disk, and they are let go.

What is special
- Prompt and reference picture are constant for a stream, so run time needs a few megabytes of memory, not 6 B parameters: a
  stored prompt or picture never loads its encoder, nor the library it comes from. The encoder's files must lie there, for they name what is stored.
- Stored by content: the key is a hash of the prompt or the pixels, of the encoder's files (`hub.fingerprint`) and of the
  number format. Another model, another wording, another picture: another file.
- As Wan was trained: text is 512 tokens, zeros behind the last real one (not what UMT5 says of padding); the picture is CLIP's
  last hidden state but one, class token included, 257 for ViT-H.
- Prompts are cleaned as diffusers does (HTML entities, white space); the mending of broken encodings (ftfy) is left out.
"""
import gc
import hashlib
import html
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from . import config
from .config import UserError, atomic, one_line
from .data import to_uint8
from .hub import find_part, fingerprint, linked, load_part
from .latents import prompt
from .readers import load_readers

TEXT_TOKENS = 512
# What the paper's prompts say is not known; these are ours. The style, if there is one, comes first.
SENTENCES = {"speaking": "A person is talking to the camera.", "listening": "A person is listening to the camera, mouth closed.",
             None: "A person is looking at the camera."}


@dataclass(frozen=True)
class Conditions:
    """What the DiT is told besides sound, whichever encoders say it; the tokens are on the CPU."""
    tokens: Callable[[Tensor], Tensor]           # reference pictures (B, 3, H, W) in [-1, 1] -> (B, tokens, image_dim)
    prompt: Callable[[str | None, str | None, int], Tensor]      # style, mode (speaking, listening), text_dim -> (tokens, text_dim)


def load_conditions(folder, keep: bool = False, device: str | None = None) -> Conditions:
    """Those of a folder of models: the miniature's own, or the pretrained ones that its readers.safetensors links to. keep: the encoder of pictures stays
    loaded, for many of them. device: where pretrained ones run if they must (default: a GPU if there is one)."""
    if not (how := linked(Path(folder) / "readers.safetensors")):
        return Conditions(load_readers(folder)[1].tokens, prompt)
    source, cache, loaded = how["source"], config.SCRATCH / "conditions", {} if keep else None
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")

    def say(style: str | None, mode: str | None, dim: int) -> Tensor:
        tokens = text_tokens(f"{style} style. {SENTENCES[mode]}" if style else SENTENCES[mode], source, cache, device=device)[0]
        if tokens.shape[1] != dim:
            raise UserError(f"{source}: its text tokens are {tokens.shape[1]} wide, the model takes {dim}; set latents.text_dim")
        return tokens
    return Conditions(lambda frames: image_tokens(list(to_uint8(frames[:, :, None])[:, 0]), source, cache, device=device, loaded=loaded), say)


def text_tokens(prompts: str | list[str], source, cache, dtype=torch.bfloat16, device="cpu") -> Tensor:
    """A prompt or several -> text conditions (B, 512, text_dim) on the CPU, from the folder `cache` where they are stored already.

    source: a folder in diffusers' layout (text_encoder/, tokenizer/) or a hub id. dtype, device: where the encoder runs if it must.
    """
    prompts = [prompts] if isinstance(prompts, str) else prompts
    prompts = [" ".join(html.unescape(html.unescape(p)).split()) for p in prompts]
    folder, vocabulary = find_part(source, "text_encoder"), find_part(source, "tokenizer", "tokenizer_config.json")

    def load():
        from transformers import AutoTokenizer, UMT5EncoderModel
        tokenizer = load_small(AutoTokenizer, vocabulary, "tokenizer.json")
        net = load_part(UMT5EncoderModel, folder, dtype, device)

        def encode(prompt: str) -> Tensor:                                    # (tokens, text_dim), real ones only
            x = tokenizer([prompt], truncation=True, max_length=TEXT_TOKENS, return_tensors="pt").to(device)
            return net(x.input_ids, attention_mask=x.attention_mask).last_hidden_state[0]
        return encode

    names = keys("text", [p.encode() for p in prompts], fingerprint(folder, vocabulary), dtype)
    return torch.stack([F.pad(t, (0, 0, 0, TEXT_TOKENS - len(t))) for t in stored(prompts, names, cache, load)])


def image_tokens(images: list[np.ndarray], source, cache, dtype=torch.float32, device="cpu", loaded: dict | None = None) -> Tensor:
    """Pictures, uint8 (H, W, 3) -> image conditions (B, 257, image_dim) on the CPU, from `cache` where they are stored already.

    source: a folder in diffusers' layout (image_encoder/, image_processor/) or a hub id. Any size: CLIP's own preparation follows.
    loaded: where the encoder is kept from one call to the next; without it, each call that needs it loads it and lets it go.
    """
    for image in map(np.asarray, images):
        if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8:
            raise UserError(f"the picture must be uint8 (H, W, 3), got {image.dtype} {image.shape}; read it with media.read_image")
    folder, preparation = find_part(source, "image_encoder"), find_part(source, "image_processor", "preprocessor_config.json")

    def load():
        from PIL import Image
        from transformers import AutoImageProcessor, CLIPVisionModel
        prepare = load_small(AutoImageProcessor, preparation, "preprocessor_config.json", backend="pil")   # same pixels anywhere
        net = load_part(CLIPVisionModel, folder, dtype, device, optional=("position_ids",))

        def encode(image: np.ndarray) -> Tensor:                              # (1 + patches, image_dim)
            pixels = prepare(images=[Image.fromarray(np.asarray(image))], return_tensors="pt").pixel_values     # (1, 3, 224, 224)
            return net(pixels.to(device, net.dtype), output_hidden_states=True).hidden_states[-2][0]
        return encode

    pixels = [f"{i.shape}".encode() + np.ascontiguousarray(i).tobytes() for i in map(np.asarray, images)]
    ready = load if loaded is None else lambda: loaded.get("image") or loaded.setdefault("image", load())
    return torch.stack(stored(images, keys("image", pixels, fingerprint(folder, preparation), dtype), cache, ready))


def keys(kind: str, contents: list[bytes], model: str, dtype) -> list[str]:
    """File names: kind and a hash of content, model and number format."""
    return [f"{kind}-{hashlib.sha256(f'{model} {dtype} '.encode() + c).hexdigest()[:32]}.safetensors" for c in contents]


@torch.no_grad()
def stored(items: list, names: list[str], cache, load) -> list[Tensor]:
    """The tensors kept under `names`; what is not there yet is made by `load()(item)`, by one encoder that is then let go."""
    from safetensors.torch import save_file
    paths, encode = [Path(cache) / name for name in names], None
    for item, path in zip(items, paths):
        if not path.is_file():
            encode = encode or load()
            with atomic(path, every_rank=True) as temporary:         # the same bytes from all; none waits for another
                save_file({"tokens": encode(item).cpu().contiguous()}, temporary)
    if encode is not None:
        del encode
        gc.collect()                             # modules hold themselves in circles
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    return [read_tokens(path) for path in paths]


def read_tokens(path) -> Tensor:
    """One stored condition (tokens, dim), unpadded."""
    from safetensors.torch import load_file
    try:
        return load_file(path)["tokens"]
    except Exception as error:
        raise UserError(f"{path}: not a stored condition ({type(error).__name__}); delete it and run again") from error


def load_small(cls, folder: Path, needs: str, **how):
    """A tokenizer or an image processor; `needs`: the file that it is made of."""
    if not (folder / needs).is_file():
        raise UserError(f"{folder / needs}: missing; copy it there")
    try:
        return cls.from_pretrained(folder, local_files_only=True, **how)
    except Exception as error:
        raise UserError(f"{folder / needs}: cannot be used ({type(error).__name__}: {one_line(error, 200)}); copy {folder.name}/ again") from error
