"""The shape of the repository: what DESIGN promises and what a reader relies on, read from the files themselves."""

import ast
import importlib.metadata
import json
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from ruamel.yaml import YAML

from tmlib import config, scales

ROOT = Path(config.__file__).resolve().parents[1]
MODULES = {path.stem: path for path in sorted((ROOT / "tmlib").glob("*.py")) if path.stem != "__init__"}
NOTEBOOKS = sorted(path for path in (ROOT / "notebooks").rglob("*.ipynb") if ".ipynb_checkpoints" not in path.parts)
PIPELINE = [path for path in NOTEBOOKS if path.parent.name == "notebooks"]

# Who imports whom at the top of a file; everybody may import config. So a new dependency is a decision, seen in this table.
IMPORTS = {
    "config": "", "flow": "", "attention": "", "metrics": "", "media": "", "scales": "", "doctor": "", "shadow": "", "notebook": "shadow",
    "ranks": "", "hub": "", "weights": "hub ranks",
    "speakers": "", "recited": "", "engines": "speakers", "speech": "engines recited speakers", "identity": "", "portrait": "identity", "puppet": "portrait",
    "avatar": "speech identity portrait puppet",
    "layers": "attention", "dit": "attention flow hub layers ranks weights", "vae": "hub", "audio": "hub",
    "losses": "flow", "readers": "hub", "data": "recited speech avatar", "demo": "data scales", "latents": "data ranks vae", "muon": "ranks", "unet": "flow layers vae",
    "chain": "flow", "sound": "", "placement": "", "two_process": "placement",
    "stream": "chain vae attention placement sound", "sampling": "chain flow latents ranks",
    "train": "muon ranks", "pretrain": "chain flow latents losses ranks sampling",
    "distill": "chain latents flow losses ranks sampling train", "evaluate": "data figures latents flow metrics ranks readers sampling wan_vae",
    "wan_vae": "hub vae", "wav2vec": "audio hub", "conditions": "hub data latents readers",
    "faces": "", "footage": "data faces media", "videos": "data faces footage",
    "latency": "chain dit fast flow attention figures metrics placement plan stand_in stream", "capacity": "",
    "robustness": "avatar data speech evaluate metrics sampling latents", "recordings": "avatar media metrics speech", "recite": "dialogue recited recordings speech",
    "figures": "", "measured": "", "drift": "avatar data metrics speech", "scrutiny": "drift metrics",
    "claims": "measured metrics", "report": "claims figures metrics runs", "runs": "claims", "readme": "claims figures report runs", "rivals": "media", "study": "media rivals",
    "kernels": "attention", "fast": "kernels layers", "plan": "attention dit fast layers", "budget": "attention plan scales",
    "stand_in": "attention chain dit fast flow kernels plan weights", "timing": "attention chain fast flow kernels plan stand_in stream",
}
IMPORTS |= {"audio_llm": "hub speech", "dialogue": "hub recited speech", "ear": "", "conversation": "ear", "call": "media talk",
            "rehearsal": "avatar conversation dialogue metrics speech"}
IMPORTS |= {"soak": "latency metrics placement", "faults": "latency talk", "talk": "media", "bench": "attention dit fast kernels plan stand_in timing"}

# Third parties that a bare GPU machine need not have: torch, numpy, safetensors and einops must do for LIGHT.
LIGHT = ["config", "attention", "flow", "layers", "ranks", "hub", "weights", "dit", "chain", "sound", "placement", "two_process", "stream", "kernels", "fast", "plan",
         "stand_in", "timing", "bench"]
HEAVY = ["diffusers", "transformers", "torchaudio", "av", "soundfile", "matplotlib", "papermill", "dvc", "ruamel", "PIL", "piper", "onnx", "ai_edge_litert", "silero_vad", "aiohttp", "aiortc"]


def yaml(name):
    path = ROOT / name
    assert path.is_file(), f"{name} is missing"
    return YAML(typ="safe", pure=True).load(path.read_text(encoding="utf-8"))


def relative(path):
    return Path(path).relative_to(ROOT).as_posix()


# ------------------------------------------------------------------------------------------------ the environment
def test_conda_and_pip_install_the_same():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    conda = yaml("environment.yml")["dependencies"]
    listed = next(item["pip"] for item in conda if isinstance(item, dict))
    assert [line for line in listed if line != "--editable ."] == project["dependencies"] and "--editable ." in listed
    lowest = re.search(r">=(3\.\d+)", project["requires-python"])[1]
    assert any(item.startswith(f"python >={lowest}") for item in conda if isinstance(item, str))


def test_what_is_installed_is_what_is_asked_for():
    from packaging.requirements import Requirement

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wrong = [f"{r} but {found}" for r in map(Requirement, project["dependencies"])
             if not r.specifier.contains(found := importlib.metadata.version(r.name), prereleases=True)]
    assert not wrong


# -------------------------------------------------------------------------------------------------------- imports
def imports(source, top_level=False):
    """The tmlib modules that python source imports: relative or by name; at the top level only, or anywhere."""
    tree = ast.parse(source)
    nodes = tree.body if top_level else ast.walk(tree)
    found = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {name.name.split(".")[1] for name in node.names if name.name.startswith("tmlib.")}
        elif isinstance(node, ast.ImportFrom):
            module = node.module or ""
            if node.level == 0 and module.split(".")[0] != "tmlib":
                continue
            inside = module if node.level else module.partition(".")[2]
            found |= {inside.split(".")[0]} if inside else {name.name for name in node.names}
    return found & (set(MODULES) | set(IMPORTS))


def test_reading_imports():
    source = "from . import a, flow\nfrom .dit import X\nimport tmlib.vae as v, numpy\nfrom tmlib import data\nfrom torch import config\n" \
             "def f():\n    from tmlib.stream import rollout"
    assert imports(source) == {"flow", "dit", "vae", "data", "stream"} and "stream" not in imports(source, top_level=True)


@pytest.mark.parametrize("name", MODULES)
def test_import_rule(name):
    assert name in IMPORTS, f"tmlib/{name}.py is new: say in IMPORTS what it imports"
    found = imports(MODULES[name].read_text(encoding="utf-8"), top_level=True) - {name}
    assert found - {"config"} == set(IMPORTS[name].split())


def test_the_table_of_imports_names_no_module_that_is_gone():
    assert set(IMPORTS) == set(MODULES)


def test_no_import_goes_in_a_circle():
    graph = {name: imports(path.read_text(encoding="utf-8")) - {name} for name, path in MODULES.items()}
    while leaves := {name for name, needs in graph.items() if not needs & set(graph)}:
        graph = {name: needs for name, needs in graph.items() if name not in leaves}
    assert not graph, f"these import each other: {graph}"


def test_the_model_and_the_runtime_need_torch_alone(python):
    names = [name for name in LIGHT if name in MODULES]
    code = f"""
import sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split('.')[0] in {HEAVY}:
            raise ImportError('refused: ' + name)
sys.meta_path.insert(0, Refuse())
import importlib
for name in {names}:
    importlib.import_module('tmlib.' + name)
"""
    done = python("-c", code)
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.parametrize("name", MODULES)
def test_modules_are_short_and_introduced(name):
    text = MODULES[name].read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 350
    assert ast.get_docstring(ast.parse(text)), "a module docstring says what is special"


# ------------------------------------------------------------------------------------------------------ notebooks
def cells(path, kind="code"):
    return [cell for cell in json.loads(path.read_text(encoding="utf-8"))["cells"] if cell["cell_type"] == kind]


def code(path):
    """All code of a notebook as one python source, without IPython's own lines."""
    lines = [line for cell in cells(path) for line in "".join(cell["source"]).splitlines()]
    return "\n".join("" if line.lstrip().startswith(("%", "!")) else line for line in lines)


def test_there_are_notebooks():
    assert PIPELINE and [path.name for path in PIPELINE] == sorted(path.name for path in PIPELINE)
    assert all(re.match(r"\d\d_\w+\.ipynb$", path.name) for path in PIPELINE), "numbered = the order of the pipeline"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_is_thin_and_python3(path):
    made = json.loads(path.read_text(encoding="utf-8"))
    assert made["metadata"]["kernelspec"]["name"] == "python3"
    assert made["cells"][0]["cell_type"] == "markdown", "the first cell says the question, the command and what to expect"
    longest = max(len("".join(cell["source"]).splitlines()) for cell in cells(path))
    assert longest <= 30, f"a cell of {longest} lines belongs in tmlib"
    assert not any(isinstance(node, ast.ClassDef) for node in ast.walk(ast.parse(code(path)))), "classes live in tmlib"


@pytest.mark.parametrize("path", PIPELINE, ids=lambda path: path.stem)
def test_notebook_parameters(path):
    from tmlib import notebook

    known = notebook.parameters(path)
    assert set(known) == {"section", "overrides"} and known["overrides"] == {}
    notebook.check(path, {})


def test_notebooks_are_stripped():
    """With the keys of the Makefile; `make strip` mends it."""
    keys = re.search(r'--extra-keys "([^"]+)"', (ROOT / "Makefile").read_text())[1]
    command = [sys.executable, "-m", "nbstripout", "--verify", "--extra-keys", keys, *map(str, NOTEBOOKS)]
    assert NOTEBOOKS and subprocess.run(command, capture_output=True, text=True).stdout == ""


# ------------------------------------------------------------------------------------------------------- pipeline
def stages():
    """{name: stage} of dvc.yaml, with foreach written out; the ${...} of a stage are item, key and names of params.yaml."""
    params, written = yaml("params.yaml"), {}
    for name, stage in yaml("dvc.yaml")["stages"].items():
        if "foreach" not in stage:
            written[name] = fill(stage, params)
            continue
        items = fill(stage["foreach"], params)
        items = items.items() if isinstance(items, dict) else [(str(item), item) for item in items]
        for key, item in items:
            written[f"{name}@{key}"] = fill(stage["do"], {**params, "key": key, "item": item})
    return written


def fill(node, names):
    if isinstance(node, dict):
        return {fill(key, names): fill(value, names) for key, value in node.items()}
    if isinstance(node, list):
        return [fill(item, names) for item in node]
    if not isinstance(node, str):
        return node
    if whole := re.fullmatch(r"\$\{([^}]+)\}", node):
        return lookup(names, whole[1])
    return re.sub(r"\$\{([^}]+)\}", lambda match: str(lookup(names, match[1])), node)


def lookup(names, dotted):
    for part in dotted.strip().split("."):
        assert isinstance(names, dict) and part in names, f"{dotted}: not in params.yaml"
        names = names[part]
    return names


def named(items):
    """dvc.yaml writes `path` or `{path: settings}`."""
    return [item if isinstance(item, str) else next(iter(item)) for item in items or []]


def wanted_params(stage):
    return {name for item in stage.get("params", []) for name in ([item] if isinstance(item, str) else [])}


def notebook_of(stage):
    """(source, output, section) where the stage runs a notebook, or None."""
    command = stage["cmd"] if isinstance(stage["cmd"], str) else " && ".join(stage["cmd"])
    found = re.search(r"-m tmlib\.notebook (\S+) (\S+)(?: --section (\S+))?", command)
    return found and found.groups()


def test_dvc_reads_the_pipeline(tmp_path):
    assert (ROOT / "dvc.yaml").is_file(), "dvc.yaml is missing"
    for name in ("dvc.yaml", "params.yaml"):
        shutil.copy(ROOT / name, tmp_path / name)
    (tmp_path / ".dvc").mkdir()
    (tmp_path / ".dvc" / "config").write_text("[core]\n    no_scm = true\n    analytics = false\n")
    command = [sys.executable, "-m", "dvc", "stage", "list", "--all", "--name-only"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert sorted(done.stdout.split()) == sorted(stages()), "this file's own reading of dvc.yaml agrees with DVC's"


def test_stages_name_parameters_that_exist():
    params = yaml("params.yaml")
    for name, stage in stages().items():
        for wanted in wanted_params(stage):
            lookup(params, wanted), name


def test_stages_depend_on_all_that_their_notebooks_use():
    """Code: every module a notebook imports, and what those import, anywhere. Values: `common`, and each section it loads."""
    graph = {name: imports(path.read_text(encoding="utf-8")) for name, path in MODULES.items()}
    problems = []
    for name, stage in stages().items():
        if not (found := notebook_of(stage)):
            continue
        source, output, section = found
        needed = imports(code(ROOT / source))
        while more := {used for module in needed for used in graph.get(module, ())} - needed:
            needed |= more
        needed = {source, *(f"tmlib/{module}.py" for module in needed)}
        deps = set(named(stage.get("deps")))
        missing = needed - deps
        from tmlib import notebook

        sections = {section or notebook.parameters(ROOT / source)["section"], "common"}
        sections |= set(re.findall(r"config\.load\(\s*[\"']([\w.]+)[\"']", code(ROOT / source)))
        wanted = wanted_params(stage)
        missing |= {f"params: {s}" for s in sections if not any(s == w or s.startswith(f"{w}.") for w in wanted)}
        if output not in named(stage.get("outs")):
            missing.add(f"outs: {output}")
        if missing:
            problems.append(f"{name} lacks {', '.join(sorted(missing))}")
        if unused := {dep for dep in deps if re.fullmatch(r"tmlib/\w+\.py", dep)} - needed:
            problems.append(f"{name} would run again for {', '.join(sorted(unused))}")
    assert not problems, "\n".join(["dvc.yaml:", *problems])


def test_the_report_depends_on_all_that_was_measured():
    """Or a stage that finds other numbers would leave it as it was."""
    deps = set(named(stages()["report"]["deps"]))
    made = {out for name, stage in stages().items() if name != "report" for out in named(stage.get("outs")) + named(stage.get("metrics")) if re.match(r"reports/(metrics|figures|videos)/", out)}
    absent = {out for out in made if not any(out == dep or out.startswith(f"{dep}/") for dep in deps)}
    assert absent == {out for out in absent if re.match(r"reports/(metrics/per_clip/\w+\.json|figures/ablation_\w+\.png)", out)}, "these alone it does not read, or shows as they are"


def test_every_notebook_of_the_pipeline_is_a_stage():
    run = {found[0] for stage in stages().values() if (found := notebook_of(stage))}
    assert run == {relative(path) for path in PIPELINE}


def test_large_results_are_out_of_gits_sight():
    """DVC edits a .gitignore for any cached output that is not ignored yet: a run would dirty the tree."""
    from pathspec import GitIgnoreSpec

    spec = GitIgnoreSpec.from_lines((ROOT / ".gitignore").read_text().splitlines())
    outs = [out for stage in stages().values() for out in stage.get("outs", [])]
    cached = [out if isinstance(out, str) else next(iter(out)) for out in outs
              if isinstance(out, str) or next(iter(out.values())).get("cache", True)]
    assert cached and [out for out in cached if not spec.match_file(out)] == []


@pytest.mark.parametrize("scale", yaml("params.yaml")["scales"])
def test_scales_fit_the_parameters(scale):
    text = scales.scaled_params(ROOT, scale)
    assert YAML(typ="safe", pure=True).load(text)["common"]["scale"] == scale


# ------------------------------------------------------------------------------------------------------ the files
def texts():
    for name in scales.listing(ROOT):
        data = (ROOT / name).read_bytes()
        if b"\0" not in data[:4096] and len(data) < 5_000_000:
            yield name, data.decode("utf-8", errors="replace")


def test_no_file_knows_this_machine():
    """Paths of somebody's machine, and addresses of package registries, have no place in files that others use."""
    slash = "/"
    private = [rf"{slash}home{slash}\w+", rf"{slash}Users{slash}\w+", rf"(?<![\w.]){slash}root{slash}", rf"(?<![\w.]){slash}work{slash}",
               rf"(?<![\w.]){slash}opt{slash}\w+", rf"C:\\+Users", "py" + r"pi\.org", "python" + r"hosted\.org", r"--(extra-)?index-" + "url",
               "registry" + r"\.npmjs", re.escape(str(ROOT))]
    pattern = re.compile("|".join(private))
    found = [f"{name}: {match[0]}" for name, text in texts() for match in [pattern.search(text)] if match]
    assert not found


def test_nothing_large_in_git():
    size = {name: (ROOT / name).stat().st_size for name in scales.listing(ROOT)}
    large = [name for name in size if size[name] > 2_500_000 and not name.startswith("data/demo/")]
    assert not large, "large files belong to DVC"
    assert sum(n for name, n in size.items() if name.startswith("data/demo/")) <= 20_000_000


def test_ci_runs_the_tests():
    script = ROOT / ".ci" / "run"
    assert "make test" in script.read_text() and script.stat().st_mode & 0o111
    assert "make test" in (ROOT / "README.md").read_text(encoding="utf-8")
