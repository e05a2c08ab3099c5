"""`contrastive NAME`: found, helped, refused; the same by the scripts that launchers start."""

import importlib
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import contrastive
from contrastive import entry
from contrastive.config import RECIPES, recipe
from contrastive.entry import COMMANDS
from contrastive.errors import UserError

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = {"classifier": "train_classifier", "inspect": "inspect_data"}
NEEDS_NOTHING = {"pretrain", "classifier", "plan"}


@pytest.fixture
def call(monkeypatch, capsys):
    """Run `contrastive WORDS` here; return the exit status, and what it printed."""

    def run(*words, program="contrastive"):
        monkeypatch.setattr(sys, "argv", [program, *words])
        status = 0
        try:
            entry.main()
        except SystemExit as end:
            status = end.code or 0
        return status, *capsys.readouterr()

    return run


@pytest.mark.parametrize("name", COMMANDS)
def test_help_fits_a_terminal_with_examples_first(name, call):
    status, said, _ = call(name, "--help")
    lines = said.splitlines()
    assert status == 0 and len(lines) <= 30 and max(map(len, lines)) <= 80
    assert lines[0].startswith(f"usage: contrastive {name}")
    example = next(place for place, line in enumerate(lines) if line.startswith(("  contrastive", "  accelerate")))
    option = next((place for place, line in enumerate(lines) if line.startswith("  --")), len(lines))
    assert example < option

    status, everything, _ = call(name, "--help-all")
    assert status == 0 and len(everything) > len(said) and max(map(len, everything.splitlines())) <= 100
    for line in lines[option:]:
        assert not line.startswith("  --") or line.split()[0] in everything


@pytest.mark.parametrize("name", COMMANDS)
def test_every_option_says_what_it_does(name, call):
    _, everything, _ = call(name, "--help_all")
    lines = everything.splitlines()
    for line, below in zip(lines, lines[1:] + [""], strict=True):
        if line.startswith("  --"):
            assert len(line.split()) > 2 or below.startswith(" " * 24), line


@pytest.mark.parametrize("name", sorted(COMMANDS.keys() - NEEDS_NOTHING))
def test_without_arguments_it_says_what_is_missing(name, call, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    status, out, said = call(name)
    assert status == 2 and not out and len(said.splitlines()) == 1
    assert said.startswith(f"contrastive {name}: error: ")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", sorted(COMMANDS.keys() - {"completion"}))
def test_each_is_a_script_too(name):
    script = ROOT / "scripts" / f"{SCRIPTS.get(name, name.replace('-', '_'))}.py"
    assert f'run("{name}")' in script.read_text()
    assert callable(importlib.import_module(entry.home_of(name)).main)


def test_help_tells_the_defaults_and_sections_of_commands_that_need_arguments(call):
    assert "--top N               Show the N nearest images to each query [20]" in call("search", "--help")[1]
    assert "--augment.crop_ratio X X" in call("inspect", "--help-all")[1]


def test_the_list_of_commands(call):
    status, said, _ = call("--help")
    lines = said.splitlines()
    assert status == 0 and len(lines) <= 30 and max(map(len, lines)) <= 80
    assert all(any(line.split()[:1] == [name] for line in lines) for name in COMMANDS)
    assert call()[:2] == (2, said)
    assert call("--version")[1] == f"contrastive {contrastive.__version__}\n"


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["pretrin"], "unknown command 'pretrin'. Did you mean 'pretrain'?"),
        (["train"], "unknown command 'train': here it is contrastive pretrain;"),
        (["train-classifier"], "here it is contrastive classifier"),
        (["--loss", "sigmoid"], "the command comes first, then its flags: contrastive pretrain --loss ..."),
        (["zero_shot", "nowhere", "--data", "scenes:test"], "contrastive zero-shot: error: no model at nowhere"),
    ],
)
def test_what_is_no_command(words, told, call):
    status, out, said = call(*words)
    assert status == 2 and not out and len(said.splitlines()) == 1 and told in said


@pytest.mark.parametrize(
    "words",
    [
        "pretrain --data nowhere.csv",
        "pretrain --config nowhere.yaml",
        "pretrain --init nowhere --data digits",
        "finetune nowhere --data digits",
        "classifier --data nowhere/",
        "zero-shot nowhere --data digits:test",
        "evaluate nowhere --suite small",
        "embed nowhere digits out",
        "search nowhere digits photo",
        "curate nowhere digits out --min-score 0",
        "caption nowhere a.jpg",
        "export nowhere out --to onnx",
        "visualize nowhere a.jpg",
        "demo nowhere",
        "inspect nowhere",
        "index nowhere.tar",
        "shard nowhere out",
        "plan --config nowhere",
        "checkpoint list nowhere",
    ],
)
def test_a_wrong_path_is_one_line_and_nothing_is_made(words, call, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    status, out, said = call(*words.split())
    assert status == 2 and not out and not list(tmp_path.iterdir())
    wrong = said.splitlines()[-1]
    assert wrong.startswith(f"contrastive {words.split()[0]}: error: ") and ("nowhere" in wrong or "a.jpg" in wrong)


@pytest.fixture
def usual_ctrl_c():
    """As in a new process, whatever the tests before this one left."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_neither_ctrl_c_nor_a_closed_pipe_leaves_a_traceback(usual_ctrl_c, capsys):
    def interrupted(words):
        raise KeyboardInterrupt

    with pytest.raises(SystemExit) as end:
        entry.run_script("contrastive embed", interrupted, [])
    assert end.value.code == 130 and capsys.readouterr().err == "contrastive embed: interrupted\n"

    def in_an_import(words):
        try:
            signal.raise_signal(signal.SIGINT)
        except KeyboardInterrupt:
            raise ImportError("cannot import name 'dtypes' from a partially initialised numpy") from None

    before = signal.getsignal(signal.SIGINT)
    try:
        with pytest.raises(SystemExit) as end:
            entry.run_script("contrastive embed", in_an_import, [])
        signal.raise_signal(signal.SIGINT)  # while Python ends: too late to be told
    finally:
        signal.signal(signal.SIGINT, before)
    assert end.value.code == 130 and capsys.readouterr().err == "contrastive embed: interrupted\n"
    with pytest.raises(ImportError):
        entry.run_script("contrastive embed", lambda words: exec("import nothing_there"), [])
    assert signal.getsignal(signal.SIGINT) is before
    code = "import sys; sys.argv = ['contrastive', '--help']; from contrastive.entry import main; main()"
    whole = subprocess.run(f'{sys.executable} -c "{code}" | true', shell=True, capture_output=True, text=True)
    assert "Traceback" not in whole.stderr and "Exception" not in whole.stderr


def test_the_command_starts_without_torch():
    code = "import sys; from contrastive import entry; print(entry._help() and 'torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"


def test_recipes_by_name_by_path_and_from_anywhere(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert recipe("cc3m") == recipe("configs/cc3m.yaml") == recipe("cc3m.yaml") == RECIPES / "cc3m.yaml"
    assert recipe("small", "suites") == recipe("configs/suites/small.yaml", "suites")
    (tmp_path / "cc3m.yaml").write_text("seed: 3")
    assert recipe("cc3m.yaml") == Path("cc3m.yaml") and recipe("cc3m") == RECIPES / "cc3m.yaml"
    Path("cc12m").mkdir()  # the data: contrastive pretrain --config cc12m --data 'cc12m/*.tar'
    assert recipe("cc12m") == RECIPES / "cc12m.yaml"
    assert recipe("mine.yaml") == Path("mine.yaml") and recipe("a/cc3m.yaml") == Path("a/cc3m.yaml")
    with pytest.raises(UserError, match="no recipe of that name. Did you mean 'cc3m'"):
        recipe("cc3")
    with pytest.raises(SystemExit):
        recipe("list")
    assert "flickr8k " in capsys.readouterr().out


def complete(script, *words):
    """What bash offers after `contrastive WORDS`."""
    typed = f"COMP_WORDS=(contrastive {' '.join(map(repr, words))}); COMP_CWORD={len(words)}"
    ask = f"{script}\n{typed}; _contrastive; echo ${{COMPREPLY[@]}}"
    done = subprocess.run(["bash", "-c", ask], capture_output=True, text=True, check=True)
    return done.stdout.split()


def test_shells_complete_commands_flags_recipes_and_models(call):
    status, script, _ = call("completion", "bash")
    assert status == 0
    assert complete(script, "zer") == ["zero-shot"] and len(complete(script, "")) == len(COMMANDS)
    assert complete(script, "pretrain", "--schedule.war") == ["--schedule.warmup_steps"]
    assert complete(script, "export", "--") == ["--help", "--help-all", "--private", "--push", "--to"]
    assert complete(script, "plan", "--config", "cc1") == ["cc12m"]
    assert "siglip_vit_b_16" in complete(script, "pretrain", "--model", "siglip_vit_b")
    assert complete(script, "pretrain", "--loss", "") == ["sigmoid", "softmax", "none"]
    assert complete(script, "zero-shot", "m", "--device", "c") == ["cpu", "cuda"]
    assert complete(script, "evaluate", "m", "--task", "retr") == ["retrieval"]
    assert complete(script, "classifier", "--model", "ti") == ["tiny"]
    assert complete(script, "export", "m", "--to", "o") == ["onnx", "open_clip"]
    assert complete(script, "pretrain", "--data", "") == []  # bash then offers files
    assert call("completion", "zsh")[1].endswith(script) and "-l warmup" in call("completion", "fish")[1]
