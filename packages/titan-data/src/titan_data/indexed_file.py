"""Random access to the lines of a file through an index of their byte offsets."""

from __future__ import annotations

import os
import zlib
from array import array
from collections import OrderedDict
from pathlib import Path

from titan_data.encoding import SAMPLE_BYTES, UTF8_MARK, require_utf8

MAX_OPEN = 256
"""Maximum number of open files of a source; the usual limit of a process is 1,024."""


class IndexedFile:
    """The non-blank lines of a file, without byte order marks.

    path: the file named in errors. content: the file to read, which differs from `path` if that is compressed.
    is_open: the file descriptors in use, shared by the files of a source. size, checksum: of the whole content.
    Raises ValueError for UTF-16 and UTF-32, and for a file that has changed since it was opened.
    """

    def __init__(self, path: Path, content: Path, is_open: OrderedDict[IndexedFile, int]) -> None:
        self.path, self._content, self._is_open = path, content, is_open
        self.starts, self.ends = array("q"), array("q")
        with content.open("rb") as file:
            require_utf8(file.read(SAMPLE_BYTES), path)
            file.seek(0)
            self._stamp = _stamp(file.fileno())
            self.size = self.checksum = 0
            for line in file:
                begin = self.size
                if line.startswith(UTF8_MARK):  # in concatenated files, each may begin with a mark
                    begin += len(UTF8_MARK)
                if line[begin - self.size :].strip():
                    self.starts.append(begin)
                    self.ends.append(self.size + len(line))
                self.size += len(line)
                self.checksum = zlib.crc32(line, self.checksum)

    def line(self, number: int) -> bytes:
        """Return line `number`, counted from 0 without blank lines."""
        return self._read(self.starts[number], self.ends[number])

    def line_number(self, number: int) -> int:
        """Return the line number in the file, from 1 and including blank lines."""
        count, end = 1, self.starts[number]
        for begin in range(0, end, 1 << 20):
            count += self._read(begin, min(end, begin + (1 << 20))).count(b"\n")
        return count

    def _read(self, begin: int, end: int) -> bytes:
        """Return bytes `begin` to `end`. Uses pread: a memory-mapped file that is truncated would kill the process."""
        descriptor = self._descriptor()
        content = os.pread(descriptor, end - begin, begin)
        while 0 < len(content) < end - begin:
            more = os.pread(descriptor, end - begin - len(content), begin + len(content))
            if not more:
                break
            content += more
        if _stamp(descriptor) != self._stamp:
            self._require_unchanged(descriptor)
        return content

    def _descriptor(self) -> int:
        if self not in self._is_open:
            while len(self._is_open) >= MAX_OPEN:
                os.close(self._is_open.popitem(last=False)[1])
            self._is_open[self] = os.open(self._content, os.O_RDONLY | os.O_CLOEXEC)
        self._is_open.move_to_end(self)
        return self._is_open[self]

    def _require_unchanged(self, descriptor: int) -> None:
        """Raise ValueError if the content has changed; a file touched or replaced with the same bytes is accepted."""
        stamp, size, checksum = _stamp(descriptor), 0, 0
        while piece := os.pread(descriptor, 1 << 20, size):
            size += len(piece)
            checksum = zlib.crc32(piece, checksum)
        if (size, checksum) != (self.size, self.checksum):
            raise ValueError(
                f"{self.path} must not change while it is in use, got other content ({self.size:,} bytes before, "
                f"{size:,} now). Write new data to a new file."
            )
        self._stamp = stamp


def _stamp(descriptor: int) -> tuple[int, int, int]:
    status = os.fstat(descriptor)
    return status.st_ino, status.st_size, status.st_mtime_ns
