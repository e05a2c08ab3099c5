"""Make the index of shards, in parallel, or compare them with it; what is done stays done when it is interrupted."""

import contextlib
import hashlib
import os
import shlex
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from itertools import product

import numpy as np
from filelock import FileLock, Timeout

from contrastive.data.class_sets import CLASS_FILES
from contrastive.data.prompts import TEMPLATES_FILE
from contrastive.data.record import FaultCounts
from contrastive.data.shards.parallel import in_parallel
from contrastive.data.shards.remote import copy_path, download, open_copy
from contrastive.data.shards.shard_index import (
    LARGEST,
    REFUSALS,
    IndexedShard,
    IndexFolder,
    PackedBytes,
    ShardIndex,
    ShardSummary,
    find_shards,
    index_folders,
    load_summary,
    save_index,
)
from contrastive.data.shards.tar_members import BLOCK, IMAGES, ROLES, Group, group_members, shown
from contrastive.data.sources.beside import CAPTION_FIELDS, MAX_TEXT_BYTES, caption_lines, json_fields, same_texts
from contrastive.data.sources.paths import folder_and_name, is_remote
from contrastive.errors import UserError
from contrastive.files import sha256
from contrastive.log import say, warn

_MAX_WORKERS = 16  # more of them wait for the disk or the network
_MOST_OTHERS, _MOST_FIELDS = 16, 100  # that a shard keeps of the suffixes, and of the fields of its JSON


def remote_shards(spec: str, urls: Sequence[str]) -> list[IndexedShard]:
    """Return remote shards. UserError where they have no index: making it fetches them all."""
    shards = find_shards(urls)
    if missing := shards.count(None):
        raise UserError(
            f"{spec}: {missing} of its {len(urls)} shards have no index yet; "
            f"run `contrastive index '{spec}'` once, which downloads every shard "
            "(one of an earlier version has to be made anew)"
        )
    return shards


def index_shards(
    locations: Sequence[str], *, digest: bool, workers: int | None = None, force: bool = False
) -> list[IndexedShard]:
    """Return shards (paths or URLs), indexed where they are not, or have changed since.

    Args:
        digest: have a sha256 of every shard, for which those without are read whole.
        force: index all of them anew, as remote ones that were replaced: their changes are not seen from here.
        workers: processes; None: one a core, 16 at most.

    Raises:
        UserError: names the first shard that is damaged or missing, and says how many are. The others are done.
    """
    fits = partial(_is_current, digest=digest, force=force)
    shards = find_shards(locations, fits)
    if None not in shards:
        return shards
    with _locked(_missing(locations, shards).values()):
        shards = find_shards(locations, fits)  # another process may just have done it
        index = partial(_index_one, fits=fits, digest=digest)
        built = _build(_missing(locations, shards), index, workers)
    return [shard or built[location] for location, shard in zip(locations, shards, strict=True)]


def _is_current(shard: IndexedShard, digest: bool, force: bool) -> bool:
    """Whether an entry is of the shard as it is now. A remote one is compared when it is downloaded."""
    summary = shard.summary
    if force or (digest and summary.sha256 is None) or not os.path.exists(shard.index_path):
        return False
    if is_remote(shard.location):
        return True
    try:
        state = os.stat(shard.location)
    except OSError:
        return False
    return (state.st_size, state.st_mtime_ns) == (summary.size, summary.mtime_ns)


def _missing(locations: Sequence[str], shards: Sequence[IndexedShard | None]) -> dict[str, IndexFolder]:
    """Return, for each location without a shard, the folder that its index is to go to."""
    missing = [location for location, shard in zip(locations, shards, strict=True) if shard is None]
    homes = [folder_and_name(location)[0] for location in missing]
    folders = {home: _writable(index_folders(home)) for home in dict.fromkeys(homes)}
    return {location: folders[home] for location, home in zip(missing, homes, strict=True)}


def _writable(folders: Sequence[IndexFolder]) -> IndexFolder:
    """Return the first index folder that may be written to."""
    for folder in folders[:-1]:
        # Root may write anywhere; a folder without any write bit is meant to stay as it is.
        with contextlib.suppress(OSError):
            if os.stat(folder.shards).st_mode & 0o222:
                os.makedirs(folder.path, exist_ok=True)
                if os.access(folder.path, os.W_OK):
                    return folder
    return folders[-1]


@contextlib.contextmanager
def _locked(folders: Iterable[IndexFolder]) -> Iterator[None]:
    """Hold the locks of all index folders that will be written."""
    with contextlib.ExitStack() as stack:
        # Sorted: two processes that took the same locks in another order would wait for each other for ever.
        for path in sorted({folder.path for folder in folders}):
            os.makedirs(path, exist_ok=True)
            lock = FileLock(os.path.join(path, "lock"))
            try:
                lock.acquire(timeout=2)
            except OSError as error:
                raise UserError(f"{path}: cannot be locked ({error.strerror}); delete it and index again") from None
            except Timeout:
                say(f"waiting for another process, which indexes shards into {path}")
                lock.acquire()
            stack.callback(lock.release)
        yield


def _build(missing: dict[str, IndexFolder], index: Callable, workers: int | None) -> dict[str, IndexedShard]:
    """Index the shards and return them by the location that was asked for.

    Whatever ends this early, the shards that are done are added to their manifests.
    """
    built, faults, rows = {}, [], defaultdict(dict)
    jobs = list(missing.items())
    try:
        for (location, folder), shard in in_parallel("indexing shards", index, jobs, workers, most=_MAX_WORKERS):
            if isinstance(shard, str):
                faults.append(shard)
            else:
                built[location] = shard
                rows[folder][folder_and_name(location)[1]] = shard.summary
    finally:
        for folder, own in rows.items():
            folder.add(own)
            if is_remote(folder.shards) and any(row.labels or row.label_names for row in own.values()):
                _fetch_class_names(folder)
    _raise_first(faults, "cannot be indexed either")
    return built


def _index_one(job: tuple[str, IndexFolder], fits: Callable[[IndexedShard], bool], digest: bool) -> IndexedShard | str:
    """Index one shard and store that. What the user can mend comes back as the message."""
    asked, folder = job
    _, name = folder_and_name(asked)
    location, path = folder.location(name), folder.index_path(name)
    # An interrupted build leaves indexes that are in no manifest yet.
    summary = load_summary(path)
    if summary is None or not fits(folder.shard(name, summary)):
        try:
            index, summary = (_index_copy if is_remote(location) else index_shard)(location, digest)
            save_index(path, index, summary)
        except UserError as error:
            return str(error)
        except OSError as error:
            return f"{path}: the index of this shard cannot be written ({error.strerror or error})"
    return folder.shard(name, summary)


def _index_copy(url: str, digest: bool) -> tuple[ShardIndex, ShardSummary]:
    path = copy_path(url)
    # A copy from before may be of another file: the address has been given a new one when it is indexed again.
    with contextlib.suppress(FileNotFoundError):
        os.unlink(path)
    descriptor = open_copy(url)  # held open, so that no other process evicts the copy
    try:
        index, summary = index_shard(path, digest)
    except UserError as error:
        os.unlink(path)  # when the damage is mended at its source, the shard has to be fetched anew
        raise UserError(str(error).replace(path, url)) from None
    finally:
        os.close(descriptor)
    return index, replace(summary, mtime_ns=0)


def _fetch_class_names(folder: IndexFolder) -> None:
    """Copy class names and templates from beside remote shards, or one folder up, to where `Shards` looks for them."""
    above = folder.shards.rpartition("/")[0] if folder.shards.count("/") > 2 else folder.shards  # not above the host
    for name, place in product((*CLASS_FILES, TEMPLATES_FILE), (above, folder.shards)):  # the nearest counts
        path = os.path.join(folder.path, name)
        with contextlib.suppress(UserError):  # no such file, as a rule
            download(f"{place}/{name}", f"{path}.part")
            os.replace(f"{path}.part", path)
    if not any(os.path.exists(os.path.join(folder.path, name)) for name in CLASS_FILES):
        warn(f"{folder.shards} has labels but no {' or '.join(CLASS_FILES)}; to use them, put one into {folder.path}")


def verify_shards(shards: Sequence[IndexedShard], workers: int | None = None) -> None:
    """Read every shard whole and compare its size and sha256 with the index, in parallel.

    Of a remote shard the local copy is compared, downloaded where there is none.

    Raises:
        UserError: names the first shard that is missing, altered or was never hashed, and says how many are.
    """
    verified = in_parallel("verifying shards", _fault, shards, workers, most=_MAX_WORKERS)
    _raise_first([fault for _, fault in verified if fault], "fail too")


def _fault(shard: IndexedShard) -> str | None:
    """Say what is wrong with a shard, None for nothing."""
    location, _, summary = shard
    if summary.sha256 is None:
        return f"{location} was indexed without a sha256; run contrastive index without --verify first"
    try:
        descriptor = open_copy(location, summary.size, summary.sha256) if is_remote(location) else os.open(location, 0)
    except UserError as error:
        return str(error)
    except OSError as error:
        return f"{location} cannot be opened ({error.strerror})"
    with open(descriptor, "rb") as file:
        size = os.fstat(descriptor).st_size
        if size == summary.size and hashlib.file_digest(file, "sha256").hexdigest() == summary.sha256:
            return None
        if is_remote(location):
            os.unlink(copy_path(location))
            return f"{location}: its local copy was altered and is deleted; run it again to fetch it anew"
    if size != summary.size:
        return f"{location} has {size} bytes, but {summary.size} when it was indexed; index it again or restore it"
    return (
        f"{location} was altered in place: its size is the same, its sha256 is not. Restore it, or index it as it is: "
        f"`contrastive index {shlex.quote(location)} --force`"
    )


def _raise_first(faults: list[str], what: str) -> None:
    if faults:
        raise UserError(min(faults) + (f" ({len(faults) - 1} more shards {what})" if len(faults) > 1 else ""))


# One shard


def index_shard(path: str, digest: bool = False) -> tuple[ShardIndex, ShardSummary]:
    """Index one shard; `digest` asks for its sha256, for which all of it is read.

    Members that follow each other with one key make a sample, as in WebDataset (see `group_members`). A sample that
    repeats a member or a key of the same shard, has a link in place of a file, or '..' in its name is kept but refused
    on access, so that it is counted and never paired wrongly.

    Raises:
        UserError: a torn or altered shard, by name and offset; one without samples, or still being written.
    """
    before = _state(path)
    groups, left_aside = group_members(path)
    if not groups:
        found = "".join(f"; it holds {found['count']:,} {reason}" for reason, found in left_aside.items())
        raise UserError(f"{path} holds no sample: no KEY.jpg, KEY.png, ... with a KEY.txt or KEY.json{found}")
    if all(group.refusal == "duplicate_member" for group in groups):
        raise UserError(
            f"{path}: the members of no key, as '{shown(groups[0].key)}', follow each other, or they are there twice; "
            "write it again in the order of names, as `tar --sort=name` does"
        )
    index = _index_of(groups)
    summary = ShardSummary(
        *before, sha256(path) if digest else None, len(index), **_count(path, index), left_aside=_one_key(left_aside)
    )
    if _state(path) != before:
        raise UserError(f"{path} changed while it was read; index it when it is complete")
    return index, summary


def _index_of(groups: Sequence[Group]) -> ShardIndex:
    commonest = Counter(suffix for group in groups for suffix in group.others).most_common(_MOST_OTHERS)
    others = [suffix for suffix, _ in commonest if suffix.rpartition(b".")[2] not in IMAGES]
    members = (member for group in groups for member in (*group.roles, *map(group.others.get, others)))
    # One flat list: a small list for each member costs more than all the rest.
    spans = [n for m in members for n in ((m.offset // BLOCK, min(m.size, LARGEST)) if m else (0, -1))]
    return ShardIndex(
        spans=np.array(spans, dtype=np.int32).reshape(len(groups), -1, 2),
        refusals=np.array([REFUSALS.index(group.refusal) for group in groups], dtype=np.uint8),
        keys=PackedBytes.of(group.key for group in groups),
        others=tuple(map(shown, others)),
    )


def _state(path: str) -> tuple[int, int]:
    try:
        state = os.stat(path)
    except OSError as error:
        raise UserError(f"{path}: cannot be opened ({error.strerror})") from None
    if state.st_size > LARGEST * BLOCK:
        raise UserError(f"{path} is larger than a shard may be (1 TB); split it")
    return state.st_size, state.st_mtime_ns


def _count(path: str, index: ShardIndex) -> dict:
    """Return the counts of a ShardSummary, for which every text and JSON of the shard is read."""
    refused, fields = FaultCounts(), {}
    counts = dict.fromkeys(("captions", "labels", "label_names", "of_json", "lines", "unlike"), 0)
    # Lists of numbers, column by column: a row of an array takes ten times as long to read.
    (_, images), texts, jsons, (_, classes) = (index.spans[:, place].T.tolist() for place in range(len(ROLES)))
    with open(path, "rb") as file:
        read = partial(os.pread, file.fileno())
        for row, refusal in enumerate(index.refusals.tolist()):
            reason = REFUSALS[refusal] or ("missing_image" if images[row] < 0 else "")
            content = {}
            if not reason and 0 <= jsons[1][row] <= MAX_TEXT_BYTES:
                try:
                    content = json_fields(read(jsons[1][row], jsons[0][row] * BLOCK))
                except ValueError:
                    reason = "bad_json"
            if reason:
                refused.add(reason, shown(index.keys[row]))
                continue
            fields |= dict.fromkeys(content)
            label, stated = content.get("label"), next(filter(None, map(content.get, CAPTION_FIELDS)), None)
            size = texts[1][row]
            counts["captions"] += size >= 0 or bool(stated)
            counts["of_json"] += bool(stated)
            counts["labels"] += classes[row] >= 0 or type(label) is int
            counts["label_names"] += type(label) is str
            if 0 <= size <= MAX_TEXT_BYTES:
                data = read(size, texts[0][row] * BLOCK).strip()
                if b"\n" in data or b"\r" in data or (stated and data.decode("utf-8", "replace") != stated):
                    found = caption_lines(data.decode("utf-8-sig", "replace"))
                    counts["lines"] += len(found) > 1
                    counts["unlike"] += bool(data and stated) and not same_texts(found, stated)
    known = [role for place, role in enumerate(ROLES[1:], start=1) if (index.spans[:, place, 1] >= 0).any()]
    return {
        **counts,
        "fields": tuple(sorted(fields)[:_MOST_FIELDS]),
        "texts": (*known, *index.others),
        "refused": _one_key(refused),
    }


def _one_key(counts: FaultCounts) -> FaultCounts:
    """The counts with one key of each reason: there may be 40,000 shards."""
    return FaultCounts({reason: {**found, "keys": found["keys"][:1]} for reason, found in counts.items()})
