"""The house's rules: who may import whom, documented names, and nothing in the repository that belongs elsewhere."""

import ast
import os
import re
import subprocess
import sys
from pathlib import Path
from urllib.parse import urlsplit

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "src" / "pointalign"
MODULES = sorted(PACKAGE.rglob("*.py"))

# DESIGN.md, "Who may import whom": for each file or folder of the package, those of ours that its module level imports.
SMALL = {"errors", "config", "progress", "device", "storage"}
DATA = SMALL | {"geometry", "data"}
BOTH = DATA | {"models", "sentence_embedding", "figures"}
RUNS = {"run_folder", "run_loop", "runs", "contrastive", "sharding", "augmentation"}
TRAINING = BOTH | {"alignment", "parts", "recipe_trainer", "training", "released"} | RUNS
MAY_IMPORT = {
    "errors": set(),
    "geometry": {"cpu_geometry", "errors", "kernels"},
    "cpu_geometry": {"errors"},
    "kernels": set(),
    "alignment": {"decoder_blocks", "errors"},
    "decoder_blocks": {"errors"},
    "cuda_graphs": {"decoder_blocks", "errors", "progress"},
    "float8": {"decoder_blocks"},
    "dropout": {"decoder_blocks"},
    "lora_scaling": {"decoder_blocks"},
    "config": {"errors", "conversion"},
    "conversion": {"errors"},
    "progress": {"errors"},
    "device": set(),
    "judge_settings": set(),
    "options": {"errors"},
    "storage": {"errors"},
    "sentence_embedding": {"errors", "models"},
    "figures": {"errors", "geometry", "storage"},
    "models": {"errors", "geometry", "kernels", "models", "storage"},
    "data": DATA,
    "evaluation": BOTH | {"answering", "evaluation", "options", "released", "run_folder", "judge_settings"},
    "answering": BOTH | {"answering", "evaluation", "options"},
    "chat": BOTH | {"answering", "options"},
    "pipelines": BOTH | {"answering", "options"},
    "probing": BOTH | {"answering", "decoder_blocks", "evaluation", "probing"},
    "rendering": BOTH,
    "importers": BOTH | {"importers", "alignment"},  # published checkpoints hold an alignment projector too
    "parts": BOTH,
    "sharding": {"decoder_blocks", "progress"},
    "recipe_trainer": BOTH | {"sharding"},
    "training": BOTH
    | {"alignment", "cuda_graphs", "decoder_blocks", "dropout", "float8", "lora_scaling", "recipe_trainer", "released"},
    "released": {"errors"},
    "augmentation": DATA | {"models"},
    "contrastive": TRAINING,
    "run_folder": SMALL,
    "run_loop": TRAINING,
    "runs": TRAINING,
    "full_size": TRAINING | {"full_size"},
    "bench": SMALL | {"bench", "figures", "run_folder"},
    "sweep": TRAINING | {"conversion", "evaluation", "sweep"},
    "bundle": TRAINING | {"model_card"},
    "model_card": TRAINING | {"evaluation"},
    "recipe_table": TRAINING | {"full_size"},
    # The fronts may import anything, but inside functions, so that `pointalign --help` answers at once.
    "cli": {"", "errors", "config", "verbs"},
    "verbs": {"config", "judge_settings", "options"},
    "__init__": set(),
    "__main__": {"cli"},
}
ANYTHING = {"cli", "verbs", "demo", "quickstart", "quickstart_report"}


def unit(path):
    """The name in MAY_IMPORT that a file stands under."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def names_imported(node):
    """Modules of ours that an import statement names, without the package's own name."""
    if isinstance(node, ast.Import):
        names = [alias.name for alias in node.names]
    elif node.level:
        names = ["pointalign." + (node.module or "relative")]
    elif node.module == "pointalign":
        names = [
            f"pointalign.{alias.name}" if (PACKAGE / f"{alias.name}.py").exists() else "pointalign"
            for alias in node.names
        ]
        names = [
            f"pointalign.{a.name}" if (PACKAGE / a.name).is_dir() else n for a, n in zip(node.names, names, strict=True)
        ]
    else:
        names = [node.module or ""]
    return [name.partition(".")[2] for name in names if name.split(".")[0] == "pointalign"]


def imports(path, everywhere):
    """(line, unit) of ours that a file imports: at module level, or everywhere; never what is for type checkers only."""

    def walk(body):
        for node in body:
            if isinstance(node, (ast.Import, ast.ImportFrom)):
                yield from ((node.lineno, name.split(".")[0]) for name in names_imported(node))
            elif isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
                continue
            elif everywhere or not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
                yield from walk(ast.iter_child_nodes(node))

    return list(walk(ast.parse(path.read_text(encoding="utf-8")).body))


def test_the_reader_of_imports_sees_them(tmp_path):
    path = tmp_path / "x.py"
    path.write_text(
        "import pointalign.training\nfrom pointalign.models.connector import a\nfrom pointalign import alignment, __version__\n"
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import pointalign.demo\ntry:\n    import pointalign.cli\n"
        "finally:\n    pass\ndef f():\n    from pointalign import runs\n"
    )
    top = [(1, "training"), (2, "models"), (3, "alignment"), (3, ""), (8, "cli")]
    assert imports(path, everywhere=False) == top
    assert imports(path, everywhere=True) == [*top, (12, "runs")]


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_who_may_import_whom(path):
    name = unit(path)
    # An import inside a function is an import all the same, except for the fronts.
    found = imports(path, everywhere=name not in ("cli", "verbs"))
    if name not in ANYTHING - {"cli", "verbs"}:
        assert name in MAY_IMPORT, f"{name} has no place in the house yet: say in MAY_IMPORT what it may import"
        wrong = [f"line {line}: {other}" for line, other in found if other not in MAY_IMPORT[name]]
        assert not wrong, f"{path.relative_to(ROOT)} may not import {', '.join(wrong)}"
    if name in ("models", "data", "evaluation", "probing"):
        assert not {other for _, other in imports(path, everywhere=True)} & {"alignment", "training"}


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_modules_and_public_names_have_docstrings(path):
    text = path.read_text(encoding="utf-8")
    if path.name == "__init__.py" and not text.strip():
        return
    tree = ast.parse(text)
    assert ast.get_docstring(tree), f"{path.relative_to(ROOT)} has no docstring"
    definitions = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)

    def public(body, owner=""):
        for node in body:
            if isinstance(node, definitions) and not node.name.startswith("_"):
                # A verb of the command line is documented by its class, a trainer's callback by transformers.
                is_overload = any(ast.unparse(decorator) == "overload" for decorator in node.decorator_list)
                exempt = owner and ((node.name == "run" and unit(path) == "verbs") or node.name.startswith("on_"))
                if not (is_overload or exempt):
                    yield owner + node.name, ast.get_docstring(node)
                if isinstance(node, ast.ClassDef):
                    yield from public(node.body, f"{owner}{node.name}.")

    missing = [name for name, told in public(tree.body) if not told]
    assert not missing, f"{path.relative_to(ROOT)}: no docstring on {', '.join(missing)}"


# The repository's files


@pytest.fixture(scope="module")
def tracked():
    """Files that git tracks or would track."""
    try:
        listed = subprocess.run(
            ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
            cwd=ROOT,
            capture_output=True,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("not a git checkout, so there is no list of tracked files")
    return [path for name in listed.stdout.decode().split("\0") if name and (path := ROOT / name).is_file()]


def text_of(path):
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        return None


def registry_hosts():
    """Hosts of the package indexes that this machine is set up with."""
    run = subprocess.run([sys.executable, "-m", "pip", "config", "list"], capture_output=True, text=True, check=False)
    told = run.stdout + "\n".join(value for name, value in os.environ.items() if "INDEX" in name)
    hosts = {urlsplit(url).hostname for url in re.findall(r"https?://[^\s'\",]+", told)}
    return {host for host in hosts if host}


MACHINE_PATH = re.compile(r"(?<![\w.$}/~-])/(?:" + "|".join(("work", "tmp", "root")) + r")(?:/|\b)(?![\w-]*\()")


def test_the_search_for_machine_paths_finds_them():
    for text in ('"/' + 'tmp/x"', "cd /" + "work", "(/" + "root/a)", "=/" + "tmp"):
        assert MACHINE_PATH.search(text), text
    for text in ("a/" + "work/b", "/" + "workers", "~/" + "tmp", "./" + "root", "and/or", "https://x.org/" + "root"):
        assert not MACHINE_PATH.search(text), text


def test_no_path_of_one_machine(tracked):
    found = [
        f"{path.relative_to(ROOT)}:{number}: {line.strip()[:100]}"
        for path in tracked
        for number, line in enumerate((text_of(path) or "").splitlines(), 1)
        if MACHINE_PATH.search(line)
    ]
    assert not found, "\n".join(found)


def test_no_registry_host(tracked):
    hosts = registry_hosts()
    option = re.compile(r"(?:extra-)?index-" + "url|find-" + r"links")
    found = []
    for path in tracked:
        text = text_of(path) or ""
        if any(host in text for host in hosts) or option.search(text):
            found.append(str(path.relative_to(ROOT)))
    assert not found


def test_no_large_file(tracked):
    large = [
        f"{p.relative_to(ROOT)}: {p.stat().st_size / 2**20:.1f} MiB" for p in tracked if p.stat().st_size > 16 * 2**20
    ]
    assert not large


def test_no_link_leaves_the_repository(tracked):
    outside = [str(p.relative_to(ROOT)) for p in tracked if p.is_symlink() and ROOT not in p.resolve().parents]
    assert not outside


# Importing


def run_python(code):
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=300)
    return done.stdout.split()


def test_importing_is_quick_and_leaves_torch_alone():
    code = (
        "import time; start = time.perf_counter(); import pointalign; print(time.perf_counter() - start); import sys; "
        "print('torch' in sys.modules, 'transformers' in sys.modules, 'numpy' in sys.modules)"
    )
    times = []
    for _ in range(3):  # the machine may be busy: its best time counts
        seconds, *loaded = run_python(code)
        assert loaded == ["False"] * 3
        times.append(float(seconds))
        if min(times) < 0.5:
            break
    assert min(times) < 0.5


def test_answering_leaves_alone_what_only_adapters_and_judges_need():
    code = "import pointalign.answering.files, pointalign.answering.jobs, sys; print(*sys.modules)"
    loaded = set(run_python(code))
    assert "transformers" in loaded
    assert not loaded & {"peft", "scipy.stats", "trimesh", "sklearn", "sentence_transformers", "gradio", "matplotlib"}


def test_the_public_names_are_there():
    import pointalign

    assert sorted(pointalign._HOMES) == sorted(pointalign.__all__)
    for name in pointalign.__all__:
        assert getattr(pointalign, name).__module__ == pointalign._HOMES[name]
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = pointalign.nothing
