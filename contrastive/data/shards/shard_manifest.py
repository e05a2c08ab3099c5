"""The manifest of a folder of shards: what training has to know of them before it reads one.

An index folder holds `manifest.json`, a summary of every shard, and for each shard an .npz of the places of its
samples, which is read when the shard is first touched.
"""

import hashlib
import json
import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import NamedTuple

from contrastive.data.shards.shard_index import ShardSummary
from contrastive.data.shards.stored_index import summary_from, write_whole
from contrastive.data.sources.paths import folder_and_name, is_remote
from contrastive.errors import UserError
from contrastive.files import cache_folder

INDEX_FOLDER, MANIFEST = ".contrastive-index", "manifest.json"
_FORMAT, _VERSION = "contrastive shard index", 1
_BESIDE = ".."


class Entry(NamedTuple):
    """One shard: where it is (path or URL), where its index is, and what is known of it."""

    location: str
    index_path: str
    summary: ShardSummary


@dataclass(frozen=True)
class IndexFolder:
    """The index of the shards of one folder.

    path: of the index folder. shards: the folder or URL that the shards lie in.
    """

    path: str
    shards: str

    def read(self) -> dict[str, ShardSummary]:
        """Return the summary of each shard by name; none where there is no manifest, or one of another version."""
        manifest = _read(os.path.join(self.path, MANIFEST))
        return {} if manifest is None else _summaries(manifest, self.path)

    def add(self, summaries: dict[str, ShardSummary]) -> None:
        """Write the manifest with these shards besides those that it lists. The caller holds the lock."""
        merged = self.read() | summaries
        base = _BESIDE if os.path.basename(self.path) == INDEX_FOLDER else self.shards
        rows = (json.dumps({"name": name, **asdict(merged[name])}) for name in sorted(merged))
        head = json.dumps({"format": _FORMAT, "version": _VERSION, "shards_in": base})
        # One shard a line, for people who look.
        text = head[:-1] + ', "shards": [\n' + ",\n".join(rows) + "\n]}\n"
        write_whole(os.path.join(self.path, MANIFEST), lambda file: file.write(text.encode()))

    def index_path(self, name: str) -> str:
        """Return where the places of the samples of a shard are kept."""
        safe = re.sub(r"[^\w.-]", "_", name)
        if safe != name:
            safe = f"{safe[:100]}-{_hash(name)}"
        return os.path.join(self.path, f"{safe}.npz")

    def entry(self, name: str, summary: ShardSummary) -> Entry:
        return Entry(self.location(name), self.index_path(name), summary)

    def location(self, name: str) -> str:
        return f"{self.shards}/{name}" if is_remote(self.shards) else os.path.join(self.shards, name)


def index_folders(shards: str) -> tuple[IndexFolder, ...]:
    """Return where the index of a folder of shards may be, the preferred place first.

    Beside local shards; else, and for remote ones, in the cache.
    """
    if is_remote(shards):
        return (IndexFolder(_in_cache(shards), shards),)
    shards = os.path.abspath(shards)
    return IndexFolder(os.path.join(shards, INDEX_FOLDER), shards), IndexFolder(_in_cache(shards), shards)


def by_folder(locations: Iterable[str]) -> dict[str, list[str]]:
    """Group paths or URLs by the folder they lie in, each with its names, in their order."""
    grouped: dict[str, list[str]] = {}
    for location in locations:
        folder, name = folder_and_name(location)
        grouped.setdefault(folder, []).append(name)
    return grouped


def known_shards(locations: Sequence[str]) -> list[Entry | None]:
    """Return what the manifests say of shards, as they may no longer be; None for one that no manifest lists."""
    found = {}
    for shards, names in by_folder(locations).items():
        known = [(folder, folder.read()) for folder in index_folders(shards)]
        for name in names:
            entries = (folder.entry(name, summaries[name]) for folder, summaries in known if name in summaries)
            found[shards, name] = next(entries, None)
    return [found[folder_and_name(location)] for location in locations]


def is_index(path: str) -> bool:
    """Whether a path names an index folder or its manifest, wherever it lies; other folders may have a manifest too."""
    path = os.path.expanduser(path)
    if INDEX_FOLDER in (os.path.basename(path.rstrip("/")), os.path.basename(os.path.dirname(path))):
        return True
    try:
        with open(path if os.path.basename(path) == MANIFEST else os.path.join(path, MANIFEST), "rb") as file:
            return _FORMAT.encode() in file.read(200)
    except OSError:
        return False


def read_index(path: str) -> list[Entry]:
    """Return all shards that an index folder (or its manifest.json) lists, in its order; none is looked at.

    Raises:
        UserError: it is not an index, damaged, of another version, or lists nothing.
    """
    path = os.path.abspath(os.path.expanduser(path))
    folder = os.path.dirname(path) if os.path.basename(path) == MANIFEST else path
    manifest = _read(os.path.join(folder, MANIFEST))
    if manifest is None:
        raise UserError(f"{path} is no index of shards of this version; make one with scripts/index.py")
    shards = manifest["shards_in"]
    index = IndexFolder(folder, shards if is_remote(shards) else os.path.normpath(os.path.join(folder, shards)))
    summaries = _summaries(manifest, folder)
    if not summaries:
        raise UserError(f"{path} lists no shard; run scripts/index.py on the data")
    return [index.entry(name, summary) for name, summary in summaries.items()]


def _read(path: str) -> dict | None:
    """Return the content of a manifest; None where there is none, or one of another version."""
    try:
        with open(path, "rb") as file:
            manifest = json.load(file)
        if manifest["format"] != _FORMAT:
            raise ValueError("it is some other file")
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: cannot be read as an index of shards ({error}); delete it and index again") from None
    return manifest if manifest.get("version") == _VERSION else None


def _summaries(manifest: dict, folder: str) -> dict[str, ShardSummary]:
    try:
        return {row.pop("name"): summary_from(row) for row in manifest["shards"]}
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{folder}: its manifest is damaged ({error}); delete it and index again") from None


def _in_cache(shards: str) -> str:
    return os.path.join(cache_folder(), "index", _hash(shards))


def _hash(text: str) -> str:
    return hashlib.blake2b(text.encode("utf-8", "surrogateescape"), digest_size=8).hexdigest()


def total(entries: Sequence[Entry], field: str) -> int:
    """Return the sum of a count over shards."""
    return sum(getattr(entry.summary, field) for entry in entries)
