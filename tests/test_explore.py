"""Notebooks for people run from top to bottom, the widgets without a browser. Untrained models do. The tour is a stage: test_pipeline runs it."""

import os
import shutil

import pytest

from tmlib import config, talk

NOTEBOOKS = config.ROOT / "notebooks"
PRESS = "for control in controls.values():\n    assert control.value is not None\nbutton.click()"


@pytest.fixture(scope="module")
def house(tmp_path_factory):
    """A root with the committed inputs and a folder of small random models, laid out as `make repro` leaves it."""
    import torch
    from tiny import stir

    from tmlib.audio import SpeechEncoder, save_encoder
    from tmlib.dit import WanDiT
    from tmlib.readers import FaceEncoder, LipReader, save_readers
    from tmlib.vae import VAEConfig, VideoVAE, save_vae
    torch.manual_seed(0)
    root = tmp_path_factory.mktemp("house")
    models, encoder = root / "data" / "models", SpeechEncoder()
    models.mkdir(parents=True)
    for name in ("params.yaml", "data/sentences.txt", "data/voices.yaml"):
        shutil.copy(config.ROOT / name, root / name)
    save_encoder(encoder, models)
    save_readers(LipReader(), FaceEncoder(3), models)
    save_vae(VideoVAE(VAEConfig(encoder=(16, 16, 16), decoder=(16, 16, 16), blocks=1)), models)
    for name in ("teacher", "student"):
        stir(WanDiT.from_variant("smoke", audio_tokens=encoder.tokens_per_latent)).save_pretrained(models / name)
    how = {"steps": 2, "shift": 3.0, "cache": "per_step", "chunk": 3, "size": 64, "face_region": [[1.0] * 4] * 4}
    config.save_json(models / "student" / "stream.json", how)
    return root


def kinds(cells):
    """The kinds of all outputs that are shown; a stream's is its name, an error's its type."""
    return [kind for cell in cells for out in cell.get("outputs", []) for kind in out.get("data") or [out.get("name") or out.output_type]]


@pytest.mark.slow
@pytest.mark.parametrize("name, more, shown", [("masks_and_caches", "", []), ("talk", PRESS, ["image/png", "text/html"])], ids=["masks", "talk"])
def test_explore_without_a_browser(name, more, shown, house, monkeypatch):
    import nbformat
    from nbclient import NotebookClient

    monkeypatch.setenv("TM_ROOT", str(house))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(config.ROOT), os.environ.get("PYTHONPATH", "")]))
    monkeypatch.setenv("JUPYTER_PREFER_ENV_PATH", "1")
    notebook = nbformat.read(NOTEBOOKS / "explore" / f"{name}.ipynb", 4)
    notebook.cells.append(nbformat.v4.new_code_cell(more))
    client = NotebookClient(notebook, kernel_name="python3", timeout=300)
    # Nobody plays the browser: what a press shows, mistakes too, stays with its cell. nbclient, when it does, sends the kernel megabytes
    # while the kernel answers, may not see that answer, and waits for all of `timeout`.
    client.comm_open_handlers = {}
    client.execute()
    assert "image/png" in kinds(notebook.cells) and "application/vnd.jupyter.widget-view+json" in kinds(notebook.cells)
    assert [kind for kind in kinds(notebook.cells[-1:]) if kind != "text/plain"] == shown


def test_the_tours_models_are_those_of_the_command_line():
    source = (NOTEBOOKS / "00_tour.ipynb").read_text(encoding="utf-8")
    assert f"talk.{talk.default_models.__name__}()" in source and f"talk.{talk.load_models.__name__}(" in source
