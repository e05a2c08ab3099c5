"""Each package imports only packages on lines below its own; those on one line never import each other."""

import ast
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "contrastive"
LAYERS = [
    {"__main__", "commands"},
    {"train"},
    {"evaluate"},
    {"objectives"},
    {"interop"},
    {"visualize"},
    {"data", "losses", "models", "optim"},
    {"distributed"},
    {
        "command_line",
        "config",
        "entry",
        "files",
        "help",
        "log",
        "named_sections",
        "option_types",
        "page",
        "patches",
        "products",
        "registry",
        "results",
    },
    {"errors", "words"},
]
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}
FILES = sorted(path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py")
# What the whole and its parts may measure. Lower them when something went; a change that needs more looks first for
# what it can take away.
MOST_LINES_OF_A_FILE = 350
MOST_FILES, MOST_LINES = 199, 38_720  # of the package
MOST_FILES_TO_TRAIN, MOST_LINES_TO_TRAIN = 71, 12_900  # that `import contrastive.train.pretrain` reads
HEAVY = {"transformers", "open_clip", "datasets", "pyarrow", "pandas", "sklearn", "matplotlib", "onnx", "webdataset"}
HEAVY |= {"gradio"}


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
    assert users == {"launching.py", "runtime.py"}


def test_import_is_quick_and_light():
    code = (
        "import sys, contrastive; contrastive.create_model, contrastive.list_models;"
        f"print(sorted({HEAVY!r} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def lines(path: Path) -> int:
    return len(path.read_text().splitlines())


def test_pretraining_reads_only_what_it_needs():
    code = (
        "import sys, contrastive.train.pretrain as _;"
        "print(*(m.__file__ for name, m in sys.modules.items() if name.split('.')[0] == 'contrastive'), sep='\\n')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    files = [Path(name) for name in done.stdout.split("\n") if name]
    assert len(files) <= MOST_FILES_TO_TRAIN and sum(map(lines, files)) <= MOST_LINES_TO_TRAIN


def test_no_file_is_long_and_the_whole_is_small():
    sizes = {str(path.relative_to(PACKAGE)): lines(path) for path in PACKAGE.rglob("*.py")}
    assert not {name: size for name, size in sizes.items() if size > MOST_LINES_OF_A_FILE}
    assert len(sizes) <= MOST_FILES and sum(sizes.values()) <= MOST_LINES


def test_file_names_occur_once():
    names = Counter(path.name for path in PACKAGE.rglob("*.py") if path.name != "__init__.py")
    assert not sorted(name for name, times in names.items() if times > 1)


def test_class_names_have_one_meaning():
    bodies = (ast.parse(path.read_text()).body for path in FILES)
    names = Counter(node.name for body in bodies for node in body if isinstance(node, ast.ClassDef))
    assert not sorted(name for name, times in names.items() if times > 1)
