"""Write a model for another library: a folder that it loads as it is, with tokenizer, preprocessing and model card.

    contrastive export runs/mine --to transformers OUT   # AutoModel
    contrastive export runs/mine --to open_clip OUT      # 'local-dir:OUT'
    contrastive export runs/mine --to timm OUT           # the image tower
    contrastive export runs/mine --to onnx OUT           # for onnxruntime

MODEL is anything that contrastive.load reads: a run, a checkpoint or a model folder, ours or another library's, or
hf-hub:ORG/NAME@REVISION. The library reads the folder back before OUT gets its name: one that gives other embeddings
than the model is not written. With --push it then goes to the hub as you are logged in there (hf auth login).
"""

import signal
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from rich.console import Console
from tyro.conf import Positional, arg

from contrastive.command_line import CheckedOptions
from contrastive.config import parse
from contrastive.errors import UserError
from contrastive.interop.export import check_out, check_push, export, push_export
from contrastive.interop.parity import parity_table
from contrastive.log import console


@dataclass(frozen=True, kw_only=True)
class ExportOptions(CheckedOptions):
    """Which model, for what."""

    model: Annotated[Positional[str], arg(metavar="MODEL")]
    """Folder of a run, checkpoint or model, or hf-hub:ORG/NAME."""
    out: Annotated[Positional[Path], arg(metavar="OUT")]
    """The folder to make; must not exist or be empty."""
    to: Annotated[str, arg(metavar="FORMAT")]
    """transformers, open_clip, timm or onnx."""
    push: Annotated[str | None, arg(metavar="ORG/NAME")] = None
    """Put the folder into this hub repository too."""
    private: bool = False
    """Of --push: make a new repository private."""

    def __post_init__(self):
        super().__post_init__()
        if self.private and not self.push:
            raise UserError("--private is of --push ORG/NAME; give both, or neither")


def main(arguments: list[str]) -> None:
    options = parse(ExportOptions, arguments, prog="export", description=__doc__)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that what is half written is removed
    check_out(options.out)
    if options.push:
        check_push(options.push)
    with console.status("loading") as status:
        done = export(options.model, options.to, options.out, options.push, status.update)
    print_result(done, options.to)
    if options.push:
        print(f"pushed: {push_export(done.folder, options.to, options.push, options.private)}")
        print("note: its README.md names no licence; add one there, as 'license: apache-2.0' in its first lines")


def print_result(done, to: str) -> None:
    files = [path for path in done.folder.rglob("*") if path.is_file()]
    size = sum(path.stat().st_size for path in files) / 1e6
    output = Console(highlight=False, soft_wrap=True)
    output.print(parity_table(done.checks))
    for note in done.notes:
        output.print(f"note: {note}", markup=False)
    output.print(f"wrote {done.folder} for {to}: {len(files)} files, {size:,.1f} MB; README.md is its model card")
