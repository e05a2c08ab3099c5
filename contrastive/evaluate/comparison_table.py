"""The comparison as a table on the terminal and in Markdown."""

from collections.abc import Iterable

from rich import box
from rich.console import Console, Group
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from contrastive.evaluate.comparison import NOTE, Comparison, Row
from contrastive.evaluate.outcome import Figure


def print_comparison(comparison: Comparison, console: Console | None = None) -> None:
    """Print the headline figures: models side by side where they fit, else below each other."""
    console = console or Console(highlight=False)
    table: Table | Group = _side_by_side(comparison)
    unbound = console.options.update(max_width=100_000)
    if Measurement.get(console, unbound, table).minimum > console.width:
        table = _below_each_other(comparison)
    console.print(table)
    for line in comparison.failures:
        console.print(Text(f"failed: {line}", style="red"), soft_wrap=True)
    console.print(Text(f"{NOTE}{_limited(comparison)}", style="dim"))


def _side_by_side(comparison: Comparison) -> Table:
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1), pad_edge=False)
    table.add_column("task", overflow="fold", min_width=20)
    table.add_column("figure", no_wrap=True)
    table.add_column("chance", justify="right", no_wrap=True)
    for model in comparison.models:
        table.add_column(Text(model.name), justify="right", overflow="fold", min_width=12)
    for row, task in _with_tasks(comparison.rows()):
        cells = [_two_lines(row, cell) for cell in row.cells]
        table.add_row(task, row.label, _chance(row), *cells)
    return table


def _below_each_other(comparison: Comparison) -> Group:
    parts: list[Text | Table] = []
    for row in comparison.rows():
        parts.append(Text.assemble("\n", (row.task.title, "bold"), f" on {row.task.subtitle}"))
        parts.append(Text(f"{row.label}, chance {_chance(row)}" if row.label else "", style="dim"))
        table = Table.grid(padding=(0, 2))
        table.add_column(overflow="fold")
        table.add_column(justify="right", no_wrap=True)
        table.add_column(no_wrap=True)
        for model, cell in zip(comparison.models, row.cells, strict=True):
            table.add_row(Text(f"  {model.name}"), *map(Text, _written(row, cell)))
        parts.append(table)
    return Group(*parts, Text())


def _with_tasks(rows: Iterable[Row]) -> Iterable[tuple[Row, Text]]:
    """Each row with what its first column says: the task in the first of its rows, nothing in the others."""
    last = None
    for row in rows:
        told = (
            Text()
            if row.task is last
            else Text.assemble(row.task.title, ("\n" + row.task.subtitle.replace(", ", "\n"), "dim"))
        )
        last = row.task
        yield row, told


def _two_lines(row: Row, cell: Figure | str) -> Text:
    value, interval = _written(row, cell)
    return Text.assemble(value, (f"\n{interval}", "dim")) if interval else Text(value)


def _written(row: Row, cell: Figure | str) -> tuple[str, str]:
    """A cell's value and its interval."""
    if isinstance(cell, str):
        return cell, ""
    low_high = "" if cell.interval is None else "[{:.1f}, {:.1f}]".format(*cell.interval)
    return row.written(cell.value), low_high


def _chance(row: Row) -> str:
    return "–" if row.chance is None else row.written(row.chance)


def markdown(comparison: Comparison) -> str:
    """Return evaluation.md: the headline figures, every model a column."""
    names = [_escaped(model.name) for model in comparison.models]
    head = ["task", "data", "features", "figure", "chance", *names]
    lines = [f"# {_escaped(comparison.suite)}", "", _row(head), _row(["---"] * 4 + ["--:"] * (1 + len(names)))]
    for row in comparison.rows():
        cells = [" ".join(_written(row, cell)).strip() for cell in row.cells]
        told = (row.task.title, row.task.data, row.task.features, row.label, _chance(row))
        lines.append(_row([*map(_escaped, told), *cells]))
    lines += ["", f"{NOTE}{_limited(comparison)} {comparison.date}"]
    if comparison.failures:
        lines += ["", *(f"- failed: {_escaped(line)}" for line in comparison.failures)]
    return "\n".join(lines) + "\n"


def _limited(comparison: Comparison) -> str:
    return "" if comparison.limit is None else f" At most {comparison.limit:,} images of each data set."


def _row(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _escaped(text: str) -> str:
    """Text that Markdown shows as it is."""
    for character in "\\|*_`<[":
        text = text.replace(character, f"\\{character}")
    return text.replace("\n", " ")
