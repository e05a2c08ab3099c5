"""Index WebDataset shards, so that training starts without reading them.

    contrastive index 'cc3m/{00000..00331}.tar'
    contrastive index 's3://bucket/cc3m/{00000..00331}.tar' --workers 16
    contrastive index 'cc3m/{00000..00331}.tar' --verify
    contrastive index https://host/cc3m/00017.tar --force

Reads every shard once, for its samples and its sha256. Run again after an interruption, it goes on from there; run
again later, it indexes what is new, and local shards that changed. That a remote shard was replaced shows when it is
next downloaded: --force indexes it anew.

The index lies in .contrastive-index beside local shards; that of remote shards in the cache ($CONTRASTIVE_CACHE,
default ~/.cache/contrastive). An index folder may be copied, and named in place of the shards: --data.train FOLDER.
"""

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

from tyro.conf import Positional, arg

from contrastive.command_line import print_json
from contrastive.config import parse
from contrastive.data.record import FaultCounts
from contrastive.data.shards.indexing import index_shards, verify_shards
from contrastive.data.shards.shard_index import IndexedShard, find_shards, is_index, read_index, total
from contrastive.data.shards.shard_source import Shards
from contrastive.data.sources.paths import expand_paths, expand_urls, is_remote
from contrastive.errors import UserError
from contrastive.log import say


@dataclass(frozen=True)
class IndexConfig:
    """What to index."""

    spec: Annotated[Positional[str], arg(metavar="SPEC")]
    """Shards: a path, glob, brace range, URL, or their index folder."""
    workers: int | None = None
    """Processes; none: one a core, at most 16."""
    verify: bool = False
    """Compare shards with their index; change nothing."""
    json: bool = False
    """Print an object instead of lines."""
    force: bool = False
    """Index all of SPEC anew, and download what is remote: for shards that were replaced, or a damaged index."""

    def __post_init__(self):
        if self.workers is not None and self.workers < 1:
            raise UserError(f"--workers is {self.workers}; it must be 1 or more")
        if self.verify and self.force:
            raise UserError("give --verify or --force, not both: one compares with the index, the other replaces it")


def shards_of(spec: str) -> list[str]:
    """Return the paths or URLs of the shards that `spec` names; UserError where it names something else."""
    if is_remote(spec):
        locations = expand_urls(spec)
    elif "://" in spec or spec.startswith("pipe:"):
        raise UserError(f"'{spec}': not read; use local files, or shards under https://, s3://, gs:// or hf://")
    elif is_index(spec):
        return [shard.location for shard in read_index(spec)]
    else:
        locations = expand_paths(spec)
    for location in locations:
        if not location.partition("?")[0].lower().endswith(".tar"):
            raise UserError(f"{location} is no .tar shard; other data needs no index")
    return locations


def indexed(spec: str) -> list[IndexedShard]:
    """Return what the index says of the shards that `spec` names, as they may no longer be."""
    if is_index(spec):
        return read_index(spec)
    shards = find_shards(shards_of(spec))
    if None in shards:
        raise UserError(f"{spec}: {shards.count(None)} shards have no index; run contrastive index without --verify")
    return shards


def describe(spec: str, shards: Sequence[IndexedShard]) -> dict[str, Any]:
    """Return what the index says, by the names under which it is printed."""
    source = Shards(spec, shards)
    refused, left_aside = FaultCounts(), FaultCounts(source.left_aside)
    for shard in shards:
        refused.include(shard.summary.refused)
    for reason in refused:
        del left_aside[reason]
    folders = sorted({os.path.dirname(shard.index_path) for shard in shards})
    return {
        "shards": len(shards),
        "bytes": total(shards, "size"),
        "samples": len(source),
        "captioned": total(shards, "captions"),
        "labelled": total(shards, "labels") + total(shards, "label_names"),
        "read as": source.reading or "no captions",
        "refused": {reason: found["count"] for reason, found in refused.commonest_first().items()},
        "left": {reason: found["count"] for reason, found in left_aside.commonest_first().items()},
        "index": folders,
    }


def lines(found: dict[str, Any]) -> Iterator[str]:
    """What `describe` found, a line each."""
    for name, value in found.items():
        if name == "bytes":
            continue
        if isinstance(value, dict):
            reasons = ", ".join(f"{count:,} {reason}" for reason, count in value.items())
            value = f"{sum(value.values()):,}" + (f" ({reasons})" if reasons else "")
        told = ", ".join(value) if isinstance(value, list) else f"{value:,}" if isinstance(value, int) else value
        yield f"{name:<10}{told}" + (f" ({found['bytes'] / 1e9:.2f} GB)" if name == "shards" else "")


def main(arguments: list[str]) -> None:
    options = parse(IndexConfig, arguments, prog="index", description=__doc__)
    if options.verify:
        shards = indexed(options.spec)
        verify_shards(shards, options.workers)
    else:
        shards = index_shards(shards_of(options.spec), digest=True, workers=options.workers, force=options.force)
    found = describe(options.spec, shards)
    if options.json:
        print_json(found)
    else:
        print("\n".join(lines(found)))
    if options.verify:
        say("verified  every shard is as it was when it was indexed")
