"""Each package imports only packages on lines below its own; those on one line never import each other."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "contrastive"
LAYERS = [
    {"train"},
    {"evaluate"},
    {"interop"},
    {"visualize"},
    {"data", "losses", "models", "optim"},
    {"distributed"},
    {"command_line", "config", "files", "log", "option_types", "page", "registry", "results"},
    {"errors"},
]
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}
FILES = sorted(path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py")
HEAVY = {"transformers", "open_clip", "datasets", "pyarrow", "pandas", "sklearn", "matplotlib", "onnx", "webdataset"}


def own_part(path: Path) -> str:
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


def imports(tree: ast.AST):
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            yield node.module


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_down(path):
    part = own_part(path)
    for module in imports(ast.parse(path.read_text())):
        if module.split(".")[0] != "contrastive" or module == "contrastive":
            continue
        other = module.split(".")[1]
        within = {part, other} <= LAYERS[-2]  # single files of one line
        assert other == part or LEVEL[other] > LEVEL[part] or within, f"{path} imports {module}"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_heavy_imports_stay_inside_functions(path):
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            assert not {name.split(".")[0] for name in imports(node)} & HEAVY, f"{path}: {ast.unparse(node)}"


def test_only_the_runtime_touches_accelerate():
    users = {
        path.name
        for path in FILES
        if any(m.split(".")[0] == "accelerate" for m in imports(ast.parse(path.read_text())))
    }
    assert users == {"runtime.py"}


def test_import_is_quick_and_light():
    code = (
        "import sys, contrastive; contrastive.create_model, contrastive.list_models;"
        f"print(sorted({HEAVY!r} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
