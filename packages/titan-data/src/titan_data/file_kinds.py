"""Detection of files that are not text by their first bytes."""

from __future__ import annotations

import lzma
import tarfile
import zlib

HEAD_BYTES = tarfile.BLOCKSIZE
"""Number of bytes at the beginning of a file that `kind_of` examines."""
_MAGIC = {
    b"PK\x03\x04": "a ZIP archive",
    b"7z\xbc\xaf\x27\x1c": "a 7-Zip archive",
    b"\x04\x22\x4d\x18": "an LZ4 file",
    b"\xff\x06\x00\x00sNaPpY": "a Snappy file",
    b"PAR1": "a Parquet file",
    b"ARROW1": "an Arrow file",
}
_ZLIB = (b"x\x01", b"x^", b"x\x9c", b"x\xda")  # text may also begin with x^
_LZMA = b"]\0\0"


def kind_of(head: bytes) -> str | None:
    """Return the kind of a non-text file that begins with `head` (512 bytes); None if the file may be text."""
    if _is_tar(head[:HEAD_BYTES]):
        return "a tar archive"
    if head.startswith(_ZLIB) and _unpacks(zlib.decompressobj(), head):
        return "a zlib stream"
    if head.startswith(_LZMA) and _unpacks(lzma.LZMADecompressor(format=lzma.FORMAT_ALONE), head):
        return "an LZMA file"
    return next((what for magic, what in _MAGIC.items() if head.startswith(magic)), None)


def _is_tar(block: bytes) -> bool:
    try:
        tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")  # checks the header's checksum
    except (tarfile.HeaderError, ValueError):
        return False
    return True


def _unpacks(decompressor: zlib._Decompress | lzma.LZMADecompressor, head: bytes) -> bool:
    try:
        decompressor.decompress(head)
    except (zlib.error, lzma.LZMAError):
        return False
    return True
