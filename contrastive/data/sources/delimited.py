"""CSV and TSV as people write them: which separator, which quotes, and which lines are no rows.

A reader that takes every quote for CSV's, where a text merely begins with one, makes all lines up to the next quote one
value, without a word.
"""

from __future__ import annotations

import csv
import io
from itertools import islice, zip_longest
from typing import TYPE_CHECKING, NamedTuple

from contrastive.data.record import FaultCounts
from contrastive.data.sources.columns import Columns, find_columns
from contrastive.errors import UserError

if TYPE_CHECKING:
    import pyarrow as pa

BLOCK_BYTES = 32 * 2**20  # no row may be longer: captions of megabytes do occur
_MOST_IRREGULAR = 0.01  # of the rows: with more of them, the table is not what it was taken for
_SEPARATORS = {",": "commas", "\t": "tabs", ";": "semicolons", "|": "bars"}


class Dialect(NamedTuple):
    """How a table is written. names: of all columns. head_lines: how many the header has. quoted: by CSV's rules."""

    separator: str
    names: list[str]
    head_lines: int
    quoted: bool = True


class _Scan(NamedTuple):
    """How many rows are below the header; (line, columns) of those that have another number of columns than it.

    fault: the first place where quotes break CSV's rules, 'a "b" c' in quotes, say. swallows: whether a quote that is
    never closed makes one value of the lines after it.
    """

    num_rows: int
    irregular: list[tuple[int, int]]
    fault: str
    swallows: bool


def read_delimited(path: str, usual: str, asked: Columns) -> tuple[Columns, pa.Table, tuple[str, ...], FaultCounts]:
    """Return which columns are read, these as texts, what there was to decide, and the lines that are no rows.

    Args:
        usual: the separator that the file's name speaks of; another is taken where only that finds an image column.

    Raises:
        UserError: no image column, quotes that cannot be told, more than 1 % of irregular rows.
        pa.ArrowException, OSError: damage.
    """
    import pyarrow as pa
    import pyarrow.compute as pc

    csv.field_size_limit(max(csv.field_size_limit(), BLOCK_BYTES))
    dialect, columns = _read_head(path, usual, asked)
    dialect, scan = _told_quotes(path, dialect)
    rows = _read(path, dialect, columns.names())
    lost, left_aside = scan.num_rows - rows.num_rows, FaultCounts()
    where = [f"line {line}: {held}, not {len(dialect.names)}" for line, held in scan.irregular] or [scan.fault]
    if lost > _MOST_IRREGULAR * scan.num_rows:
        kind = "tsv" if dialect.separator == "\t" else "csv"
        raise UserError(
            f"{path}: cannot be read as {kind}: {lost:,} of {scan.num_rows:,} rows have another number of columns than "
            f"the header's {len(dialect.names)}, first {where[0]} (separated by {_SEPARATORS[dialect.separator]}); "
            "quote values that hold the separator"
        )
    if lost:
        left_aside.add("rows of another number of columns", *where, count=lost)
    # Unchecked: a row of bad UTF-8 costs one sample when it is read, not the table now.
    unchecked = pc.CastOptions(target_type=pa.string(), allow_invalid_utf8=True)
    rows = pa.table({name: rows.column(name).cast(options=unchecked) for name in rows.column_names})
    notes = [] if dialect.separator == usual else [f"separated by {_SEPARATORS[dialect.separator]}"]
    return columns, rows, (*notes, *([] if dialect.quoted else ["quotes as they stand"])), left_aside


def _opened(path: str) -> io.TextIOWrapper:
    import pyarrow as pa

    # Arrow's stream unpacks .gz, as its readers do.
    return io.TextIOWrapper(io.BufferedReader(pa.input_stream(path)), "utf-8-sig", errors="replace", newline="")


def _read_head(path: str, usual: str, asked: Columns) -> tuple[Dialect, Columns]:
    """Read the header by the first separator that finds an image column."""
    refusals = {}
    for separator in (usual, *(other for other in _SEPARATORS if other != usual)):
        with _opened(path) as file:
            lines = csv.reader(file, delimiter=separator)
            names = [name.strip() for name in next(filter(None, lines), [])]
            dialect = Dialect(separator, names, lines.line_num)
            few = csv.reader(islice(file, 100), delimiter=separator, quoting=csv.QUOTE_NONE)
            rows = [row for row in few if len(row) == len(names)]
        numbers = [not any(cell.strip(".0123456789") for cell in cells) for cells in zip(*rows, strict=True)]
        held = [(name, "numbers" if of else "text") for name, of in zip_longest(names, numbers)]
        try:
            return dialect, find_columns(held, asked, path)
        except UserError as error:
            refusals.setdefault(len(names), str(error))
    most = max(refusals)  # what was found by the separator that finds the most columns
    tried = "" if most > 1 else f" (tried as separators: {', '.join(_SEPARATORS.values())})"
    raise UserError(refusals[most] + tried)


def _told_quotes(path: str, dialect: Dialect) -> tuple[Dialect, _Scan]:
    """Return the dialect with its quotes told, and its rows.

    CSV is read by its rules, as every reader does, but not where a quote that breaks them takes in other lines: then
    quotes are part of the texts, if so every line is a row. In TSV they mostly are (5" nail): the rules hold only where
    every quote keeps them, and no line inside of quotes is a row by itself.
    """
    by_rules, literal = _scan(path, dialect), dialect._replace(quoted=False)
    if dialect.separator != "\t" and not by_rules.swallows:
        return dialect, by_rules
    as_is = _scan(path, literal)
    if dialect.separator == "\t":
        # Of a value with k lines, k - 1 at least are no rows.
        mended = len(as_is.irregular) - len(by_rules.irregular)
        keeps_rules = not by_rules.fault and as_is.num_rows - by_rules.num_rows <= mended
        return (dialect, by_rules) if keeps_rules else (literal, as_is)
    if as_is.irregular:
        raise UserError(
            f"{path}, {by_rules.fault}: cannot be read as csv: a value that begins with a quote has to end with one, "
            "and a quote within it is doubled; mend the line, or write the table as .jsonl"
        )
    return literal, as_is


def _scan(path: str, dialect: Dialect) -> _Scan:
    """Go through the file with Python's csv, which tells where a row ends and where quotes are none of CSV's."""
    count, irregular, fault, swallows, begun = -1, [], "", False, 0
    with _opened(path) as file:
        quoting = csv.QUOTE_MINIMAL if dialect.quoted else csv.QUOTE_NONE
        lines = csv.reader(file, delimiter=dialect.separator, strict=dialect.quoted, quoting=quoting)
        while not swallows:
            try:
                for row in lines:
                    if len(row) != len(dialect.names) and row:
                        irregular.append((lines.line_num, len(row)))
                    count, begun = count + (row != []), lines.line_num
                break
            except csv.Error as error:  # of one line every reader makes a row, without its quotes
                fault, swallows = fault or f"line {lines.line_num} ({error})", lines.line_num - begun > 1
                count, begun = count + 1, lines.line_num
    return _Scan(count, irregular, fault, swallows)


def _read(path: str, dialect: Dialect, wanted: list[str]) -> pa.Table:
    """Return these columns, as bytes, without irregular rows."""
    from pyarrow import binary
    from pyarrow import csv as arrow_csv

    return arrow_csv.read_csv(
        path,
        read_options=arrow_csv.ReadOptions(
            block_size=BLOCK_BYTES, column_names=dialect.names, skip_rows=dialect.head_lines
        ),
        parse_options=arrow_csv.ParseOptions(
            delimiter=dialect.separator,
            quote_char='"' if dialect.quoted else False,
            newlines_in_values=dialect.quoted,
            invalid_row_handler=lambda row: "skip",
        ),
        convert_options=arrow_csv.ConvertOptions(include_columns=wanted, column_types=dict.fromkeys(wanted, binary())),
    )
