"""Say what a pretraining run will need: memory of a GPU, samples a second, hours, traffic.

    contrastive plan --config cc12m --gpus 8 --gpu h200
    contrastive plan --config cc12m --gpus 1 8 64 1024 --num_samples 10900000
    contrastive plan --config cc12m --model siglip_vit_l_16 --train.accumulate 4

All of pretrain's options count, as it takes them.
"""

from dataclasses import asdict

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from contrastive.command_line import print_json
from contrastive.named_sections import by_name

SHOWN = "config model gpus gpu num_samples utilisation tokens epochs batch_size accum_freq objectives json"


def main(args: list[str]) -> None:
    from contrastive.config import parse, recipe, written_options
    from contrastive.named_sections import take_option
    from contrastive.train.options import LENGTHS
    from contrastive.train.plan import GPUS, PlanConfig, make_plan, suggested

    args, chosen = take_option(args, "config")
    file = recipe(chosen or "quickstart")
    lengths = tuple(f"train.{name}" for name in LENGTHS)
    also = {"config": ("NAME", "The run's recipe ('list' shows them) or YAML file [quickstart]")}
    config = parse(PlanConfig, args, file, prog="plan", description=__doc__, either=(lengths,), also=also, shown=SHOWN)
    if config.gpu in ("list", "help"):
        print("\n".join(GPUS))
        return
    plan = make_plan(config)
    recipe_batch = written_options(PlanConfig, file).get("train.global_batch_size", config.train.global_batch_size)
    if config.json:
        print_json(asdict(plan))
        return
    console = Console()
    console.print(_facts(config, plan, suggested(config, recipe_batch), recipe_batch))
    console.print(_table(plan))


def _facts(config, plan, suggestion, recipe_batch: int) -> Table:
    weights, batch = plan.weights, config.train.global_batch_size
    rate, warmup = suggestion
    beside = weights.all - weights.image - weights.text
    grown = "" if recipe_batch == batch else f", by the square root of the batch from {recipe_batch:,}"
    warm = "" if warmup is None else f", {warmup:,} steps of warm-up"
    facts = {
        "parameters": f"{weights.all / 1e6:,.1f} M: image {weights.image / 1e6:,.1f}, text {weights.text / 1e6:,.1f}"
        + (f", only in training {beside / 1e6:,.1f}" if beside > 2 else ""),  # scale and bias are no tower's
        "FLOPs of a pair": f"{plan.model_flops / 1e9:,.1f} G forward and backward"
        + ("" if plan.flops == plan.model_flops else f", {plan.flops / 1e9:,.1f} G with what is computed twice"),
        "captions": f"{config.data.captions_per_image} of {plan.tokens} tokens each",
        "GPU": f"{config.gpu}, {plan.room / 2**30:.1f} GiB after CUDA's own; {config.utilisation:.0%} of its bf16 rate",
        "batch": f"{batch:,} pairs; suggested: learning rate {rate:.2g}{grown}{warm}",
    }
    needs = {name: own.NEEDS_DATA for name, own in by_name(config.objectives).items()}
    if left_out := "; ".join(f"{name}: {what}" for name, what in needs.items() if what):
        facts["not counted"] = left_out
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    for name, fact in facts.items():
        table.add_row(name, fact)
    return table


def _table(plan) -> Table:
    """One column for each number of GPUs."""
    table = Table("on GPUs", *(f"{each.gpus:,}" for each in plan.forecasts), box=SIMPLE_HEAD)
    for column in table.columns[1:]:
        column.justify = "right"

    def row(name: str, cells: list[str], **style) -> None:
        table.add_row(name, *cells, **style)

    row("micro-batch", [f"{each.micro_batch:,}" for each in plan.forecasts])
    for way, name in (("ddp", "DDP"), ("fsdp", "FSDP2")):
        found = [(each, getattr(each, way), getattr(each, f"{way}_batch")) for each in plan.forecasts]

        def cells(value, found=found) -> list[str]:
            return ["" if parts is None else value(each, parts, most) for each, parts, most in found]

        row(f"{name}, GiB", cells(lambda _, parts, __: _total(sum(parts.values()), plan.room)), style="bold")
        for part in dict.fromkeys(part for _, parts, _ in found for part in parts or ()):
            row(f"  {part}", cells(lambda _, parts, __, part=part: f"{parts[part] / 2**30:.2f}"))
        sent = f"{way}_sent"
        row("  sent in a step", cells(lambda each, _, __, sent=sent: f"{getattr(each, sent) / 2**30:.2f}"))
        row("  micro-batch that fits", cells(lambda _, __, most: f"{most:,}" if most else "none"))
        row("  with train.accumulate", cells(lambda each, _, most: f"{each.own_pairs // most:,}" if most else ""))
    row("samples/s", [f"{each.samples_per_second:,.0f}" for each in plan.forecasts])
    hours = ["?" if each.hours is None else f"{each.hours:,.1f}" for each in plan.forecasts]
    row("hours" if "?" not in hours else "hours: give --num_samples", hours)
    if any(sum(parts.values()) > plan.room for each in plan.forecasts for parts in (each.ddp, each.fsdp) if parts):
        table.caption = f"* more than the {plan.room / 2**30:.1f} GiB there are"
    return table


def _total(size: float, room: float) -> str:
    return f"{size / 2**30:.1f}{'*' if size > room else ''}"
