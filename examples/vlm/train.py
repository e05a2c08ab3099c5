"""Train a small vision-language model to caption images: a frozen encoder, a projector, a language model.

    accelerate launch examples/vlm/train.py runs/quickstart-sigmoid
    accelerate launch examples/vlm/train.py MODEL --data 'flickr8k/train-*.tar' --eval flickr8k/dev-000000.tar
    accelerate launch examples/vlm/train.py MODEL --language-model FOLDER --data pairs.csv --freeze-language-model

MODEL is what `contrastive.load_image_encoder` reads: a run of ours, or a folder of transformers, open_clip or timm.
Without --language-model a small Llama is trained from scratch; no download. Prints captions of held-out images, and,
where those have class names (scenes: colour and shape), the share of captions that name the right one and no other.
"""

import itertools
import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from caption_data import CaptionDataset, collate
from captioner import Captioner
from language import load_language, small_language
from scoring import score
from torch.utils.data import DataLoader
from tyro.conf import Positional, arg

import contrastive
from contrastive.command_line import CheckedOptions
from contrastive.config import parse
from contrastive.data.record import BadSample, Source
from contrastive.data.sources import announce, open_source
from contrastive.entry import run_script
from contrastive.errors import UserError
from contrastive.files import write_json
from contrastive.log import say
from contrastive.option_types import NotNegative, Positive

VOCABULARY_SAMPLES = 5_000


@dataclass(frozen=True, kw_only=True)
class CaptionerOptions(CheckedOptions):
    """What is trained on what."""

    encoder: Annotated[Positional[str], arg(metavar="MODEL")]
    """Whose image tower sees."""
    layer: int = -2
    """Hidden state that is read; -2: last but one, as LLaVA does."""
    language_model: Annotated[Path | None, arg(metavar="FOLDER")] = None
    """A trained one; none: a small one from scratch."""
    freeze_language_model: bool = False
    """Train the projector alone."""
    data: str = "scenes"
    """Images with captions."""
    eval: tuple[str, ...] = ("scenes:test", "scenes:heldout")
    """Held-out images."""
    steps: Positive[int] = 600
    """Optimizer steps."""
    batch_size: Positive[int] = 64
    """Of each process."""
    lr: Positive[float] = 1e-3
    """Peak learning rate."""
    workers: NotNegative[int] = 0
    """Processes that read images."""
    eval_images: Positive[int] = 640
    """How many to caption."""
    seed: int = 0
    """Of everything that is drawn."""
    out: Path = Path("runs/vlm")
    """A folder that is not there yet."""
    dry_run: bool = False
    """Show the data and the first captions, and stop there."""


def build(options: CaptionerOptions, source: Source) -> Captioner:
    encoder = contrastive.load_image_encoder(options.encoder, layer=options.layer)
    if options.language_model:
        language_model, tokenizer = load_language(options.language_model, trained=not options.freeze_language_model)
    elif options.freeze_language_model:
        raise UserError("--freeze-language-model needs a trained one: give --language-model FOLDER")
    else:
        language_model, tokenizer = small_language(sampled_captions(source))
    if options.freeze_language_model:
        language_model.requires_grad_(False)
    return Captioner(encoder, language_model, tokenizer)


def sampled_captions(source: Source):
    """Captions of up to VOCABULARY_SAMPLES samples, spread over the source."""
    for index in range(0, len(source), max(1, len(source) // VOCABULARY_SAMPLES)):
        try:
            yield from source.captions(index)
        except BadSample:
            continue


def train(model: Captioner, source: Source, options: CaptionerOptions, accelerator: Accelerator) -> Captioner:
    """Train in place; returns the bare model."""
    dataset = CaptionDataset(source, model.encoder.preprocess, model.tokenizer)
    loader = DataLoader(
        dataset, options.batch_size, shuffle=True, collate_fn=collate, num_workers=options.workers, drop_last=True
    )
    if len(loader) < accelerator.num_processes:
        raise UserError(f"{source.name} has {len(source)} samples, fewer than one batch a process; lower --batch-size")
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=options.lr, betas=(0.9, 0.95), weight_decay=0.01)
    wrapped, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    wrapped.train()
    batches = itertools.chain.from_iterable(itertools.repeat(loader))
    warmup, start = max(1, options.steps // 20), time.monotonic()
    for step, batch in enumerate(itertools.islice(batches, options.steps), start=1):
        # Stepped by hand: a schedule given to accelerate's prepare advances once for every process.
        decayed = 0.5 * (1 + math.cos(math.pi * (step - 1) / options.steps))
        for group in optimizer.param_groups:
            group["lr"] = options.lr * min(step / warmup, decayed)
        loss = wrapped(**batch)
        if not loss.isfinite():
            raise UserError(f"the loss is {loss.item()} at step {step}; lower --lr")
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % max(1, options.steps // 20) == 0 or step == 1:
            seconds = time.monotonic() - start
            say(f"step {step}/{options.steps}  loss {loss.item():.3f}  {seconds:.0f} s")
    return accelerator.unwrap_model(wrapped).eval()


def main(arguments: list[str]) -> None:
    options = parse(CaptionerOptions, arguments, prog="vlm", description=__doc__)
    if (options.out / "captioner.json").exists() or options.out.is_file():
        raise UserError(f"{options.out} is there already; nothing is overwritten: name another folder with --out")
    held_out = [open_source(spec) for spec in options.eval]
    set_seed(options.seed)
    accelerator = Accelerator()
    source = open_source(options.data)
    announce(source, "--data")
    for other in held_out:
        announce(other, "--eval")
    model = build(options, source)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    frozen = sum(p.numel() for p in model.parameters()) - trained
    say(f"{trained / 1e6:.2f} M parameters trained, {frozen / 1e6:.2f} M frozen; {model.num_patches} patches")
    if options.dry_run:
        for caption in itertools.islice(sampled_captions(source), 3):
            say(f"{caption!r} is read as {model.tokenizer.decode(model.tokenizer(caption)['input_ids'])!r}")
        return
    model = train(model, source, options, accelerator)
    if accelerator.is_main_process:
        model.save(options.out, str(options.encoder), options.layer)
        results = [score(model, source, options.eval_images, accelerator.device) for source in held_out]
        write_json(options.out / "results.json", results)
        say(f"wrote {options.out}; caption your own: python examples/vlm/caption.py {options.out} IMAGE...")
    accelerator.end_training()


if __name__ == "__main__":
    run_script("train.py", main)
