"""Notebooks for people run from top to bottom: the tour as a stage, the widgets without a browser. Untrained models do."""

import os
import shutil

import pytest

from tmlib import config, talk

NOTEBOOKS = config.ROOT / "notebooks"
RUN = "import sys; from tmlib import notebook; notebook.run(sys.argv[1], sys.argv[2], overrides={'threads': 1})"
PRESS = "for control in controls.values():\n    assert control.value is not None\nbutton.click()\nassert not screen.outputs, screen.outputs"


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


def printed(notebook):
    """All that the cells printed."""
    return "".join(out.text for cell in notebook.cells for out in cell.get("outputs", []) if out.output_type == "stream")


def kinds(notebook):
    """The kinds of all outputs that are shown."""
    return [kind for cell in notebook.cells for out in cell.get("outputs", []) for kind in out.get("data", {})]


@pytest.mark.slow
def test_the_tour_is_a_stage_that_writes_its_copy_alone(house, python):
    import nbformat

    def files():
        return sorted(path.relative_to(house).as_posix() for path in house.rglob("*") if path.is_file() and "scratch" not in path.parts)

    before = files()
    for name in ("one.ipynb", "two.ipynb"):
        done = python("-c", RUN, NOTEBOOKS / "00_tour.ipynb", house / name, TM_ROOT=house)
        assert done.returncode == 0, done.stderr[-2000:]
    assert files() == sorted([*before, "one.ipynb", "two.ipynb"])
    assert (house / "one.ipynb").read_bytes() == (house / "two.ipynb").read_bytes()
    tour = nbformat.read(house / "one.ipynb", 4)
    assert "chunk by chunk equals all at once: True" in printed(tour)
    assert "seven chunks through caches equal one masked clip: True" in printed(tour)
    assert kinds(tour).count("image/png") >= 6 and kinds(tour).count("text/html") == 2      # sound and video


@pytest.mark.slow
@pytest.mark.parametrize("name, more", [("masks_and_caches", ""), ("talk", PRESS)])
def test_explore_without_a_browser(name, more, house, monkeypatch):
    import nbformat
    from nbclient import NotebookClient

    monkeypatch.setenv("TM_ROOT", str(house))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(config.ROOT), os.environ.get("PYTHONPATH", "")]))
    monkeypatch.setenv("JUPYTER_PREFER_ENV_PATH", "1")
    notebook = nbformat.read(NOTEBOOKS / "explore" / f"{name}.ipynb", 4)
    notebook.cells.append(nbformat.v4.new_code_cell(more))
    NotebookClient(notebook, kernel_name="python3", timeout=300).execute()
    assert "image/png" in kinds(notebook) and "application/vnd.jupyter.widget-view+json" in kinds(notebook)


def test_the_tours_models_are_those_of_the_command_line():
    source = (NOTEBOOKS / "00_tour.ipynb").read_text(encoding="utf-8")
    assert f"talk.{talk.default_models.__name__}()" in source and f"talk.{talk.load_models.__name__}(" in source
