"""The manifest of a folder of shards: what training has to know of them before it reads one.

An index folder holds `manifest.json`, a summary of every shard, and for each shard an .npz of the places of its
samples, which is read when the shard is first touched.
"""

import json
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from contrastive.data.record import fingerprint_of
from contrastive.data.shards.shard_index import IndexedShard, ShardSummary, summary_from
from contrastive.data.sources.paths import folder_and_name, is_remote
from contrastive.errors import UserError
from contrastive.files import cache_folder, write_whole

INDEX_FOLDER, MANIFEST = ".contrastive-index", "manifest.json"
_FORMAT, _VERSION = "contrastive shard index", 2
# What a manifest beside its shards says of their place: the folder may be moved as a whole.
_BESIDE = ".."


@dataclass(frozen=True)
class IndexFolder:
    """The index of the shards of one folder.

    path: of the index folder. shards: the folder or URL that the shards lie in.
    """

    path: str
    shards: str

    def read(self) -> dict[str, IndexedShard]:
        """Return each shard by name; none where there is no manifest, or one of another version."""
        _, summaries = _read(self.path) or (None, {})
        return {name: self.shard(name, summary) for name, summary in summaries.items()}

    def add(self, summaries: Mapping[str, ShardSummary]) -> None:
        """Write the manifest with these shards besides those that it lists. The caller holds the lock."""
        merged = {name: shard.summary for name, shard in self.read().items()} | dict(summaries)
        base = _BESIDE if os.path.basename(self.path) == INDEX_FOLDER else self.shards
        rows = (json.dumps({"name": name, **asdict(merged[name])}) for name in sorted(merged))
        head = json.dumps({"format": _FORMAT, "version": _VERSION, "shards_in": base})
        # One shard a line, for people who look.
        write_whole(Path(self.path, MANIFEST), head[:-1] + ', "shards": [\n' + ",\n".join(rows) + "\n]}\n")

    def shard(self, name: str, summary: ShardSummary) -> IndexedShard:
        return IndexedShard(self.location(name), self.index_path(name), summary)

    def location(self, name: str) -> str:
        return f"{self.shards}/{name}" if is_remote(self.shards) else os.path.join(self.shards, name)

    def index_path(self, name: str) -> str:
        """Return where the places of the samples of a shard are kept."""
        safe = re.sub(r"[^\w.-]", "_", name)
        # 'a?b' and 'a_b' must not share a file: names that had to be changed carry a hash of the original.
        if safe != name:
            safe = f"{safe[:100]}-{fingerprint_of(os.fsencode(name))}"
        return os.path.join(self.path, f"{safe}.npz")


def index_folders(shards: str) -> tuple[IndexFolder, ...]:
    """Return where the index of a folder of shards may be, the preferred place first.

    Beside local shards; else, and for remote ones, in the cache.
    """
    in_cache = IndexFolder(os.path.join(cache_folder(), "index", fingerprint_of(os.fsencode(shards))), shards)
    return (in_cache,) if is_remote(shards) else (IndexFolder(os.path.join(shards, INDEX_FOLDER), shards), in_cache)


def find_shards(
    locations: Sequence[str], fits: Callable[[IndexedShard], bool] = lambda shard: True
) -> list[IndexedShard | None]:
    """Return what the manifests say of shards (paths or URLs): the first entry of each that `fits`, or None."""
    listed: dict[str, list[dict[str, IndexedShard]]] = {}
    found = []
    for folder, name in map(folder_and_name, locations):
        if folder not in listed:
            listed[folder] = [index.read() for index in index_folders(folder)]
        found.append(next((shards[name] for shards in listed[folder] if name in shards and fits(shards[name])), None))
    return found


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


def read_index(path: str) -> list[IndexedShard]:
    """Return all shards that an index folder (or its manifest.json) lists, in its order; none is looked at.

    Raises:
        UserError: it is not an index, damaged, of another version, or lists nothing.
    """
    path = os.path.abspath(os.path.expanduser(path))
    folder = os.path.dirname(path) if os.path.basename(path) == MANIFEST else path
    manifest = _read(folder)
    if manifest is None:
        raise UserError(f"{path} is no index of shards of this version; make one with contrastive index")
    base, summaries = manifest
    if not summaries:
        raise UserError(f"{path} lists no shard; run contrastive index on the data")
    index = IndexFolder(folder, base if is_remote(base) else os.path.normpath(os.path.join(folder, base)))
    return [index.shard(name, summary) for name, summary in summaries.items()]


def _read(folder: str) -> tuple[str, dict[str, ShardSummary]] | None:
    """Return where the shards lie and the summary of each by name; None without a manifest, or of another version."""
    path = os.path.join(folder, MANIFEST)
    try:
        with open(path, "rb") as file:
            manifest = json.load(file)
        if manifest["format"] != _FORMAT:
            raise ValueError("it is some other file")
        if manifest.get("version") != _VERSION:
            return None
        summaries = {row.pop("name"): summary_from(row) for row in manifest["shards"]}
        base = manifest["shards_in"]
        # What came with data may name shards beside it or on the net, and no other file of this machine.
        own = Path(folder).resolve().is_relative_to(Path(cache_folder()).resolve())
        if not own and base != _BESIDE and (not is_remote(base) or base.startswith(("file:", "memory:"))):
            raise ValueError(f"it names shards in {base}, but lies elsewhere")
        for name in summaries:
            if os.fsencode(name) in (b"", b".", b"..") or "/" in name or "\0" in name:
                raise ValueError(f"a shard named {name!r}")
        return base, summaries
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{path}: cannot be read as an index of shards ({error}); delete it and index again") from None


def total(shards: Sequence[IndexedShard], count: str) -> int:
    """Return the sum of a count of the summaries over shards."""
    return sum(getattr(shard.summary, count) for shard in shards)
