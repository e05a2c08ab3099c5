"""The code blocks of the README and of docs/: found, run as written, or at least parsed."""

import importlib
import re
import shlex
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
LANGUAGES = ("python", "sh", "yaml", "text")
BLOCK = re.compile(r"^(?:<!-- not run: (?P<why>.+) -->\n)?```(?P<language>.*)\n(?P<code>(?:.*\n)*?)```$", re.MULTILINE)
LAUNCHERS = ("accelerate", "torchrun", "python")
PLAIN = ("ls", "cat", "cp", "mkdir")  # which sh may run
COMMANDS = {"train_classifier": "classifier", "inspect_data": "inspect"}  # scripts of another name
SCRIPTS = ("chaos",)  # that are no commands


@dataclass(frozen=True)
class Block:
    page: Path
    line: int
    language: str
    code: str
    not_run: str | None
    """Why it is not run, as the page says in a comment that is not shown."""

    @property
    def where(self) -> str:
        return f"{self.page.name}:{self.line}"


def blocks(page: Path) -> list[Block]:
    text = page.read_text("utf-8")
    found = []
    for match in BLOCK.finditer(text):
        line = text.count("\n", 0, match.start("language")) + 1
        found.append(Block(page, line, match["language"], match["code"], match["why"]))
    return found


class Stopped(BaseException):
    """A command has read its flags, and is to do no more."""


class Session:
    """One page: a folder, the names that its Python has defined so far, and the variables of its shell."""

    def __init__(self, patch):
        self.patch, self.names, self.modules = patch, {"__name__": "__page__"}, ["__page__"]

    def run(self, block: Block) -> None:
        {"python": self._python, "sh": self._shell, "yaml": self._yaml, "text": lambda block: None}[block.language](
            block
        )

    def _python(self, block: Block) -> None:
        code, named = compile(block.code, block.where, "exec"), _named(block, ".py")
        if named:  # a file of the reader's, which the next ones import or start
            Path(named).write_text(block.code)
            self.modules.append(named.removesuffix(".py"))
            importlib.import_module(self.modules[-1])
        elif block.not_run is None:
            exec(code, self.names)

    def _yaml(self, block: Block) -> None:
        assert isinstance(yaml.safe_load(block.code), dict), block.where
        if named := _named(block, ".yaml"):
            Path(named).write_text(block.code)

    def _shell(self, block: Block) -> None:
        for words in shell_lines(block.code):
            while re.fullmatch(r"[A-Z_]+=.*", words[0]):
                self.patch.setenv(*words.pop(0).split("=", 1))
            try:
                self._command(words, block)
            except SystemExit as end:
                assert not end.code, f"{block.where}: {words} ended with {end.code}"

    def _command(self, words: list[str], block: Block) -> None:
        name, args = command_of(words)
        if name is None:
            assert _is_there(words), f"{block.where}: {words[0]} is not ours, and not known to be there"
            if words[0] in PLAIN and block.not_run is None:
                subprocess.run(words, check=True, stdout=subprocess.DEVNULL)
            return
        module = importlib.import_module(f"contrastive.commands.{name.replace('-', '_')}_command")
        if block.not_run is None:
            assert words[0] not in LAUNCHERS, f"{block.where}: processes are not started here; say why it is not run"
            module.main(args)
        else:
            self._parse_only(module, [word for word in args if word != "..."])

    def _parse_only(self, module, args: list[str]) -> None:
        from contrastive.train import run

        with self.patch.context() as patch:
            for parser in (module, run):
                if hasattr(parser, "parse"):
                    patch.setattr(parser, "parse", _stopping(parser.parse))
            try:
                module.main(args)
            except Stopped:
                return
        raise AssertionError(f"{module.__name__} {args}: no flags were read")


def shell_lines(code: str) -> Iterator[list[str]]:
    """The words of each command: lines joined where they say so, without comments."""
    for line in code.replace("\\\n", " ").splitlines():
        if words := shlex.split(line, comments=True):
            yield words


def command_of(words: list[str]) -> tuple[str | None, list[str]]:
    """Which command of ours a line starts, by itself or by a launcher, with its flags; None: none."""
    if words[0] == "contrastive":
        return words[1], words[2:]
    if words[0] not in LAUNCHERS and words[0] != "sbatch":
        return None, words
    if words[0] == "sbatch":  # scripts/slurm.sh starts pretrain.py
        place = words.index("scripts/slurm.sh")
        return "pretrain", words[place + 1 :]
    for place, word in enumerate(words):
        if word == "contrastive" and words[place - 1] == "-m":
            return words[place + 1], words[place + 2 :]
        if script := re.fullmatch(r"scripts/(\w+)\.py", word):
            assert (ROOT / word).is_file(), f"{word} is not there"
            name = script[1]
            return (None, words) if name in SCRIPTS else (COMMANDS.get(name, name), words[place + 1 :])
    return None, words


def _is_there(words: list[str]) -> bool:
    """Whether what a line without a command of ours names exists: a script, a target of make, a command's entry."""
    if words[0] == "make":
        return all(re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.M) for target in words[1:2])
    files = [word for word in words[1:] if word.endswith(".py")]
    if words[0] in LAUNCHERS:
        return bool(files) and all((ROOT / file).is_file() or Path(file).is_file() for file in files)
    return words[0] in (*PLAIN, "pip", "git", "contrastive-clip-benchmark")


def _named(block: Block, suffix: str) -> str | None:
    """The name of the file that a block is, by its first line."""
    match = re.match(rf"# ([\w-]+{re.escape(suffix)})\n", block.code)
    return match and match[1]


def _stopping(parse):
    def parsed(*args, **kwargs):
        parse(*args, **kwargs)
        raise Stopped

    return parsed
