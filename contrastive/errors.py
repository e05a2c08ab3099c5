"""What the user did wrong, said in one line."""

import difflib
import importlib.util
import re
from collections.abc import Iterable

# What breaks a line or steers a terminal: control characters, separators and directions of Unicode, halves of pairs.
_STEERING = re.compile("[\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
# The extra of pyproject.toml that brings a package which most users do without, by the name that is imported.
EXTRAS = {
    "datasets": "datasets",
    "gradio": "demo",
    "onnx": "export",
    "onnxruntime": "export",
    "onnxscript": "export",
    "pycocoevalcap": "captions",
    "sklearn": "heads",
    "transformers": "transformers",
}
_LONGEST = 4000
_LONGEST_NAME = 200


class UserError(Exception):
    """Bad input: one line that says what is wrong, where, and how to mend it.

    Scripts print the line without a traceback and exit with status 2. Names out of files may be anything: the message
    is made `one_line`.
    """

    def __init__(self, message: str):
        super().__init__(one_line(message))


def one_line(text: str) -> str:
    """Return the text with line ends and control characters written out ('\\n', '\\x1b'), shortened if very long."""
    text = _STEERING.sub(lambda found: found[0].encode("unicode_escape").decode(), text)
    half = _LONGEST // 2
    return text if len(text) <= 2 * half + 5 else f"{text[:half]} ... {text[-half:]}"


def reason_of(error: Exception | str) -> str:
    """Return the first line of what an error says, or its type where it says nothing."""
    return next(iter(str(error).strip().splitlines()), "") or type(error).__name__


def did_you_mean(name: str, choices: Iterable[str]) -> str:
    """Return `" Did you mean 'x'?"` for the closest of `choices`, or an empty string when none is close."""
    if len(name) > _LONGEST_NAME:  # which no choice is, and comparing takes its square
        return ""
    close = difflib.get_close_matches(name, [choice for choice in choices if len(choice) <= _LONGEST_NAME], 1, 0.6)
    return f" Did you mean '{close[0]}'?" if close else ""


def needs(what: str, *packages: str) -> None:
    """Raise UserError, with the extra that brings it, where a package of `EXTRAS` is missing: before it is imported.

    what: for the message, whatever cannot be had without: 'the export to ONNX'.
    """
    for package in packages:
        if importlib.util.find_spec(package) is None:
            how = f"pip install 'contrastive[{EXTRAS[package]}]'"
            raise UserError(f"{what} needs {package}, which is not installed: {how}")
