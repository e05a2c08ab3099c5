"""What scripts with argparse share: one line for each mistake, numbers with a minimum, the device."""

import argparse
from collections.abc import Callable, Sequence

from contrastive.errors import UserError, did_you_mean
from contrastive.words import flag_here, flags_of


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, without the usage before it; takes no abbreviated flag."""

    def __init__(self, prog: str, description: str):
        formatter = argparse.RawDescriptionHelpFormatter
        super().__init__(prog=prog, description=description, allow_abbrev=False, formatter_class=formatter)

    def error(self, message: str):
        if message.startswith("unrecognized arguments: "):
            message += "; quote a pattern, or the shell expands it: 'shards/*.tar'"
        raise UserError(message)

    def parse_args(self, args: Sequence[str], namespace: argparse.Namespace | None = None) -> argparse.Namespace:
        """As argparse's, with '_' for '-' in flags too; one of another library is told what it is called here."""
        flags = list(self._option_string_actions)
        known, words = {flag.name for flag in flags_of(flags)}, []
        if foreign := [flag for flag in flags_of(args) if flag.name not in known]:
            hints = [f"unknown flag {flag.typed}.{did_you_mean(flag.typed, flags)}" for flag in foreign]
            meant = [flag_here(flag, known) or hint for flag, hint in zip(foreign, hints, strict=True)]
            raise UserError(f"{' '.join(meant)} See --help")
        for arg, flag in zip(args, flags_of(args), strict=True):
            dashed = "--" + flag.name.replace("_", "-") + arg.removeprefix(flag.typed)
            words.append(dashed if flag.name and flag.name in known else arg)
        return super().parse_args(words, namespace)

    def add_loading(self) -> None:
        """The flags of how images are read and where they are embedded."""
        number = {"metavar": "N"}
        self.add_argument("--batch-size", type=at_least(1), default=256, **number, help="images at once")
        self.add_argument("--workers", type=at_least(0), default=0, **number, help="processes that read images")
        self.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda where there is one")


def at_least(minimum: int) -> Callable[[str], int]:
    """Return what reads a whole number from `minimum` up."""

    def whole_number(text: str) -> int:
        if not text.isdecimal() or int(text) < minimum:
            raise argparse.ArgumentTypeError(f"must be a whole number from {minimum} up, not '{text}'")
        return int(text)

    return whole_number


def chosen_device(asked: str | None) -> str:
    """Return 'cpu' or 'cuda', as asked for or as there is; UserError where there is no such device."""
    import torch

    if asked == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: torch finds no CUDA device here; use --device cpu")
    return asked or ("cuda" if torch.cuda.is_available() else "cpu")
