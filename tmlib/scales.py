"""Another scale is the same pipeline in a mirror of this tree:  python -m tmlib.scales smoke

`.scales/<name>/` gets the tree's own files, params.yaml with the scale's overlay written into it, and a DVC repository without
git: its own lock, cache and data. So choosing a scale never dirties the git tree, and two scales never touch each
other's results. `make repro SCALE=smoke` calls this, then runs DVC in there.
"""

import filecmp
import io
import os
import shutil
import subprocess
import sys
from pathlib import Path

from . import config


def listing(root: Path) -> list[str]:
    """The tree's files, relative to root: tracked, and untracked but not ignored. Works without git too."""
    if (root / ".git").exists() and shutil.which("git"):
        command = ["git", "-C", str(root), "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode == 0:                    # git refuses a tree that another user owns: walk then
            return sorted({name for name in done.stdout.split("\0") if name and (root / name).is_file()})
    return sorted(_walk(root))


def sources(root: Path) -> list[str]:
    """Those of the tree's files that every scale shares: not what a run makes, nor what each scale keeps for itself."""
    own = ("reports/", ".dvc/", ".scales/", "dvc.lock", "params.yaml")
    return [name for name in listing(root) if not name.startswith(own)]


def _walk(root: Path) -> set[str]:
    from pathspec import GitIgnoreSpec

    ignore = root / ".gitignore"
    spec = GitIgnoreSpec.from_lines(ignore.read_text(encoding="utf-8").splitlines() if ignore.exists() else [])
    names = set()
    for folder, folders, files in os.walk(root):
        inside = Path(folder).relative_to(root)
        folders[:] = [f for f in folders if f != ".git" and not spec.match_file(f"{(inside / f).as_posix()}/")]
        names |= {path for f in files if not spec.match_file(path := (inside / f).as_posix())}
    return names


def commit(root: Path) -> str:
    """The commit that is checked out, "" without git; with "+" where tracked files differ from it."""
    def git(*words):
        return subprocess.run(["git", "-C", str(root), *words], capture_output=True, text=True).stdout.strip()
    if not shutil.which("git"):
        return ""
    return git("rev-parse", "HEAD") + ("+" if git("status", "--porcelain", "--untracked-files=no") else "")


def scaled_params(root: Path, scale: str) -> str:
    """The text of params.yaml at another scale: `scales.<scale>` written over the values (after `<<:` merges, so a section
    changes only where the overlay names it); a null in the overlay removes a key, say one ablation."""
    from ruamel.yaml import YAML

    params = config.read_params(root)
    overlays = params.pop("scales", None) or {}
    if scale not in overlays:
        raise config.UserError(f"params.yaml: no scale `{scale}`; known: {', '.join(['mini', *overlays])}")
    params = config.overlay(params, overlays[scale] or {}, f"scales.{scale}", none_removes=True)
    if "scale" in (params.get("common") or {}):
        params["common"] = {**params["common"], "scale": scale}
    for section in params.values():                 # folders are relative to the tree, and the mirror lies deeper
        for key in ("folder", "pretrained"):
            if isinstance(section, dict) and isinstance(section.get(key), str) and (root / section[key]).is_dir():
                section[key] = str((root / section[key]).resolve())
    yaml = YAML()                                   # the one of ruamel's writers that keeps the order
    yaml.representer.ignore_aliases = lambda _: True
    text = io.StringIO(f"# Written by `make repro SCALE={scale}`; edit ../../params.yaml instead.\n")
    text.seek(0, io.SEEK_END)
    yaml.dump(params, text)
    return text.getvalue()


def mirror(scale: str, root: Path | None = None) -> Path:
    """Bring `.scales/<scale>/` up to date with the working tree and return it: a DVC repository without git, with the scale's
    params.yaml. Only changed files are written, files gone from the tree are removed, its own data and dvc.lock stay."""
    root = root or config.ROOT
    params = scaled_params(root, scale)
    folder = root / ".scales" / scale
    names = sources(root)
    listing = folder / ".mirrored"                  # what the last call put here: the only files this one may remove
    before = listing.read_text(encoding="utf-8").split("\n") if listing.exists() else []
    for name in set(before) - set(names) - {""}:
        (folder / name).unlink(missing_ok=True)
    for name in names:
        _copy_if_changed(root / name, folder / name)
    _write_if_changed(folder / "params.yaml", params.encode())
    settings = root / ".dvc" / "config"
    text = settings.read_text(encoding="utf-8") if settings.exists() else "[core]\n"
    _write_if_changed(folder / ".dvc" / "config", text.replace("[core]", "[core]\n    no_scm = true", 1).encode())
    _write_if_changed(folder / ".commit", commit(root).encode())
    _write_if_changed(listing, "\n".join(names).encode())
    return folder


def _copy_if_changed(source: Path, path: Path) -> None:
    """Piece by piece: whatever a person left in the tree may be larger than memory."""
    if path.is_file() and not path.is_symlink() and filecmp.cmp(source, path, shallow=False):
        return
    with config.atomic(path) as temporary:
        shutil.copyfile(source, temporary)
        temporary.chmod(source.stat().st_mode & 0o777)


def _write_if_changed(path: Path, content: bytes) -> None:
    if not path.is_file() or path.read_bytes() != content:
        with config.atomic(path) as temporary:
            temporary.write_bytes(content)


def main() -> None:
    if len(sys.argv) != 2 or sys.argv[1].startswith("-"):
        raise config.UserError("usage: python -m tmlib.scales SCALE")
    print(mirror(sys.argv[1]))


if __name__ == "__main__":
    config.cli(main)
