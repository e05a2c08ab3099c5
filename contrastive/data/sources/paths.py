"""From a path, a glob or a brace range to the files it names."""

import glob
import os
from collections.abc import Sequence
from pathlib import Path

from contrastive.errors import UserError, did_you_mean


def expand_paths(spec: str) -> list[str]:
    """Return the files that `spec` names: a path, a glob ('train-*.tar', sorted) or braces ('{000..331}.tar').

    Raises:
        UserError: a path that does not exist (with a near name), a glob that matches nothing, or a brace
            range with files missing.
    """
    spec = os.path.expanduser(spec)
    if os.path.exists(spec):
        return [spec]
    patterns = _expand_braces(spec)
    paths, missing = [], []
    for pattern in patterns:
        if os.path.exists(pattern):
            paths.append(pattern)
        elif glob.has_magic(pattern):
            matches = sorted(path for path in glob.glob(pattern, recursive=True) if os.path.isfile(path))
            if not matches:
                raise UserError(f"no file matches '{pattern}'{_where(pattern)}")
            paths.extend(matches)
        else:
            missing.append(pattern)
    if missing and len(patterns) > 1:
        raise UserError(f"{spec}: {len(missing)} of its {len(patterns)} files are missing, first '{missing[0]}'")
    if missing:
        raise UserError(f"no file or folder '{spec}'{_where(spec)}")
    return paths


def short_names(paths: Sequence[str]) -> tuple[str, ...]:
    """Return the base names, or the paths below the common folder where base names repeat."""
    names = tuple(os.path.basename(path) for path in paths)
    if len(set(names)) == len(names):
        return names
    folder = os.path.commonpath([os.path.dirname(os.path.abspath(path)) for path in paths])
    return tuple(os.path.relpath(path, folder) for path in paths)


def _expand_braces(spec: str) -> list[str]:
    from braceexpand import UnbalancedBracesError, braceexpand

    try:
        return list(braceexpand(spec, escape=False))
    except UnbalancedBracesError:
        raise UserError(f"{spec}: a brace is not closed; write a range as '{{00000..00331}}.tar'") from None


def _where(path: str) -> str:
    """Say which part of the path is wrong: the folder, or the name in it."""
    folder = Path(path).parent
    if glob.has_magic(str(folder)):
        return "; check the folder"
    if not folder.is_dir():
        return f": there is no folder '{folder}'"
    return f" in that folder.{did_you_mean(Path(path).name, os.listdir(folder))}"
