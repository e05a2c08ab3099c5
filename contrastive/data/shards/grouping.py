"""Which members of a shard make one sample: those that follow each other with one key."""

import re
from collections.abc import Iterator
from dataclasses import dataclass

from contrastive.data.record import FaultCounts
from contrastive.data.shards.tar_members import Member, iter_members
from contrastive.data.sources.beside import count_aside
from contrastive.data.sources.paths import IMAGE_SUFFIXES

ROLES = ("image", "txt", "json", "cls")
IMAGES = tuple(map(str.encode, IMAGE_SUFFIXES))  # the best first
_PLACES = dict.fromkeys(IMAGES, 0) | {role.encode(): place for place, role in enumerate(ROLES) if place}
_META = re.compile(rb"__[^/]*__($|/)")  # not samples, by WebDataset's convention

_Parts = list[tuple[bytes, Member]]  # suffixes, in lower case, and members


@dataclass(slots=True)
class Group:
    """The members of one sample.

    roles: that of each of ROLES, None where there is none. others: those with other suffixes. refusal: why the sample
    cannot be used.
    """

    key: bytes
    roles: list[Member | None]
    others: dict[bytes, Member]
    refusal: str = ""


def group_members(path: str) -> tuple[list[Group], FaultCounts]:
    """Return the samples of a shard in its order, and by reason the members that are read as nothing.

    Raises:
        UserError: a torn or altered shard, by name and offset.
    """
    groups, by_key, left_aside = [], {}, FaultCounts()
    for key, parts in _samples(path, left_aside):
        group = _group_of(key, parts, left_aside)
        if not any(group.roles):
            continue
        # The same key again further on: nobody can tell which members belong together.
        if key in by_key:
            by_key[key].refusal = group.refusal = "duplicate_member"
        by_key[key] = group
        groups.append(group)
    return groups, left_aside


def _group_of(key: bytes, parts: _Parts, left_aside: FaultCounts) -> Group:
    group, image_suffix = Group(key, [None] * len(ROLES), {}), b""
    for suffix, member in parts:
        place = _PLACES.get(suffix)
        if place is None:
            count_aside(left_aside, f".{shown(suffix)}", shown(member.name))
            if member.is_file:
                group.others.setdefault(suffix, member)
            continue
        if not member.is_file:
            group.refusal = "not_a_file"
        elif b".." in key.split(b"/"):
            group.refusal = "unsafe_name"
        if group.roles[place] is None:
            group.roles[place] = member
        elif place or suffix == image_suffix:
            group.refusal = "duplicate_member"
        else:
            count_aside(left_aside, "second image", shown(member.name))
            if IMAGES.index(suffix) > IMAGES.index(image_suffix):
                continue
            group.roles[0] = member
        image_suffix = image_suffix if place else suffix
    return group


def _samples(path: str, left_aside: FaultCounts) -> Iterator[tuple[bytes, _Parts]]:
    """Yield the members of each sample: those that follow each other with one key, as WebDataset has it."""
    last, parts, known = None, [], False
    for member in iter_members(path):
        split = split_key(member.name)
        if split is None:
            count_aside(left_aside, "hidden or without suffix", shown(member.name))
        elif not (b"__" in member.name and _META.match(member.name)):
            key, suffix = split
            if key != last:
                yield from ((last, parts),) if known else _dotted(parts)
                last, parts, known = key, [], False
            parts.append((suffix, member))
            known = known or suffix in _PLACES
    yield from ((last, parts),) if known else _dotted(parts)


def _dotted(parts: _Parts) -> Iterator[tuple[bytes, _Parts]]:
    """Yield members none of which is KEY.jpg, KEY.txt, ... of their common key: there are dots in their own keys.

    'b.v2.jpg' and 'b.v2.txt' are a sample 'b.v2', while 'a.seg.png' beside 'a.jpg' is something more of 'a': a key is
    the shortest name that an image has.
    """
    ends = [suffix.rpartition(b".") for suffix, _ in parts]
    stems = {stem for stem, _, end in ends if end in IMAGES}
    samples: dict[bytes, _Parts] = {}
    for (suffix, member), (stem, _, end) in zip(parts, ends, strict=True):
        words = suffix.split(b".")
        heads = (b".".join(words[:count]) for count in range(1, len(words)))
        head = next((head for head in heads if head in stems), stem if end in _PLACES else b"")
        rest = suffix[len(head) + 1 :] if head else suffix
        # From the name: suffixes are compared in lower case, keys are not.
        samples.setdefault(member.name[: -len(rest) - 1], []).append((rest, member))
    yield from samples.items()


def split_key(name: bytes) -> tuple[bytes, bytes] | None:
    """Split a member's name at the first dot of its base name; None for a name without key or suffix."""
    folder, slash, base = name.rpartition(b"/")
    stem, dot, suffix = base.partition(b".")
    return (folder + slash + stem, suffix.lower()) if stem and dot else None


def shown(name: bytes) -> str:
    return name.decode("utf-8", "backslashreplace")
