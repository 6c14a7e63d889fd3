"""Decompression of gzip, Zstandard, xz and bzip2, detected by the first bytes of a file, not by its name."""

from __future__ import annotations

import bz2
import lzma
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from titan_data.cache import cached
from titan_data.file_kinds import HEAD_BYTES, kind_of

CHUNK_BYTES = 1 << 18


class Format(NamedTuple):
    """A compression format: its name, the first bytes of each frame, and a function that makes a frame decompressor."""

    name: str
    magic: bytes
    decompressor: Callable[[], Any]


def _zstandard() -> Any:
    import zstandard

    return zstandard.ZstdDecompressor(max_window_size=1 << 31).decompressobj()


FORMATS = (
    Format("gzip", b"\x1f\x8b", lambda: zlib.decompressobj(wbits=31)),
    Format("Zstandard", b"\x28\xb5\x2f\xfd", _zstandard),
    Format("xz", b"\xfd7zXZ\x00", lambda: lzma.LZMADecompressor(format=lzma.FORMAT_XZ)),
    Format("bzip2", b"BZh", bz2.BZ2Decompressor),
)
_SKIPPABLE = range(0x184D2A50, 0x184D2A60)  # Zstandard frames without data (pzstd writes one first)
_BZIP2_BLOCKS = (b"1AY&SY", b"\x17rE8P\x90")  # follow BZh and a digit; text may also begin with BZh


def compression_of(path: Path) -> Format | None:
    """Return the compression format of `path`, None if uncompressed. Raises ValueError for an unsupported format."""
    with path.open("rb") as file:
        head = file.read(HEAD_BYTES)
    require_readable(head, path)
    return format_of(head)


def require_readable(head: bytes, path: Path) -> None:
    """Raise ValueError if the first bytes of a file are those of an archive or of another unsupported format."""
    kind = kind_of(head)
    if kind is not None:
        raise ValueError(f"{path} must be text, plain or compressed with gzip, zstd, xz or bzip2, got {kind}.")


def unpacked(path: Path, cache_dir: str | Path | None) -> Path:
    """Return `path`, or if it is compressed, the cached file with its decompressed bytes. Raises as `read_all` does."""
    compression = compression_of(path)
    if compression is None:
        return path

    def make(target: BinaryIO) -> None:
        for piece in _decompressed(path, compression):
            target.write(piece)

    return cached(path, "unpacked", cache_dir, make)


def read_all(path: Path) -> bytes:
    """Return the decompressed bytes of `path`. Raises ValueError with file and position if it is damaged."""
    compression = compression_of(path)
    return path.read_bytes() if compression is None else b"".join(_decompressed(path, compression))


def _decompressed(path: Path, compression: Format) -> Iterator[bytes]:
    """Yield the decompressed bytes of all frames; `cat a.gz b.gz` and pzstd write files with several frames."""
    made, read = 0, 0
    frame, data, begun = compression.decompressor(), b"", False
    with path.open("rb") as file:
        while data := data or file.read(CHUNK_BYTES):
            if not begun and not _begins_frame(data, file, compression):
                if not data.strip(b"\0") and not file.read().strip(b"\0"):
                    return  # padding
                raise _damaged(path, compression, read, made, "the data after the last frame is not a frame")
            begun = True
            try:
                piece = frame.decompress(data)
            except Exception as error:  # each library has its own class
                raise _damaged(path, compression, read, made, str(error)) from error
            made += len(piece)
            yield piece
            rest = frame.unused_data if frame.eof else b""
            read += len(data) - len(rest)
            data = rest
            if frame.eof:
                frame, begun = compression.decompressor(), False
    if begun:
        raise _damaged(path, compression, read, made, "the file is truncated")


def _begins_frame(data: bytes, file: BinaryIO, compression: Format) -> bool:
    if len(data) < 16:  # the frame begins at the end of a chunk
        position = file.tell()
        data += file.read(16)
        file.seek(position)
    return format_of(data) == compression


def format_of(head: bytes) -> Format | None:
    """Return the compression format of a file by its first bytes (at least 16), None if it is uncompressed."""
    zstandard = next(each for each in FORMATS if each.name == "Zstandard")
    if int.from_bytes(head[:4], "little") in _SKIPPABLE:
        return zstandard
    found = next((each for each in FORMATS if head.startswith(each.magic)), None)
    if found is not None and found.name == "bzip2" and not head[4:10].startswith(_BZIP2_BLOCKS):
        return None
    return found


def _damaged(path: Path, compression: Format, read: int, made: int, what: str) -> ValueError:
    return ValueError(
        f"{path} must be a valid {compression.name} file, got damage at byte {read:,} of the file (byte {made:,} of "
        f"the decompressed data): {what}. Download it again."
    )
