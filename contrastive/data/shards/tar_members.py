"""Walk the headers of a tar file, and say so when it is torn or altered; and which members of a shard make one sample.

Python's `tarfile` ends quietly at a damaged header or a missing end: samples would be lost without a word.
Nothing is ever extracted: names are only keys.
"""

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

from contrastive.data.record import FaultCounts
from contrastive.data.sources.beside import count_aside
from contrastive.data.sources.paths import IMAGE_SUFFIXES
from contrastive.errors import UserError

BLOCK = 512
# Writers fill an archive with zeros up to this size (20 blocks); many more zeros are wiped data.
RECORD = 20 * BLOCK
_ZEROS = bytes(BLOCK)
_FILE, _DIRECTORY, _LONG_NAME, _LONG_LINK, _PAX, _PAX_GLOBAL = b"0\07", b"5", b"L", b"K", b"x", b"g"
_NO_BODY = b"123456"  # links, devices, directories, pipes: a size in their header means nothing
_MAX_EXTENSION = 2**20  # long names and pax records are a few hundred bytes

ROLES = ("image", "txt", "json", "cls")
IMAGES = tuple(map(str.encode, IMAGE_SUFFIXES))  # the best first
_PLACES = dict.fromkeys(IMAGES, 0) | {role.encode(): place for place, role in enumerate(ROLES) if place}
_META = re.compile(rb"__[^/]*__($|/)")  # not samples, by WebDataset's convention


class Member(NamedTuple):
    name: bytes
    offset: int  # of its first byte in the archive
    size: int
    is_file: bool  # False: a link, a device, a pipe


class _Torn(Exception):
    """What is wrong with the header; `iter_members` adds where."""


def iter_members(path: str) -> Iterator[Member]:
    """Yield the members of a tar (ustar, pax or GNU), directories left out, reading headers only.

    Raises:
        UserError: naming the archive and the offset: not a tar, cut short, a header whose checksum does not
            match, a member larger than the file, data after the end mark, a wiped tail, sparse members.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))
    except OSError as error:
        raise UserError(f"{path}: cannot be opened ({error.strerror})") from None
    try:
        yield from _walk(path, descriptor, os.fstat(descriptor).st_size)
    finally:
        os.close(descriptor)


def _walk(path: str, descriptor: int, file_size: int) -> Iterator[Member]:
    offset, extension = 0, {}
    while True:
        header = os.pread(descriptor, BLOCK, offset)
        try:
            if header == _ZEROS:
                return _check_end(descriptor, offset, file_size)
            _check_header(header)
            kind = header[156:157]
            size = 0 if kind in _NO_BODY else extension.get("size", _number(header[124:136]))
            body = offset + BLOCK
            if size < 0 or body + size > file_size:
                raise _Torn(f"a member of {size} bytes goes beyond the end of the file ({file_size} bytes)")
            if kind in (_LONG_NAME, _LONG_LINK, _PAX, _PAX_GLOBAL):
                extension |= _read_extension(descriptor, kind, body, size)
            else:
                name = extension.get("path") or _name(header)
                extension = {}
                if kind == b"S":
                    raise _Torn("a sparse member, which has no plain bytes to read")
                if kind != _DIRECTORY and not (kind in _FILE and name.endswith(b"/")):
                    yield Member(name, body, size, kind in _FILE)
        except _Torn as fault:
            raise UserError(_message(path, offset, str(fault), header)) from None
        offset = body + -(-size // BLOCK) * BLOCK


def _message(path: str, offset: int, fault: str, header: bytes) -> str:
    if offset == 0 and header[:2] == b"\x1f\x8b":
        return f"{path} is compressed; unpack it once with gunzip, because samples are read in any order"
    if offset == 0 and header[257:262] != b"ustar":
        return f"{path} is not a tar archive ({fault})"
    return f"{path} is damaged at byte {offset}: {fault}. Copy or write this shard again"


def _check_end(descriptor: int, offset: int, file_size: int) -> None:
    """At a block of zeros: only zeros may follow, at least one block of them and no more than padding."""
    if file_size - offset < 2 * BLOCK:
        raise _Torn("cut off inside the end mark")
    padded = -(-(offset + 2 * BLOCK) // RECORD) * RECORD
    if os.pread(descriptor, 2 * RECORD, offset).strip(b"\0"):
        raise _Torn("zeros where a header should be, with data after them")
    if file_size > padded:
        raise _Torn(f"zeros up to byte {padded} and {file_size - padded} more bytes after the archive's end")


def _check_header(header: bytes) -> None:
    if not header:
        raise _Torn("the file stops without the end mark of a tar")
    if len(header) < BLOCK:
        raise _Torn("cut off inside a header")
    # The checksum counts its own eight bytes as spaces.
    if _number(header[148:156]) != sum(header) - sum(header[148:156]) + 8 * ord(" "):
        raise _Torn("a header whose checksum does not match")


def _number(field: bytes) -> int:
    """Octal digits, or the base-256 form for sizes of 8 GB and more."""
    try:
        return int.from_bytes(field[1:], "big") if field[0] == 0x80 else int(field.strip(b" \0") or b"0", 8)
    except ValueError:
        raise _Torn("a header with a number that is none") from None


def _name(header: bytes) -> bytes:
    name = header[:100].split(b"\0", 1)[0]
    prefix = header[345:500].split(b"\0", 1)[0] if header[257:263] == b"ustar\0" else b""
    return prefix + b"/" + name if prefix else name


def _read_extension(descriptor: int, kind: bytes, offset: int, size: int) -> dict[str, bytes | int]:
    """Return what a GNU or pax extension says about the next member: its 'path', its 'size'."""
    if size > _MAX_EXTENSION:
        raise _Torn(f"an extension header of {size} bytes")
    if kind in (_LONG_LINK, _PAX_GLOBAL):
        return {}
    body = os.pread(descriptor, size, offset)
    if kind == _LONG_NAME:
        return {"path": body.rstrip(b"\0")}
    return _parse_pax(body)


def _parse_pax(body: bytes) -> dict[str, bytes | int]:
    """Records 'LENGTH KEYWORD=VALUE\\n', the length counting all of the record."""
    found, position = {}, 0
    try:
        while position < len(body) and body[position] != 0:
            length = int(body[position : body.index(b" ", position)])
            record = body[position : position + length]
            if length < 5 or not record.endswith(b"\n"):
                raise _Torn("a pax header that cannot be read")
            keyword, _, value = record.split(b" ", 1)[1][:-1].partition(b"=")
            if keyword.startswith(b"GNU.sparse"):
                raise _Torn("a sparse member, which has no plain bytes to read")
            if keyword == b"path":
                found["path"] = value
            elif keyword == b"size":
                found["size"] = int(value)
            position += length
    except (ValueError, IndexError):
        raise _Torn("a pax header that cannot be read") from None
    return found


# The members of one sample: those that follow each other with one key


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
