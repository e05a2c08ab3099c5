"""Sources made of others: captions from class names, other names of the classes, several mixed by weight."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from decimal import Decimal
from itertools import accumulate, pairwise
from typing import TYPE_CHECKING, TypeVar

import numpy as np

from contrastive.data.prompts import fill
from contrastive.data.record import BadSample, Record, Source, Wrapped, check_index, fingerprint_of, part_and_row
from contrastive.errors import UserError

if TYPE_CHECKING:
    from contrastive.data.shards.remote import Wanted

T = TypeVar("T")
_WEIGHT = re.compile(r"(.+)=([-+.\d]*)")
_MAX_SUM = 1_000_000  # positions of a mixture's block, which are shuffled at once


class ClassPrompts(Wrapped):
    """A labelled source whose captions are every template filled with the sample's class name.

    Args:
        source: has `class_names`.
        templates: each with '{}' for the name.

    A sample without a label has no caption.
    """

    def __init__(self, source: Source, templates: tuple[str, ...]):
        super().__init__(source)
        self.templates, self.prompted, self.captioned = templates, True, True
        self._filled = tuple(fill(templates, name) for name in source.class_names)
        given = source.class_names if source.own_names else ()  # names of the data's own are part of the data
        self.fingerprint = fingerprint_of("\n".join((source.fingerprint, *templates, *given)))

    @property
    def stored(self) -> Source:
        return self.source.stored

    def __getitem__(self, index: int) -> Record:
        record = self.source[index]
        captions = self._captions(record.label, record.key)
        group = self.class_names[record.label] if captions else None
        return replace(record, captions=captions, caption_weights=None, caption_group=group)

    def captions(self, index: int) -> tuple[str, ...]:
        return self._captions(self.source.label(index))

    def _captions(self, label: int | None, key: str = "") -> tuple[str, ...]:
        return () if label is None else _of_label(self._filled, label, key)


class Renamed(Wrapped):
    """A labelled source whose classes go by other names, or stand in another order.

    places: the new label of each class of the source; None: labels stay as they are. members: others that change too.
    """

    def __init__(self, source: Source, class_names: tuple[str, ...], places: tuple[int, ...] | None = None, **members):
        super().__init__(source)
        self.class_names = class_names
        self._places, self._members = places, members
        vars(self).update(members)
        if places is not None:
            self.heldout_labels = frozenset(places[label] for label in source.heldout_labels)
            self.fingerprint = fingerprint_of(f"{source.fingerprint} {places}")

    @property
    def stored(self) -> Source:
        return Renamed(self.source.stored, self.class_names, self._places, **self._members) if self.prompted else self

    def __getitem__(self, index: int) -> Record:
        record = self.source[index]
        return replace(record, label=self._placed(record.label, record.key))

    def label(self, index: int) -> int | None:
        return self._placed(self.source.label(index))

    def _placed(self, label: int | None, key: str = "") -> int | None:
        return label if label is None or self._places is None else _of_label(self._places, label, key)


def _of_label(column: Sequence[T], label: int, key: str) -> T:
    """What stands in a column at the place of a label. BadSample where there is no such place."""
    if not 0 <= label < len(column):
        raise BadSample("bad_label", key)
    return column[label]


def as_found(source: Source) -> Source:
    """Return a source without the captions and the class names that `open_source` may have given it."""
    while isinstance(source, ClassPrompts | Renamed):
        source = source.source
    return source


class Mixture(Source):
    """Parts laid end to end, to be visited in proportion to their weights (see MixtureOrder).

    Class names are those of the parts where all have the same; else it has no labels. Keys begin with the name
    of the part.

    Args:
        name: the specification, for messages.
        weights: whole numbers above 0, one a part.

    Raises:
        UserError: the same data twice.
    """

    def __init__(self, name: str, parts: Sequence[Source], weights: Sequence[int]):
        self.name, self._parts, self.weights = name, tuple(parts), tuple(weights)
        names = [part.name for part in parts]
        twice = next((part for place, part in enumerate(names) if part in names[:place]), None)
        if twice is not None:
            raise UserError(f"{name}: '{twice}' is there twice; name it once, with the sum of the weights")
        class_names = {part.class_names for part in parts}
        self.class_names = class_names.pop() if len(class_names) == 1 else None
        own_names = {part.own_names for part in parts}
        self.own_names = own_names.pop() if self.class_names and len(own_names) == 1 else None
        self.fingerprint = fingerprint_of("\n".join(part.fingerprint for part in parts))
        self.remote = any(part.remote for part in parts)
        self._ends = np.cumsum([len(part) for part in parts])

    @property
    def parts(self) -> tuple[Source, ...]:
        return self._parts

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, index: int) -> Record:
        with self._part_of(index) as (part, row):
            record = part[row]
        label = record.label if self.class_names else None
        return replace(record, key=f"{part.name}:{record.key}", label=label)

    def captions(self, index: int) -> tuple[str, ...]:
        with self._part_of(index) as (part, row):
            return part.captions(row)

    def label(self, index: int) -> int | None:
        with self._part_of(index) as (part, row):
            return part.label(row) if self.class_names else None

    def wanted(self, shards: Sequence[tuple[int, int]]) -> list[Wanted]:
        """As Source's, of pairs: the part's number and the shard's in it."""
        return [file for number, shard in shards for file in self._parts[number].wanted([shard])]

    @contextmanager
    def _part_of(self, index: int) -> Iterator[tuple[Source, int]]:
        """Give the part that holds `index`, and the row in it; bad samples found meanwhile are named after the part."""
        number, row = part_and_row(self._ends, check_index(self, index))
        part = self._parts[number]
        try:
            yield part, row
        except BadSample as fault:
            raise BadSample(fault.reason, f"{part.name}:{fault.key}") from fault


def split_mixture(spec: str) -> tuple[list[str], tuple[int, ...]]:
    """Split 'A=2,B=0.5,C' into its specifications and whole weights in lowest terms: (A, B, C) and (4, 1, 2).

    A part without a weight counts 1. Commas inside braces, and a path that exists as it stands, are left whole;
    a lone specification has no weight.

    Raises:
        UserError: an empty part, a weight that is no number above 0, or one with more than three decimals.
    """
    parts = [spec] if _exists(spec) else [part.strip() for part in _split_commas(spec)]
    chain = spec.split("::")
    if len(chain) > 1 and not _exists(spec) and all(".tar" in part for part in chain):
        raise UserError(
            f"'{spec}': '::' joins nothing here: '{{{','.join(chain)}}}' reads all as one, '{','.join(chain)}' draws "
            "from each alike, or by weights, as 'A=2,B=1'"
        )
    if len(parts) == 1:
        return parts, (1,)
    if not all(parts):
        raise UserError(f"'{spec}': there is nothing before or after a comma; separate data sources by one comma")
    named, weights = zip(*map(_split_weight, parts), strict=True)
    divisor = math.gcd(*weights)
    whole = tuple(weight // divisor for weight in weights)
    if sum(whole) > _MAX_SUM:
        raise UserError(f"'{spec}': the weights are {':'.join(map(str, whole))} in lowest terms; use rounder ones")
    return list(named), whole


def _split_commas(spec: str) -> list[str]:
    """Split at the commas outside braces."""
    depths = accumulate((character == "{") - (character == "}") for character in spec)
    commas = [place for place, depth in enumerate(depths) if spec[place] == "," and depth == 0]
    return [spec[begin + 1 : end] for begin, end in pairwise((-1, *commas, len(spec)))]


def _split_weight(part: str) -> tuple[str, int]:
    """Return the specification and a thousand times its weight."""
    found = _WEIGHT.fullmatch(part)
    # 'https://.../a.tar?version=2' says something else.
    in_query = "://" in part and part.partition("?")[2].rpartition("&")[2].count("=") == 1
    if found is None or in_query or _exists(part):
        return part, 1000
    if not re.fullmatch(r"\d+(\.\d{1,3})?|\.\d{1,3}", found[2]) or not Decimal(found[2]):
        raise UserError(
            f"'{part}': weight '{found[2]}' is not a number above 0 with at most three decimals; write '{found[1]}=2'"
        )
    return found[1], int(Decimal(found[2]) * 1000)


def _exists(spec: str) -> bool:
    return os.path.exists(os.path.expanduser(spec))
