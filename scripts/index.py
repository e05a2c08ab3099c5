"""Index WebDataset shards, so that training starts without reading them.

    python scripts/index.py 'cc3m/{00000..00331}.tar'
    python scripts/index.py 's3://bucket/cc3m/{00000..00331}.tar' --workers 16
    python scripts/index.py 'cc3m/{00000..00331}.tar' --verify

Reads every shard once, for its samples and its sha256. Run again after an interruption, it goes on from there; run
again later, it indexes what is new or changed. The index lies in .contrastive-index beside local shards; that of
remote shards in the cache ($CONTRASTIVE_CACHE, default ~/.cache/contrastive). An index folder may be copied, and
named in place of the shards: --data.train FOLDER.
"""

import argparse
import os
from collections import Counter
from collections.abc import Sequence

from contrastive.data.sources.index_builder import index_shards
from contrastive.data.sources.manifest import Entry, is_index, known_shards, read_index, total
from contrastive.data.sources.paths import expand_paths, expand_urls, is_remote
from contrastive.data.sources.verify_index import verify_shards
from contrastive.errors import UserError, did_you_mean
from contrastive.log import run_script


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, without the usage before it."""

    def error(self, message: str):
        if message.startswith("unrecognized arguments: --"):
            flag = message.split()[2].split("=")[0]
            message += "." + did_you_mean(flag, self._option_string_actions)
        raise UserError(message)


def whole_number(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number from 1 up, not '{text}'")
    return int(text)


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = Parser(
        prog="index.py",
        description=__doc__,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("spec", metavar="SPEC", help="shards: a path, glob, brace range, URL, or their index folder")
    parser.add_argument("--workers", type=whole_number, metavar="N", help="processes (default: one a core, at most 16)")
    parser.add_argument("--verify", action="store_true", help="compare shards with their index; change nothing")
    return parser.parse_args(arguments)


def shards_of(spec: str) -> list[str]:
    """Return the paths or URLs of the shards that `spec` names; UserError where it names something else."""
    if is_remote(spec):
        locations = expand_urls(spec)
    elif "://" in spec or spec.startswith("pipe:"):
        raise UserError(f"'{spec}': not read; use local files, or shards under https://, s3://, gs:// or hf://")
    elif is_index(spec):
        return [entry.location for entry in read_index(spec)]
    else:
        locations = expand_paths(spec)
    for location in locations:
        if not location.partition("?")[0].lower().endswith(".tar"):
            raise UserError(f"{location} is no .tar shard; other data needs no index")
    return locations


def indexed(spec: str) -> list[Entry]:
    """Return what the index says of the shards that `spec` names, as they may no longer be."""
    if is_index(spec):
        return read_index(spec)
    entries = known_shards(shards_of(spec))
    if None in entries:
        raise UserError(f"{spec}: {entries.count(None)} shards have no index; run scripts/index.py without --verify")
    return entries


def describe(entries: Sequence[Entry]) -> str:
    refused = sum((Counter(entry.summary.refused) for entry in entries), Counter())
    reasons = ", ".join(f"{count:,} {reason}" for reason, count in sorted(refused.items()))
    folders = sorted({os.path.dirname(entry.index_path) for entry in entries})
    return "\n".join(
        (
            f"shards    {len(entries):,} ({total(entries, 'size') / 1e9:.2f} GB)",
            f"samples   {total(entries, 'samples'):,}",
            f"captioned {total(entries, 'captions'):,}",
            f"labelled  {total(entries, 'labels') + total(entries, 'label_names'):,}",
            f"refused   {refused.total():,}" + (f" ({reasons})" if reasons else ""),
            f"index     {', '.join(folders)}",
        )
    )


def main(arguments: list[str]) -> None:
    options = parse(arguments)
    if options.verify:
        entries = indexed(options.spec)
        verify_shards(entries, options.workers)
    else:
        entries = index_shards(shards_of(options.spec), digest=True, workers=options.workers)
    print(describe(entries))
    if options.verify:
        print("verified  every shard is as it was when it was indexed")


if __name__ == "__main__":
    run_script("index.py", main)
