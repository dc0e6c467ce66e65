"""Tables of numbers written as text, a block at a time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import pyarrow as pa
from pyarrow import csv

from pointalign.data.files.source import MAX_LINE_BYTES, MEBIBYTE, Source, reason
from pointalign.errors import DataError

BLOCK_BYTES = 8 * MEBIBYTE
COMMENTS = (b"#", b"//", b"%")


def read_numbers(
    source: Source, width: int, kept: Sequence[int], delimiter: str | None = None, count: int | None = None
) -> Iterator[np.ndarray]:
    """Rows of numbers from where the file stands, one a line; empty lines and comments are passed over.

    Args:
        source: the file.
        width: how many numbers a line has.
        kept: which of them to give, in this order.
        delimiter: "," or ";" (then a comma is a decimal point); None for blanks and tabs.
        count: how many rows to read; all when None.

    Yields:
        (n, len(kept)) float64.

    Raises:
        DataError: when a line has another number of numbers or something else, or there are fewer than `count` lines.
    """
    done = 0
    names = [str(column) for column in range(width)]
    while (count is None or done < count) and (block := _block(source)):
        if b"\0" in block:
            raise DataError(f"{source.name} is not a text of numbers; give its format")
        block = _cleaned(block, delimiter)
        if count is not None:
            block = _first_lines(block, count - done)
        if not block.strip():
            continue
        try:
            table = csv.read_csv(
                pa.BufferReader(block),
                read_options=csv.ReadOptions(use_threads=False, block_size=len(block) + 1, column_names=names),
                parse_options=csv.ParseOptions(delimiter=delimiter or " "),
                convert_options=csv.ConvertOptions(
                    column_types=dict.fromkeys(names, pa.float64()),
                    include_columns=[names[at] for at in kept],
                    null_values=[],
                ),
            )
        except pa.ArrowInvalid as error:
            told = reason(error).removeprefix("CSV parse error: ")
            after = f" (counted after {done:,} points)" if done else ""
            raise DataError(f"{source.name} has a line that cannot be read: {told}{after}; mend it") from error
        done += table.num_rows
        yield np.stack([column.to_numpy() for column in table.columns], axis=1)
    if count is not None and done < count:
        raise DataError(f"{source.name} ends after {done:,} of {count:,} points; the file is cut short")


def _block(source: Source) -> bytes:
    """The next whole lines."""
    block = source.file.read(BLOCK_BYTES)
    if block and not block.endswith(b"\n"):
        rest = source.file.readline(MAX_LINE_BYTES)
        if len(rest) == MAX_LINE_BYTES:
            raise DataError(f"{source.name} has a line of a mebibyte; it is not a text of numbers")
        block += rest
    return block


def _cleaned(block: bytes, delimiter: str | None) -> bytes:
    """The same numbers with one separator between them, no sign that is not needed, and no comments."""
    block = block.removeprefix(b"\xef\xbb\xbf").replace(b"\r\n", b"\n").replace(b"\r", b"\n")
    if any(mark in block for mark in COMMENTS):
        block = b"\n".join(line for line in block.split(b"\n") if not line.lstrip().startswith(COMMENTS))
    if delimiter == ";":
        block = block.replace(b",", b".")
    separator = (delimiter or " ").encode()
    if delimiter is None:
        block = block.replace(b"\t", b" ")
        while b"  " in block:
            block = block.replace(b"  ", b" ")
        block = block.replace(b"\n ", b"\n").replace(b" \n", b"\n").strip(b" ")
    if b"+" in block:
        for before in (separator, b"\n", b" "):
            block = block.replace(before + b"+", before)
        block = block.removeprefix(b"+")
    return block


def _first_lines(block: bytes, count: int) -> bytes:
    """At most `count` lines that are not empty."""
    while b"\n\n" in block:
        block = block.replace(b"\n\n", b"\n")
    block = block.lstrip(b"\n")
    ends = np.flatnonzero(np.frombuffer(block, np.uint8) == ord("\n"))
    return block if len(ends) < count else block[: ends[count - 1] + 1]
