"""Unpack a .laz from standard input to standard output: run as a program, so that what it trips over ends only itself."""

from __future__ import annotations

import importlib
import sys

MAX_MEMORY = 2 * 2**30
RECORDS_AT_ONCE = 2**16


def main(record: int, count: int, start: int, laszip: bytes) -> None:
    """Write the records of a .laz as they are in a .las.

    Args:
        record: bytes of one.
        count: how many there are.
        start: where the compressed points begin.
        laszip: the variable-length record that tells how they are compressed.
    """
    lazrs = importlib.import_module("lazrs")
    if sys.platform != "win32":
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (MAX_MEMORY, MAX_MEMORY))
    sys.stdin.buffer.seek(start)
    decompressor = lazrs.LasZipDecompressor(sys.stdin.buffer, laszip)
    for done in range(0, count, RECORDS_AT_ONCE):
        records = bytearray(record * min(RECORDS_AT_ONCE, count - done))
        decompressor.decompress_many(records)
        sys.stdout.buffer.write(records)


if __name__ == "__main__":
    try:
        main(*(int(argument) for argument in sys.argv[1:4]), laszip=bytes.fromhex(sys.argv[4]))
    except BaseException as error:  # the decompressor's panics are no Exceptions
        sys.exit(f"{error}")
