"""Write any source as WebDataset shards: 00000.tar, 00001.tar, ..., classes.json and report.json."""

import io
import json
import math
import os
import re
import tarfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import simplejpeg
from PIL import Image

from contrastive.data.captions import caption_fault, drawn_order
from contrastive.data.decode import decode
from contrastive.data.preprocess import resize
from contrastive.data.record import BadSample, FaultCounts, Record, Source
from contrastive.data.shards.parallel import in_parallel
from contrastive.data.sources import open_source
from contrastive.data.sources.beside import caption_lines
from contrastive.errors import UserError
from contrastive.files import claim_folder, locked, write_json
from contrastive.log import say

SAMPLES_PER_SHARD = 10_000
_PROGRESS = ".progress"
_PLAN = f"{_PROGRESS}/plan.json"
# What open_clip and the webdataset library decode too. They pass over a .gif or .tif without a word.
_KEPT = re.compile(rb"(?P<jpg>\xff\xd8\xff)|(?P<png>\x89PNG\r\n\x1a\n)|(?P<webp>RIFF.{4}WEBP)", re.DOTALL)


@dataclass(frozen=True)
class PackOptions:
    """How samples are stored.

    short_side: images whose short side has more pixels are scaled down to it and stored as JPEG; None keeps all.
    quality: of those JPEGs.
    """

    short_side: int | None = None
    quality: int = 90

    def __post_init__(self):
        if self.short_side is not None and self.short_side < 1:
            raise UserError(f"short_side {self.short_side} is not a number of pixels; use 1 or more")
        if not 1 <= self.quality <= 100:
            raise UserError(f"quality {self.quality} is not in 1..100; 90 is usual")


def write_shards(
    source: Source,
    folder: Path,
    options: PackOptions | None = None,
    *,
    samples_per_shard: int = SAMPLES_PER_SHARD,
    workers: int | None = None,
    asked: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Write the samples of `source` to folder/00000.tar, ... and return the report, also in folder/report.json.

    Shard n holds those of the samples n * samples_per_shard onward that can be used, so its bytes do not depend
    on the number of workers. The key of a sample is its number in the source. Class names go to classes.json. A
    labelled source whose captions are only its class names in templates is stored by label alone.

    Finished shards of an earlier call with the same arguments are kept. The others are written to a temporary
    name, and renamed when whole.

    Args:
        folder: new, empty, or begun by an earlier call.
        workers: processes; None: one a core.
        asked: further options that shaped `source`, which a later call has to repeat.

    Raises:
        UserError: the folder is not ours or was begun otherwise, no sample can be used, or a worker died.
    """
    options = options or PackOptions()
    if len(source.parts) > 1:
        raise UserError(f"{source.name}: write shards of each part by itself; the weights are for training")
    if samples_per_shard < 1 or (workers is not None and workers < 1):
        raise UserError("samples_per_shard and workers have to be 1 or more")
    shards = _NewShards(folder, source.stored, options, samples_per_shard)
    plan = {
        "samples_of_the_source": len(shards.source),
        "fingerprint_of_the_source": shards.source.fingerprint,
        "samples_per_shard": samples_per_shard,
        **asdict(options),
        **(asked or {}),
    }
    with _claimed(folder, plan):
        if shards.source.class_names:
            write_json(folder / "classes.json", list(shards.source.class_names))
        missing = [number for number in range(len(shards)) if shards.finished(number) is None]
        for _ in in_parallel("writing shards", shards.write, missing, workers, done=len(shards) - len(missing)):
            pass
        return _report(shards, plan, kept=len(shards) - len(missing))


@contextmanager
def _claimed(folder: Path, plan: dict[str, Any]) -> Iterator[None]:
    """Make the folder ours for as long as the context lasts, or go on with one that the same plan began.

    Raises:
        UserError: it holds something else, was begun by another plan, or another process writes to it.
    """
    claim = partial(claim_folder, folder, _PLAN, of="such a run", mend="give a folder that is new or empty")
    claim()
    with locked(folder / ".lock", f"another process is writing shards to {folder}; wait for it to end"):
        begun = claim() or plan  # only now nobody else can begin it
        for name, value in plan.items():
            if begun.get(name) != value:
                raise UserError(
                    f"{folder} was begun with {name.replace('_', ' ')} {begun.get(name)}, now it is {value}; "
                    "use the old one to go on, or give another folder"
                )
        (folder / _PROGRESS).mkdir(exist_ok=True)
        write_json(folder / _PLAN, plan)
        yield


@dataclass
class Tally:
    """What became of the samples of one shard, or of several.

    rejected, rejected_captions: in the order of the source. A rejected caption is one of a sample that has others, or
    a label.
    """

    samples: int = 0
    resized: int = 0
    bytes: int = 0
    rejected: FaultCounts = field(default_factory=FaultCounts)
    rejected_captions: FaultCounts = field(default_factory=FaultCounts)

    def add(self, later: "Tally") -> None:
        """Take in the tally of samples that come after those counted so far."""
        self.samples += later.samples
        self.resized += later.resized
        self.bytes += later.bytes
        self.rejected.include(later.rejected)
        self.rejected_captions.include(later.rejected_captions)


@dataclass(frozen=True)
class _NewShards:
    """The shards of a source in a folder, with a record of each finished one in a hidden folder beside them."""

    folder: Path
    source: Source
    options: PackOptions
    samples_per_shard: int

    def __len__(self) -> int:
        return -(-len(self.source) // self.samples_per_shard)

    def path(self, number: int) -> Path:
        digits = max(5, len(str(len(self) - 1)))
        return self.folder / f"{number:0{digits}d}.tar"

    def pattern(self) -> str:
        """Return the specification that names all shards: a brace range, or a glob where it would have gaps."""
        if not all(self.path(number).exists() for number in range(len(self))):
            return str(self.folder / "*.tar")
        last = self.path(len(self) - 1)
        return str(self.folder / f"{{{self.path(0).stem}..{last.stem}}}.tar" if len(self) > 1 else last)

    def finished(self, number: int) -> Tally | None:
        """Return the tally of a shard that was finished and is still there in full, else None."""
        try:
            stored = json.loads(self._record(number).read_text("utf-8"))
            faults = {name: FaultCounts(stored[name]) for name in ("rejected", "rejected_captions")}
            tally = Tally(**{**stored, **faults})
            size = self.path(number).stat().st_size if tally.samples else 0
        except (OSError, ValueError, TypeError, KeyError):  # none, or one from a disk that was full
            return None
        return tally if size == tally.bytes else None

    def write(self, number: int) -> None:
        """Write a shard, which has its name when it is whole, and record it; one without samples leaves no file."""
        path, tally = self.path(number), Tally()
        temporary = path.with_name(f".{path.name}.tmp")
        first = number * self.samples_per_shard
        with temporary.open("wb") as file:
            with tarfile.open(fileobj=file, mode="w") as tar:
                for index in range(first, min(first + self.samples_per_shard, len(self.source))):
                    try:
                        members = _members(self.source[index], self.options, self.class_labels, tally)
                    except BadSample as fault:
                        tally.rejected.add(fault.reason, fault.key)
                    else:
                        for extension, content in sorted(members.items()):
                            member = tarfile.TarInfo(f"{index:09d}.{extension}")  # no time, no user: the same
                            member.size = len(content)  # samples are the same bytes
                            tar.addfile(member, io.BytesIO(content))
            file.flush()
            os.fsync(file.fileno())
        if tally.samples:
            tally.bytes = temporary.stat().st_size
            os.replace(temporary, path)
        else:
            temporary.unlink()
        write_json(self._record(number), vars(tally))

    @cached_property
    def class_labels(self) -> tuple[str, ...] | None:
        """None where KEY.cls can hold the number of the class, else the names it has to hold.

        A number that is also the name of another class, as folders '1', '10', '2' have it, would be read as the name.
        """
        names = self.source.class_names or ()
        unclear = any(str(number) in names and names[number] != str(number) for number in range(len(names)))
        return names if unclear else None

    def _record(self, number: int) -> Path:
        return self.folder / _PROGRESS / f"{self.path(number).stem}.json"


def _report(shards: _NewShards, plan: dict[str, Any], kept: int) -> dict[str, Any]:
    """Write and show what was done, after our own reader has opened it, which also makes its index."""
    total, sizes = Tally(), {}
    for number in range(len(shards)):
        tally = shards.finished(number)
        total.add(tally)
        if tally.samples:
            sizes[shards.path(number).name] = {"samples": tally.samples, "bytes": tally.bytes}
    name, seen, path = shards.source.name, len(shards.source), shards.folder / "report.json"
    report = {"made_from": {"source": name, **plan}, **vars(total), "shards": sizes}
    write_json(path, report)
    rejected = sum(found["count"] for found in total.rejected.values())
    _say_faults(f"rejected {rejected:,} of {seen:,} samples; more keys in {path}:", total.rejected)
    _say_faults("captions left out of samples that are kept:", total.rejected_captions)
    if not total.samples:
        raise UserError(f"{name}: none of its {seen:,} samples can be used; see {path}")
    if (reread := len(open_source(shards.pattern()))) != total.samples:
        raise UserError(f"{shards.folder} holds {reread:,} samples where {total.samples:,} were written; delete it")
    again = f" ({kept} of them were there)" if kept else ""
    resized = f", {total.resized:,} resized" if total.resized else ""
    say(
        f"{total.samples:,} samples{resized}, {total.bytes / 2**20:,.1f} MiB, "
        f"in {len(sizes)} shards{again}: '{shards.pattern()}'"
    )
    return report


def _say_faults(head: str, faults: FaultCounts) -> None:
    """Where there are any, print a line for each reason, the commonest first: '3 missing_image: a.jpg, b.jpg, ...'."""
    if faults:
        say(head)
    for reason, found in faults.commonest_first().items():
        keys = [re.sub(r"\s+", " ", key) for key in found["keys"][:3]]
        more = ", ..." if found["count"] > len(keys) else ""
        say(f"  {found['count']:,} {reason}: {', '.join(keys)}{more}")


# One sample


def _members(
    record: Record, options: PackOptions, class_labels: tuple[str, ...] | None, tally: Tally
) -> dict[str, bytes]:
    """Return the members of a sample by suffix, and count it, with what is left out or resized.

    The members are an image, and KEY.txt, KEY.json and KEY.cls as far as the sample needs them.

    A JPEG, PNG or WebP that needs no resize keeps its bytes, once it has been decoded without an error; other
    images become lossless PNG. The first caption is in KEY.txt; KEY.json holds {"captions": [...]}, and
    "weights" where there are any, if that says more than the text does.

    Raises:
        BadSample: an image that cannot be read, or neither a usable caption nor a label; nothing is counted.
    """
    faults = [caption_fault(caption) for caption in record.captions]
    captions, weights = _usable_captions(record, faults)
    try:
        suffix, image, resized = _pack_image(record.image, options)
    except BadSample as fault:
        raise BadSample(fault.reason, record.key) from fault
    members = {suffix: image}
    if captions:
        members["txt"] = captions[0].encode()
        # A text loses a byte-order mark when it is read back, and is a caption a line.
        plain = caption_lines(captions[0]) == captions[:1] and not captions[0].startswith("\ufeff")
        if len(captions) > 1 or weights or not plain:
            fields = {"captions": captions} | ({"weights": weights} if weights else {})
            members["json"] = json.dumps(fields, ensure_ascii=False).encode()
    if record.label is not None:
        members["cls"] = (class_labels[record.label] if class_labels else str(record.label)).encode()
    for reason in filter(None, faults):
        tally.rejected_captions.add(reason, record.key)
    tally.samples += 1
    tally.resized += resized
    return members


def _usable_captions(record: Record, faults: Sequence[str | None]) -> tuple[tuple[str, ...], tuple[float, ...]]:
    """Return the captions to store, and their weights where there are any; `faults` has one for each caption."""
    if record.caption_weights is not None:
        drawn_order(record, 0.0)  # refuses weights that mean nothing
    weights = record.caption_weights or (1.0,) * len(record.captions)
    kept = [place for place, fault in enumerate(faults) if fault is None and weights[place]]
    if not kept and record.label is None:
        raise BadSample(next(filter(None, faults), "missing_caption"), record.key)
    captions = tuple(record.captions[place] for place in kept)
    return captions, tuple(weights[place] for place in kept) if record.caption_weights else ()


def _pack_image(image: bytes | Image.Image | np.ndarray, options: PackOptions) -> tuple[str, bytes, bool]:
    """Return the suffix and the bytes of an image file, and whether the picture was scaled down. Raises BadSample."""
    kept = _KEPT.match(image) if isinstance(image, bytes) else None
    if kept and options.short_side is None:
        decode(image, min_side=1)  # at the smallest scale: all of the data is read, few pixels are made
        return kept.lastgroup, image, False
    pixels = decode(image)
    height, width = pixels.shape[1:]
    scale = (options.short_side or math.inf) / min(height, width)
    if scale < 1:
        pixels = resize(pixels, max(1, round(height * scale)), max(1, round(width * scale)))
    elif kept:
        return kept.lastgroup, image, False
    rows = np.ascontiguousarray(pixels.permute(1, 2, 0).numpy())
    if scale < 1:
        jpeg = simplejpeg.encode_jpeg(rows, options.quality, colorspace="RGB", colorsubsampling="420", fastdct=False)
        return "jpg", jpeg, True
    png = io.BytesIO()
    Image.fromarray(rows).save(png, "PNG")
    return "png", png.getvalue(), False
