"""Mirrors of the tree at another scale: complete, faithful, and out of git's sight."""

import shutil

import pytest

from tmlib import config, scales

PARAMS = """\
common: {seed: 7, scale: mini, fps: 16}
teacher:
  steps: 100
  optim: {muon: 2.5e-3, warmup: 5}
ablations:
  no_dmd: {distill: {dmd: 0}}
  no_audio: {audio: false}
scales:
  smoke:
    teacher: {steps: 3, optim: {warmup: 1}}
    ablations: {no_audio: null}
  wrong: {teacher: {stepz: 3}}
"""


@pytest.fixture
def tree(root, git):
    """A small repository with results of a run of `mini` lying about in it."""
    files = {
        "params.yaml": PARAMS, ".gitignore": "/.scales/\n/data/clips\n__pycache__/\n", ".dvc/config": "[core]\n    autostage = true\n[cache]\n    type = copy\n",
        "dvc.yaml": "stages: {}\n", "dvc.lock": "schema: '2.0'\n", "tmlib/config.py": "x = 1\n", "data/words.txt": "a\n",
        "reports/metrics/teacher.json": "{}", "data/clips/0.bin": "big", "tmlib/__pycache__/config.pyc": "", ".dvc/tmp/lock": "",
    }
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    (root / ".dvc/.gitignore").write_text("/tmp\n/cache\n")
    git(root, "init")
    git(root, "add", ".")
    git(root, "commit", "-m", "all")
    (root / "new.py").write_text("untracked\n")
    return root


EXPECTED = {".gitignore", ".mirrored", ".commit", ".dvc/config", "dvc.yaml", "tmlib/config.py", "data/words.txt", "new.py", "params.yaml"}


def contents(folder):
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def test_mirror_holds_the_sources_and_its_own_parameters(tree, git):
    folder = scales.mirror("smoke", tree)
    assert folder == tree / ".scales" / "smoke" and contents(folder) == EXPECTED
    assert "no_scm = true" in (folder / ".dvc/config").read_text() and "autostage" in (folder / ".dvc/config").read_text()
    params = config.read_params(folder)
    assert params["common"] == {"seed": 7, "scale": "smoke", "fps": 16}
    assert params["teacher"]["steps"] == 3 and params["teacher"]["optim"] == {"muon": 2.5e-3, "warmup": 1}
    assert params["ablations"] == {"no_dmd": {"distill": {"dmd": 0}}} and "scales" not in params
    assert git(tree, "status", "--porcelain").split() == ["??", "new.py"]


def test_mirror_follows_the_tree_and_keeps_its_results(tree):
    folder = scales.mirror("smoke", tree)
    for name in ("dvc.lock", "data/clips/0.bin", "reports/metrics/teacher.json", "new_result.json"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("mine")
    stamp = (folder / "tmlib/config.py").stat().st_mtime_ns
    (tree / "new.py").unlink()
    (tree / "data/words.txt").write_text("b\n")
    assert scales.mirror("smoke", tree) == folder
    assert (folder / "tmlib/config.py").stat().st_mtime_ns == stamp, "an unchanged file was written again"
    assert (folder / "data/words.txt").read_text() == "b\n" and not (folder / "new.py").exists()
    kept = {"dvc.lock", "data/clips/0.bin", "reports/metrics/teacher.json", "new_result.json"}
    assert contents(folder) == EXPECTED - {"new.py"} | kept
    assert all((folder / name).read_text() == "mine" for name in kept)


def test_large_files_are_copied_piece_by_piece(tree, monkeypatch):
    """What somebody left in the tree may be larger than memory: no file of it is read whole."""
    (tree / "new.py").write_bytes(bytes(100_000) + b"end")
    (tree / "new.py").chmod(0o755)
    whole = type(tree).read_bytes
    monkeypatch.setattr(type(tree), "read_bytes", lambda path: pytest.fail(f"{path} was read whole") if path.name == "new.py" else whole(path))
    for end in (b"end", b"END"):
        (tree / "new.py").write_bytes(bytes(100_000) + end)
        made = scales.mirror("smoke", tree) / "new.py"
        assert whole(made) == bytes(100_000) + end and made.stat().st_mode & 0o777 == 0o755


def test_mirror_without_git_is_the_same(tree):
    shutil.rmtree(tree / ".git")
    assert contents(scales.mirror("smoke", tree)) == EXPECTED


@pytest.mark.parametrize("scale, message", [("wrong", "scales.wrong.teacher: unknown parameter `stepz`"), ("huge", "known: mini, smoke")])
def test_mirror_refuses_and_writes_nothing(tree, scale, message):
    with pytest.raises(config.UserError, match=message):
        scales.mirror(scale, tree)
    assert not (tree / ".scales").exists()


def test_overlay_goes_over_merged_sections(root):
    """A section that takes its values from another by `<<:` changes only where the overlay names it."""
    (root / "params.yaml").write_text("a: &a {n: 1}\nb: {<<: *a, m: 2}\nscales: {s: {a: {n: 5}}}\n")
    (root / "params.yaml").write_text(scales.scaled_params(root, "s"))
    assert config.load("a").n == 5 and (config.load("b").n, config.load("b").m) == (1, 2)


def test_folders_are_those_of_the_tree(tree):
    """The mirror lies two folders deeper."""
    (tree / "videos").mkdir()
    text = PARAMS.replace("  steps: 100\n", "  steps: 100\n  folder: videos\n  pretrained: Wan-AI/Some\n")
    (tree / "params.yaml").write_text(text)
    scales.mirror("smoke", tree)
    teacher = config.read_params(tree / ".scales" / "smoke")["teacher"]
    assert teacher["folder"] == str((tree / "videos").resolve()) and teacher["pretrained"] == "Wan-AI/Some"      # a hub id is none


def test_command_line(python, tree):
    done = python("-m", "tmlib.scales", "smoke", TM_ROOT=tree)
    assert done.returncode == 0 and done.stdout.strip() == str(tree / ".scales" / "smoke")
    bad = python("-m", "tmlib.scales", "huge", TM_ROOT=tree)
    assert bad.returncode == 2 and bad.stderr == "error: params.yaml: no scale `huge`; known: mini, smoke, wrong\n"
