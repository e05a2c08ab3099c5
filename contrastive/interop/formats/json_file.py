"""JSON files of model folders."""

import json
from pathlib import Path

from contrastive.errors import UserError


def read_json(file: Path) -> dict:
    """Return the object in a JSON file.

    Raises:
        UserError: no such file, not JSON (torn or not text), or something else than an object.
    """
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{file.parent} has no {file.name}: copy the whole folder again") from None
    except OSError as error:
        raise UserError(f"cannot read {file}: {error.strerror or error}") from None
    except RecursionError:
        raise UserError(
            f"{file} is nested too deeply for JSON: copy the file again from where the model came from"
        ) from None
    except ValueError as error:
        raise UserError(f"{file} is not JSON ({error}): copy the file again from where the model came from") from None
    if not isinstance(content, dict):
        raise UserError(f"{file} does not hold a JSON object: copy the file again from where the model came from")
    return content


def write_json(content: dict, file: Path) -> None:
    """Write an object so that people can read it too."""
    file.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
