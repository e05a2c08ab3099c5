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
from contrastive.models import list_models

_BASH = """\
_contrastive() {
    local word="${COMP_WORDS[COMP_CWORD]}" before="${COMP_WORDS[COMP_CWORD-1]}" command="${COMP_WORDS[1]}" words
    case "$before" in
        --config) words="%(recipes)s" ;;
        --model) words="%(models)s" ;;
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


def flags_of_command(name: str) -> list[str]:
    """Return the flags that the command's --help-all shows."""
    shown = io.StringIO()
    with contextlib.redirect_stdout(shown), contextlib.suppress(SystemExit):
        import_module(home_of(name)).main(["--help-all"])
    flags = re.findall(r"^  (--[\w.-]+)|(--[\w-]+):\s--", shown.getvalue(), re.M)  # and those short for longer ones
    return sorted({*(long or short for long, short in flags), "--help", "--help-all"})


def main(args: list[str]) -> None:
    shell = parse(CompletionOptions, args, prog="completion", description=__doc__).shell
    flags = {name: flags_of_command(name) for name in COMMANDS if name != "completion"}
    flags["completion"] = ["bash", "zsh", "fish"]
    recipes, models = sorted(file.stem for file in RECIPES.glob("*.yaml")), list_models()
    if shell == "fish":
        print(f"complete -c contrastive -n __fish_use_subcommand -f -a '{' '.join(COMMANDS)}'")
        for name, words in flags.items():
            here = f"complete -c contrastive -n '__fish_seen_subcommand_from {name}'"
            for word in words:
                values = {"--config": recipes, "--model": models}.get(word)
                told = f" -x -a '{' '.join(values)}'" if values else ""
                print(f"{here} -l {word[2:]}{told}" if word.startswith("--") else f"{here} -f -a {word}")
        return
    cases = "\n".join(f'            {name}) words="{" ".join(words)}" ;;' for name, words in flags.items())
    words = {"recipes": " ".join(recipes), "models": " ".join(models), "commands": " ".join(COMMANDS), "cases": cases}
    print(("autoload -U +X bashcompinit && bashcompinit\n" if shell == "zsh" else "") + _BASH % words, end="")
