"""Other libraries' formats: NAME_folder.py is the face of each. What can only be written has neither of the first two.

recognises(folder)            whether it is a folder of the library
load(folder, with_tokenizer)  the Bundle, in eval mode and float32 on the CPU. UserError: a missing or damaged file,
                              weights that do not fit, or what our towers have not, all of it named
write(bundle, folder, place)  fill the existing empty folder, which will lie in `place`; return notes for the user in
                              plain sentences. UserError: what the format cannot express, all of it named
outputs(folder, probe)        what the library makes of the folder; half_outputs: of its files in float16
retarget(folder, source)      of a format that names places: tell the folder where it lies

Here is what their readers ask of options in JSON, which holds anything: whether one is of the kind that it has to be.
"""

import math
from collections.abc import Sequence

from contrastive.errors import UserError


def check(fits: bool, name: str, value: object, wanted: str, mark: str = ":") -> None:
    """Raise UserError where the value of the option `name` does not fit; `mark` stands before what is wanted."""
    if not fits:
        raise UserError(f"{name} is {value!r}{mark} it has to be {wanted}")


def is_count(value: object) -> bool:
    """Whether it is a whole number above 0."""
    return type(value) is int and value > 0


def is_number(value: object) -> bool:
    """Whether it is a finite number; true and false are none."""
    return type(value) in (int, float) and math.isfinite(value)


def is_positive(value: object) -> bool:
    """Whether it is a finite number above 0."""
    return is_number(value) and value > 0


def per_channel(
    name: str, value: float | Sequence[float], wanted: str = "three numbers, one for each channel", mark: str = ";"
) -> tuple[float, ...]:
    """Return a number, or a list of one or three of them, as one for each of three channels; UserError for another."""
    values = value if isinstance(value, (list, tuple)) else [value]
    check(len(values) in (1, 3) and all(map(is_number, values)), name, value, wanted, mark)
    return tuple(map(float, values)) * (3 // len(values))
