"""What must come home from a card:  python -m tests.card_job NAME

The card is a device that has shapes alone, like `meta`, but from which a tensor may come back: torch's fake tensors, on a backend of our own.
A process has its backends for good, and torch asks them about random states and autocast ever after: so this is a process of its own.
"""
import sys
from types import SimpleNamespace

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import backend_registration

from tmlib import dialogue
from tmlib.audio import SpeechConfig
from tmlib.vae import VAEConfig, VideoVAE


def put(net, device):
    """`net.to(device)`, which torch refuses for fake tensors."""
    for module in net.modules():
        for held in (module._parameters, module._buffers):
            for name, x in held.items():
                held[name] = x if x is None else torch.nn.Parameter(x.detach().to(device)) if held is module._parameters else x.to(device)
    return net


def the_codec_gives_back_where_it_was_given(card):
    vae, film = put(VideoVAE(VAEConfig(patch=4, encoder=(8, 8), decoder=(8, 8), blocks=1, kernel_f=3)), card), torch.randn(1, 3, 9, 16, 16)
    z = vae.encode(film)
    video, past = vae.decode(z)
    more, _ = vae.decode(z, past)
    assert [x.device.type for x in (z, video, more, *past)] == ["cpu"] * 3 + ["card"] * len(past)
    assert video.shape == film.shape and vae.decode(z.to(card))[0].device == vae.mean.device
    vae.set_statistics(vae.analyse(film.to(card)))
    assert vae.cost.device == vae.mean.device


def what_a_turn_sounds_like_is_kept_on_the_cpu(card):
    encoder = SimpleNamespace(cfg=SpeechConfig(), tokens=lambda wave, first, n: torch.zeros(n, 12, 8, device=card))
    assert dialogue.heard(encoder, torch.zeros(8000)).device.type == "cpu"


if __name__ == "__main__":
    backend_registration._setup_privateuseone_for_python_backend("card")
    with FakeTensorMode(allow_non_fake_inputs=True):
        globals()[sys.argv[1]](torch.device("card"))
