"""XML from strangers: no document type, so no entities that multiply or name other files."""

from __future__ import annotations

from collections.abc import Callable
from typing import IO
from xml.parsers import expat

from pointalign.errors import DataError

MAX_XML_DEPTH = 256
BYTES_AT_ONCE = 2**16


def refuse_declarations(
    stream: IO[bytes],
    where: str,
    begin: Callable[[str, dict[str, str], int], None] | None = None,
    end: Callable[[str, int], None] | None = None,
    said: Callable[[str], None] | None = None,
) -> None:
    """Read an XML document once and keep nothing of it.

    Args:
        stream: the document.
        where: what to call the file in an error.
        begin: is told the name without namespace, the attributes and the place of each element that begins.
        end: is told the name and the place of each element that ends.
        said: is told the text between, in pieces.

    Raises:
        DataError: when it declares a document type, is nested deeper than MAX_XML_DEPTH, or is not well-formed.
    """
    parser = expat.ParserCreate()
    depth = 0

    def declared(*_: object) -> None:
        raise DataError(f"{where} declares an XML document type, which is not read; export it without")

    def begins(name: str, attributes: dict[str, str]) -> None:
        nonlocal depth
        depth += 1
        if depth > MAX_XML_DEPTH:
            raise DataError(f"{where} nests XML deeper than {MAX_XML_DEPTH}; export it again")
        if begin is not None:
            begin(name.rpartition(":")[2], attributes, parser.CurrentByteIndex)

    def ends(name: str) -> None:
        nonlocal depth
        depth -= 1
        if end is not None:
            end(name.rpartition(":")[2], parser.CurrentByteIndex)

    parser.StartDoctypeDeclHandler = declared
    parser.StartElementHandler = begins
    parser.EndElementHandler = ends
    if said is not None:
        parser.CharacterDataHandler = said
    try:
        while piece := stream.read(BYTES_AT_ONCE):
            parser.Parse(piece, False)
        parser.Parse(b"", True)
    except expat.ExpatError as error:
        raise DataError(f"{where} is not well-formed XML ({error}); the file is broken or cut short") from error
