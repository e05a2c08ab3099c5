"""Choose which pairs of a data set to train on: the best by score, each picture once, none of a test set.

    contrastive curate runs/mine pairs.csv kept --keep-best 0.3 --duplicates 0.95
    contrastive curate MODEL 'cc3m/*.tar' kept --against flickr8k/test.tar
    contrastive pretrain --data kept

A score is the mean cosine of an image with its captions. OUT then stands for the data wherever data are named, and is
refused when they have changed. OUT also gets a page of the best, the worst and what was dropped, and a table of all
samples, samples.parquet. Without a rule all is kept: look at the scores first. Embeddings are made once and kept in
MODEL/embeddings, under `accelerate launch` by all processes; an interrupted command goes on when it is given again.
"""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text
from tyro.conf import Positional, arg

import contrastive
from contrastive.command_line import LoadingOptions, print_json
from contrastive.config import parse
from contrastive.data.record import Source
from contrastive.data.sources import announce, open_source
from contrastive.data.sources.columns import check_columns
from contrastive.data.sources.derived import as_found
from contrastive.data.sources.image_files import open_images
from contrastive.data.sources.open import absolute
from contrastive.data.sources.subset import FORMAT, KEPT, KeptData, write_kept
from contrastive.distributed.launching import prepare_process
from contrastive.distributed.runtime import joined_ranks
from contrastive.errors import UserError
from contrastive.evaluate.curation import PAGE, Curation, Rules, curate, facts_of, figures_of, score_rows, write_report
from contrastive.evaluate.embedding_store import find_store
from contrastive.evaluate.embedding_writing import check_texts, has_captions
from contrastive.evaluate.embeddings import EmbeddingSet
from contrastive.evaluate.evaluated_model import EvaluatedModel
from contrastive.files import claim_folder
from contrastive.interop.loading import results_folder
from contrastive.log import is_main_process, say
from contrastive.option_types import Share

MEND = "give another OUT"


@dataclass(frozen=True, kw_only=True)
class CurateOptions(LoadingOptions):
    """What to choose from, and what to drop."""

    model: Annotated[Positional[Path], arg(metavar="MODEL")]
    """Folder of a run, checkpoint or model, or hf-hub:ORG/NAME."""
    data: Annotated[Positional[str], arg(metavar="DATA")]
    """What to choose from: any data, or an earlier OUT."""
    out: Annotated[Positional[Path], arg(metavar="OUT")]
    """The folder to write; it may be of an earlier call on the same data."""
    keep_best: Share[float | None] = None
    """Share of the pairs to keep: the best by score."""
    min_score: float | None = None
    """Drop pairs whose score is below."""
    duplicates: Share[float | None] = None
    """Drop near-duplicates: from this cosine on, as 0.95."""
    against: Annotated[tuple[str, ...], arg(metavar="SPEC")] = ()
    """Drop images that are near to one of these data sets."""
    against_above: Share[float | None] = None
    """What is near for --against, a cosine; none: 0.95."""
    image_column: str | None = None
    """Of a table, where it has an unusual name."""
    caption_column: str | None = None
    """Of a table, where it has an unusual name."""
    json: bool = False
    """Print the figures as an object."""
    cache: Annotated[Path | None, arg(metavar="DIR")] = None
    """Keep embeddings there; none: MODEL/embeddings."""

    def __post_init__(self):
        super().__post_init__()
        if self.against_above is not None and not self.against:
            raise UserError("--against-above has no effect without --against; leave it out")
        if len(set(self.against)) < len(self.against) or self.data in self.against:
            raise UserError("--against names data twice, or DATA itself; name each once")

    def rules(self) -> Rules:
        """Return what they say of dropping."""
        bound = {} if self.against_above is None else {"against_above": self.against_above}
        return Rules(self.keep_best, self.min_score, self.duplicates, **bound)


def run_curation(options: CurateOptions) -> None:
    columns = {"image_column": options.image_column, "caption_column": options.caption_column}
    if find_store(Path(options.data).expanduser()) is not None:
        raise UserError(f"{options.data} holds embeddings; give the data that they are of, which are to be trained on")
    source = open_source(options.data, **columns)
    check_columns([source], columns)
    if len(source.parts) > 1:
        raise UserError(f"{options.data} mixes several sources: curate each by itself, and mix what is kept of them")
    sources: dict[str, Source] = {options.data: source}
    for name in options.against:
        if find_store(Path(name).expanduser()) is None:
            sources[name] = open_images([name])
    data = absolute(options.data)
    earlier = claim_folder(options.out, KEPT, "a curation", MEND)
    if earlier is not None and earlier.get("data") != data:
        raise UserError(f"{options.out} holds the curation of {earlier.get('data')}; {MEND}")
    rules, cache = options.rules(), options.cache or results_folder(options.model) / "embeddings"
    with joined_ranks(options.device) as device:
        bundle = contrastive.load(options.model, device=device)
        if rules.keep_best is not None or rules.min_score is not None:
            check_texts(bundle, source)
        for one in sources.values():
            announce(one)
        model = EvaluatedModel(str(options.model), bundle, cache, device=device, sources=sources, **options.loading())
        scored = bundle.tokenizer is not None and has_captions(source)
        model.embed(options.data, texts=scored)
        for name in options.against:
            model.embed(name)
    if not is_main_process():  # embeddings were all that the ranks share, and they have parted
        return
    found = model.embeddings(options.data, texts=scored)
    others = {name: (sources.get(name), model.embeddings(name)) for name in options.against}
    result = curate(found, rules, {name: own.features for name, (_, own) in others.items()}, device=device)
    finish(options, source, found, result, others)


def finish(options: CurateOptions, source: Source, found: EmbeddingSet, result: Curation, others: dict) -> None:
    """Write OUT, and print what became of the data. UserError where nothing is kept; OUT then stays as it was."""
    rules, figures = options.rules(), figures_of(found, result, len(source))
    if figures["kept"] == 0:
        dropped = ", ".join(f"{count:,} by {rule}" for rule, count in figures["dropped"].items())
        raise UserError(f"nothing would be kept of {options.data} ({dropped}); give looser bounds")
    figures = {"data": options.data, "model": str(options.model), "rules": asdict(rules), **figures}
    whole = as_found(source)
    said = KeptData(
        FORMAT,
        absolute(options.data),
        options.image_column,
        options.caption_column,
        whole.fingerprint,
        len(whole),
        figures["kept"],
    )
    options.out.mkdir(parents=True, exist_ok=True)
    write_kept(options.out, said, found.index[result.kept].numpy())
    write_report(options.out, source, found, result, rules, figures, others)
    if options.json:
        print_json(figures)
    else:
        _print(facts_of(figures, rules))
        _print(score_rows(figures), heading=True)
    say(f"wrote {options.out / PAGE}; train on what is kept with --data {options.out}")


def _print(rows: list[tuple[str, ...]], heading: bool = False) -> None:
    if not rows:
        return
    table = Table(box=box.SIMPLE_HEAD, show_header=heading)
    for place, name in enumerate(rows[0]):
        table.add_column(name if heading else None, justify="right" if place else "left", overflow="fold")
    for row in rows[heading:]:
        table.add_row(*map(Text, row))
    Console().print(table)


def main(arguments: list[str]) -> None:
    prepare_process()
    run_curation(parse(CurateOptions, arguments, prog="curate", description=__doc__))
