"""Print what makes a shell complete commands, flags, recipes and models.

    contrastive completion bash >> ~/.bashrc
    contrastive completion zsh >> ~/.zshrc
    contrastive completion fish > ~/.config/fish/completions/contrastive.fish

Print it again after an update: what it completes is as of now.
"""

import contextlib
import io
import re
from dataclasses import dataclass
from importlib import import_module
from typing import Annotated, Literal

from tyro.conf import Positional, arg

from contrastive.config import RECIPES, parse
from contrastive.entry import COMMANDS, home_of
from contrastive.evaluate.tasks import TASKS
from contrastive.interop.export import FORMATS
from contrastive.models import list_models
from contrastive.models.presets import SIZE_NAMES

_BASH = """\
_contrastive() {
    local word="${COMP_WORDS[COMP_CWORD]}" before="${COMP_WORDS[COMP_CWORD-1]}" command="${COMP_WORDS[1]}" words
    case "$command:$before" in
%(values)s
        *) case "$command" in
%(cases)s
            *) words="%(commands)s" ;;
        esac ;;
    esac
    [[ $COMP_CWORD -eq 1 ]] && words="%(commands)s"
    COMPREPLY=($(compgen -W "$words" -- "$word"))
}
complete -o default -F _contrastive contrastive
"""


@dataclass(frozen=True)
class CompletionOptions:
    """For which shell."""

    shell: Annotated[Positional[Literal["bash", "zsh", "fish"]], arg(metavar="SHELL")]
    """bash, zsh or fish."""


def flags_of_command(name: str) -> dict[str, list[str] | None]:
    """Return the flags that the command's --help-all shows, and of each the values it names.

    None: it is a switch; []: anything, or a file.
    """
    shown = io.StringIO()
    with contextlib.redirect_stdout(shown), contextlib.suppress(SystemExit):
        import_module(home_of(name)).main(["--help-all"])
    flags: dict[str, list[str] | None] = {"--help": None, "--help-all": None}
    for flag, value in re.findall(r"^  (--[\w.-]+) ?(\S*)", shown.getvalue(), re.M):
        flags[flag] = value.split("|") if re.fullmatch(r"[a-z\d_]+(\|[a-z\d_]+)+", value) else [] if value else None
    for short, long in re.findall(r"(--[\w-]+):\s(--[\w.-]+)", shown.getvalue()):
        flags[short] = flags.get(long, [])
    known = {"--config": [file.stem for file in RECIPES.glob("*.yaml")], "--task": TASKS.names(), "--to": FORMATS}
    known["--model"] = [*SIZE_NAMES] if name == "classifier" else list_models()
    return dict(sorted((flag, sorted(known.get(flag, ())) or values) for flag, values in flags.items()))


def main(args: list[str]) -> None:
    shell = parse(CompletionOptions, args, prog="completion", description=__doc__).shell
    flags = {name: flags_of_command(name) for name in COMMANDS if name != "completion"}
    if shell == "fish":
        print(f"complete -c contrastive -n __fish_use_subcommand -f -a '{' '.join(COMMANDS)}'")
        for name, words in flags.items():
            for word, values in words.items():
                told = f" -x -a '{' '.join(values)}'" if values else "" if values is None else " -r"
                print(f"complete -c contrastive -n '__fish_seen_subcommand_from {name}' -l {word[2:]}{told}")
        return
    values = "\n".join(
        f'        {name}:{flag}) words="{" ".join(values)}" ;;'
        for name, words in flags.items()
        for flag, values in words.items()
        if values is not None
    )
    cases = "\n".join(f'            {name}) words="{" ".join(words)}" ;;' for name, words in flags.items())
    words = {"values": values, "commands": " ".join(COMMANDS), "cases": cases}
    print(("autoload -U +X bashcompinit && bashcompinit\n" if shell == "zsh" else "") + _BASH % words, end="")
