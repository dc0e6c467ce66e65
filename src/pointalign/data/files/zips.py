"""Zip archives from strangers: opened when their list of members is short, read within bounds."""

from __future__ import annotations

import struct
import zipfile

from pointalign.data.files.source import MEBIBYTE, Source, readable
from pointalign.errors import DataError

# Python keeps some ten times this of the list of members.
MAX_DIRECTORY_BYTES = 16 * MEBIBYTE
END, END_64 = b"PK\5\6", b"PK\6\7"
END_BYTES, LOCATOR_BYTES, LONGEST_COMMENT = 22, 20, 65535


def open_zip(source: Source) -> zipfile.ZipFile:
    """Open an archive.

    Raises:
        DataError: when it is no zip archive, or its list of members is longer than MAX_DIRECTORY_BYTES.

    Source: PKWARE's APPNOTE, sections 4.3.14 to 4.3.16.
    """
    source.file.seek(max(source.size - END_BYTES - LONGEST_COMMENT - LOCATOR_BYTES, 0))
    tail = source.file.read()
    at = tail.rfind(END)
    if at < 0 or len(tail) - at < END_BYTES:
        raise DataError(f"{source.name} has no list of members at its end; it is cut short or of another format")
    (size,) = struct.unpack_from("<I", tail, at + 12)
    if tail[at - LOCATOR_BYTES : at][:4] == END_64:
        (offset,) = struct.unpack_from("<Q", tail, at - LOCATOR_BYTES + 8)
        source.file.seek(min(offset, source.size))
        size = max(size, *struct.unpack("<Q", source.read_exactly(48)[40:]))
    if size > MAX_DIRECTORY_BYTES:
        raise DataError(f"{source.name} lists members in {readable(size)}; at most {readable(MAX_DIRECTORY_BYTES)}")
    source.file.seek(0)
    return zipfile.ZipFile(source.file)
