"""UTF-8 decoding, with errors that name the probable encoding of other text."""

from __future__ import annotations

import codecs
import re
from pathlib import Path

from titan_data.compression import format_of, require_readable

UTF8_MARK = codecs.BOM_UTF8
SAMPLE_BYTES = 1 << 16
_MARKS = {  # UTF-32 first: its mark begins with that of UTF-16
    codecs.BOM_UTF32_LE: "UTF-32",
    codecs.BOM_UTF32_BE: "UTF-32",
    codecs.BOM_UTF16_LE: "UTF-16",
    codecs.BOM_UTF16_BE: "UTF-16",
}
_SURROGATE = re.compile(rb"\xed[\xa0-\xbf][\x80-\xbf]")
_OTHERS = ["cp932", "euc_jp", "gb18030", "big5", "euc_kr", "cp1251", "koi8_r", "cp1250", "cp1253", "cp1255", "cp1256"]


def require_utf8(head: bytes, path: Path) -> None:
    """Raise ValueError if the decompressed file cannot be UTF-8 text, judged by its first bytes `head`.

    Detects archives, files compressed twice, and UTF-16 or UTF-32 with or without a byte order mark: in these
    encodings an ASCII character has a zero byte, which UTF-8 text does not contain.
    """
    require_readable(head, path)
    compression = format_of(head)
    if compression is not None:
        raise ValueError(
            f"{path} must be compressed only once, got {compression.name} data inside. Decompress it first."
        )
    name = next((name for mark, name in _MARKS.items() if head.startswith(mark)), None) or _by_zeros(head)
    if name is not None:
        raise ValueError(f"{path} must be UTF-8, got probably {name}. {_fix(path, name)}")


def decoded(content: bytes, path: Path) -> str:
    """Return the text of a file without its byte order mark. Raises ValueError with the line and probable encoding."""
    require_utf8(content[:SAMPLE_BYTES], path)
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise not_utf8(content, error.start, f"{path}, line {line}", path) from error


def not_utf8(content: bytes, position: int, place: str, path: Path) -> ValueError:
    """Return the error for invalid UTF-8 at byte `position` of `content`."""
    sample = content[max(0, position - SAMPLE_BYTES // 2) : position + SAMPLE_BYTES // 2]
    column = position - content.rfind(b"\n", 0, position)
    byte = f"byte 0x{content[position]:02x} at position {column:,} of the line"
    if _SURROGATE.match(content, position):
        return ValueError(f"{place} must be UTF-8, got an unpaired surrogate ({byte}). Write the file again as UTF-8.")
    names = [] if _is_mostly_utf8(sample) else _guesses(sample)
    if len(names) == 1:
        return ValueError(f"{place} must be UTF-8, got probably {names[0]}. {_fix(path, names[0])}")
    candidates = f" (possibly {', '.join(names[:-1])} or {names[-1]})" if names else ""
    return ValueError(f"{place} must be UTF-8, got {byte}{candidates}. {_fix(path, None)}")


def _by_zeros(head: bytes) -> str | None:
    head = head[: len(head) // 4 * 4]
    if len(head) < 4 or b"\0" not in head:
        return None
    shares = [head[place::4].count(0) * 4 / len(head) for place in range(4)]
    little, big = min(shares[1], shares[3]), min(shares[0], shares[2])
    if min(shares[:3]) > 0.5 or min(shares[1:]) > 0.5:
        name = "UTF-32-LE" if min(shares[1:]) > 0.5 else "UTF-32-BE"
    elif max(little, big) > 0.3:
        name = "UTF-16-LE" if little > big else "UTF-16-BE"
    else:
        return None
    text = codecs.getincrementaldecoder(name)("replace").decode(head)
    return None if "\0" in text or "\ufffd" in text else name  # otherwise binary numbers


def _is_mostly_utf8(sample: bytes) -> bool:
    """Return whether more of the non-ASCII characters are valid than invalid UTF-8."""
    non_ascii = re.sub(r"[\x00-\x7f]", "", sample.decode(errors="replace"))
    return 2 * non_ascii.count("\ufffd") < len(non_ascii)


def _guesses(sample: bytes) -> list[str]:
    """Return the probable encodings. Non-ASCII letters stand alone in Western European text, and in runs in others."""
    runs = re.findall(rb"[\x80-\xff]+", sample)
    if sum(len(run) == 1 for run in runs) > len(runs) / 2 and not re.search(rb"[\x80-\x9f]", b"".join(runs)):
        return ["ISO-8859-1"]
    if sum(len(run) == 1 for run in runs) > len(runs) * 0.8:
        return ["WINDOWS-1252"]
    import charset_normalizer

    matches = list(charset_normalizer.from_bytes(sample, cp_isolation=_OTHERS))  # best match first
    return [match.encoding for match in matches if match.chaos <= matches[0].chaos + 0.1]


def _fix(path: Path, name: str | None) -> str:
    return f"Convert it: iconv -f {name or 'ENCODING'} -t UTF-8 {path.name}."
