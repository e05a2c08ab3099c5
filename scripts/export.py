"""Write a model for another library: a folder that it loads as it is, with tokenizer, preprocessing and model card.

    python scripts/export.py RUN --to transformers OUT     # AutoModel, AutoProcessor
    python scripts/export.py RUN --to open_clip OUT        # open_clip.create_model_and_transforms('local-dir:OUT')
    python scripts/export.py RUN --to timm OUT             # the image tower: timm.create_model('local-dir:OUT')
    python scripts/export.py RUN --to onnx OUT             # both towers, float32 and float16, for onnxruntime

RUN is anything that contrastive.load reads: a run, a checkpoint or a model folder, ours or another library's, or
hf-hub:ORG/NAME@REVISION. The library reads the folder back before OUT gets its name: one that gives other embeddings
than the model is not written. With --push it then goes to the hub as you are logged in there (hf auth login).
"""

import argparse
import signal
import sys
from pathlib import Path

from rich.console import Console

from contrastive.command_line import Parser
from contrastive.errors import UserError
from contrastive.interop.export import FORMATS, check_out, export, push_export
from contrastive.interop.hub import check_push
from contrastive.interop.parity import parity_table
from contrastive.log import console, run_script


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = Parser("export.py", __doc__)
    parser.add_argument("run", metavar="RUN", help="folder of a run, checkpoint or model, or hf-hub:ORG/NAME")
    parser.add_argument("out", type=Path, metavar="OUT", help="the folder to make; must not exist or be empty")
    parser.add_argument("--to", required=True, metavar="FORMAT", help=", ".join(FORMATS))
    parser.add_argument("--push", metavar="ORG/NAME", help="put the folder into this hub repository too")
    parser.add_argument("--private", action="store_true", help="of --push: make a new repository private")
    options = parser.parse_args(arguments)
    if options.private and not options.push:
        raise UserError("--private is of --push ORG/NAME; give both, or neither")
    return options


def main(arguments: list[str]) -> None:
    options = parse(arguments)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that what is half written is removed
    check_out(options.out)
    if options.push:
        check_push(options.push)
    with console.status("loading") as status:
        done = export(options.run, options.to, options.out, options.push, status.update)
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


if __name__ == "__main__":
    run_script("export.py", main)
