"""Bytes -> text, with everything that was guessed, replaced or looks odd said in notes; for the readers.

Order: byte order mark, strict UTF-8, UTF-16/32 by their pattern of NULs, then a guess. Nothing is lost in silence:
bytes that no encoding explains are counted. Text comes out as it is, line ends and control characters included.
"""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from salalocal.prompt.sources.faults import Refused
from salalocal.prompt.sources.kinds import HEAD_BYTES, guessed_binary_kind

_MARKS = (
    (b"\xef\xbb\xbf", "utf-8", ""),
    (b"\xff\xfe\x00\x00", "utf-32-le", "UTF-32 LE"),
    (b"\x00\x00\xfe\xff", "utf-32-be", "UTF-32 BE"),
    (b"\xff\xfe", "utf-16-le", "UTF-16 LE"),
    (b"\xfe\xff", "utf-16-be", "UTF-16 BE"),
)
# By which position in a group of bytes holds NULs when the text is mostly ASCII.
_NUL_PATTERNS = (
    ("utf-32-le", "UTF-32 LE", 4, (1, 2, 3)),
    ("utf-32-be", "UTF-32 BE", 4, (0, 1, 2)),
    ("utf-16-le", "UTF-16 LE", 2, (1,)),
    ("utf-16-be", "UTF-16 BE", 2, (0,)),
)
_SAMPLE_BYTES = 64 * 1024
_WINDOW_BYTES = 1024
_REACH_BYTES = 4096
# Shares of all bytes (or, for the last seven, of the bytes they speak of) at which a reading of the bytes is believed.
_FEW_NULS = 0.01
_FEW_CONTROLS = 0.02
_FEW_LOST = 0.02
_MANY_LOST = 0.3
_FEW_HIGH = 0.2
_NUL_SHARE = 0.15
_NUL_SHARE_32 = 0.5
_UTF8_SHARE = 0.6
_LONE_SHARE = 0.8
_WESTERN_SHARE = 0.98
_KOI8_SHARE = 0.8

# Controls that text files do not hold: not BEL to CR, not ESC; NULs are counted apart.
_ODD_CONTROLS = bytes(byte for byte in range(1, 0x20) if not 0x07 <= byte <= 0x0D and byte != 0x1B) + b"\x7f"
_ODD_CONTROLS_TEXT = re.compile(f"[{re.escape(_ODD_CONTROLS.decode())}]+")

_LOW = bytes(range(0x30))
_HIGH = re.compile(rb"[\x80-\xff]")
# An accented letter by itself, or two of them in a word of ASCII letters.
_LONE_HIGH = re.compile(
    rb"(?<![\x80-\xff])[\x80-\xff](?![\x80-\xff])"
    rb"|(?<=[A-Za-z])[\x80-\xff]{2}(?![\x80-\xff])|(?<![\x80-\xff])[\x80-\xff]{2}(?=[A-Za-z])"
)
# Lower-case Cyrillic in KOI8, where Windows-1251 has capitals.
_KOI8_WORDS = re.compile(rb"[\xe0-\xff]?[\xc0-\xdf]{2,}")
# White space, digits' neighbours and punctuation below "0": never the second byte of a character.
_BREAK = re.compile(rb"[\x00-\x2f]")
_BREAKS_TO_SPACE = bytes(0x20 if byte < 0x30 else byte for byte in range(256))
# Well-formed sequences of UTF-8, and the overlong ones and surrogates that only a broken writer of it makes.
_UTF8_LIKE = re.compile(rb"[\xc0-\xdf][\x80-\xbf]|[\xe0-\xef][\x80-\xbf]{2}|[\xf0-\xf4][\x80-\xbf]{3}")
# Bytes that Windows-1252 gives to letters, signs and punctuation of Western European text.
_WESTERN = re.compile(
    rb"[\xc0-\xcf\xd1-\xd6\xd8-\xdc\xdf-\xef\xf1-\xf6\xf8-\xfc\xff]"
    rb"|[\x80\x85\x8c\x91-\x97\x99\x9c\xa0-\xa3\xa7\xa9\xab\xae\xb0-\xb2\xb5\xb7\xbb\xbf]"
)
_CANDIDATES = [
    *("cp1252", "cp1251", "koi8_u", "cp866", "cp932", "euc_jp", "gb18030", "big5", "cp949"),
    *("cp1250", "iso8859_2", "cp1253", "cp1254", "cp1255", "cp1256"),
]

_CONTROL_TOKEN = re.compile(
    r"<\|[^|<>\s]{1,32}\|>|</?(?:think|tool_call|tool_response|documents|document_content)>"
    r"|</document>|<document index="
)
_DIRECTION = re.compile("[\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069]")
_TAGS = re.compile("[\U000e0000-\U000e007f]")

_ODDITIES = (
    (_CONTROL_TOKEN, "control-token text"),
    (_DIRECTION, "marks that turn the direction of writing"),
    (_TAGS, "hidden tag characters"),
)


Bytes = bytes | bytearray
RoomCheck = Callable[[int], None]


@dataclass(frozen=True)
class Decoded:
    """The text of a file and what has to be said about it."""

    text: str
    notes: tuple[str, ...]


def decode(data: Bytes, check_room: RoomCheck = lambda num_bytes: None) -> Decoded:
    """Decode the bytes of one file.

    `check_room` is called with the number of bytes when they look like text, before memory is taken for it.
    Raises Refused when they are not text, with the kind of binary they are.
    """
    text, notes = _decode_by_mark(data, check_room) or _decode_unmarked(data, check_room)
    return Decoded(text, (*notes, *_oddities(text)))


def _decode_by_mark(data: Bytes, check_room: RoomCheck) -> tuple[str, list[str]] | None:
    for mark, codec, name in _MARKS:
        if not data.startswith(mark) or (codec == "utf-32-le" and len(data) % 4):
            continue  # the second case is UTF-16 LE whose first character is a NUL
        body = data[len(mark) :]
        if codec == "utf-8":
            return _decode_unmarked(body, check_room)
        check_room(len(data))
        return _decode_wide(body, codec, f"decoded as {name} by its byte order mark")
    return None


def _decode_unmarked(data: Bytes, check_room: RoomCheck) -> tuple[str, list[str]]:
    num_nuls = data.count(0)
    if num_nuls:
        if wide := _wide_by_nuls(data):
            codec, name = wide
            check_room(len(data))
            return _decode_wide(data, codec, f"decoded as {name} by its NUL bytes, it has no byte order mark")
        if num_nuls > max(_FEW_NULS * len(data), 1):
            raise _binary(data)
    if len(data) - len(data.translate(None, delete=_ODD_CONTROLS)) > _FEW_CONTROLS * len(data):
        raise _binary(data)
    check_room(len(data))
    text, notes = _decode_narrow(data)
    return _show_nuls(text, notes)


def _show_nuls(text: str, notes: list[str]) -> tuple[str, list[str]]:
    num_nuls = text.count("\0")
    if not num_nuls:
        return text, notes
    return text.replace("\0", "\u2400"), [*notes, f"{num_nuls:,} NUL{'' if num_nuls == 1 else 's'} shown as \u2400"]


def _decode_narrow(data: Bytes) -> tuple[str, list[str]]:
    try:
        return data.decode("utf-8"), []
    except UnicodeDecodeError:
        sample = _sample(data)
    codec = "" if _is_broken_utf8(sample) else _guess(sample)
    if codec:
        text = data.decode(codec, "replace")
        num_lost = len(data) - len(text.replace("\ufffd", "").encode(codec, "ignore")) if "\ufffd" in text else 0
        if num_lost <= _FEW_LOST * len(data):
            return text, [f"decoded as {codec}, a guess", *_lost_note(num_lost)]
    num_lost = len(data) - len(data.decode("utf-8", "ignore").encode())
    if num_lost > _MANY_LOST * len(data):
        raise _binary(data)
    return data.decode("utf-8", "replace"), _lost_note(num_lost)


def _lost_note(num_lost: int) -> list[str]:
    return [f"{num_lost:,} byte{'' if num_lost == 1 else 's'} not decoded"] if num_lost else []


def _decode_wide(data: Bytes, codec: str, note: str) -> tuple[str, list[str]]:
    num_lost = 0
    try:
        text = data.decode(codec)
    except UnicodeDecodeError:
        text = data.decode(codec, "replace")
        num_lost = len(data) - len(data.decode(codec, "ignore").encode(codec))
    if num_lost > max(4, _FEW_LOST * len(data)) or _num_odd_controls(text) > _FEW_CONTROLS * len(text):
        raise _binary(data)
    return _show_nuls(text, [note, *_lost_note(num_lost)])


def _wide_by_nuls(data: Bytes) -> tuple[str, str] | None:
    """Tell UTF-16 and UTF-32 by NULs that stand at the same place of many groups of bytes.

    The other bytes at that place must be low, as the first halves of all characters but Chinese ones are: else words
    that are each ended by a NUL would do.
    """
    head = bytes(data[:_SAMPLE_BYTES])
    for codec, name, group, nul_places in _NUL_PATTERNS:
        places = [head[place::group] for place in range(group)]
        if len(head) < 2 * group:
            continue
        nuls = [place.count(0) / len(place) for place in places]
        has_nuls = all(nuls[place] >= (_NUL_SHARE if group == 2 else _NUL_SHARE_32) for place in nul_places)
        has_text = all(share <= _FEW_NULS for place, share in enumerate(nuls) if place not in nul_places)
        is_low = all(
            len(places[place].translate(None, delete=_LOW)) <= _FEW_HIGH * len(places[place]) for place in nul_places
        )
        if has_nuls and has_text and is_low:
            text = head[: len(head) // group * group].decode(codec, "replace")
            return (codec, name) if _num_odd_controls(text) <= _FEW_CONTROLS * len(text) else None
    return None


def _num_odd_controls(text: str) -> int:
    return len(text) - len(_ODD_CONTROLS_TEXT.sub("", text)) if _ODD_CONTROLS_TEXT.search(text) else 0


def _binary(data: Bytes) -> Refused:
    return Refused(f"binary ({guessed_binary_kind(bytes(data[:HEAD_BYTES]))})")


def _sample(data: Bytes) -> bytes:
    """Cut windows around bytes above 127, at white space or punctuation, where no encoding splits a character."""
    if len(data) <= _SAMPLE_BYTES:
        return bytes(data)
    windows: list[bytes] = []
    at = num_bytes = 0
    while num_bytes < _SAMPLE_BYTES and (high := _HIGH.search(data, at)):
        before = data[max(at, high.start() - _REACH_BYTES) : high.start()].translate(_BREAKS_TO_SPACE)
        start = high.start() - len(before) + before.rfind(b" ") + 1
        stop = _BREAK.search(data, high.start() + _WINDOW_BYTES, high.start() + _WINDOW_BYTES + _REACH_BYTES)
        at = stop.end() if stop else high.start() + _WINDOW_BYTES
        windows.append(bytes(data[start:at]))
        num_bytes += len(windows[-1])
    return b"".join(windows)


def _is_broken_utf8(sample: bytes) -> bool:
    num_high = len(_HIGH.findall(sample))
    num_like = sum(len(match) for match in _UTF8_LIKE.findall(sample))
    return num_like >= _UTF8_SHARE * num_high


def _guess(sample: bytes) -> str:
    num_high = len(_HIGH.findall(sample))
    num_lone = sum(map(len, _LONE_HIGH.findall(sample)))
    if num_lone >= _LONE_SHARE * num_high and len(_WESTERN.findall(sample)) >= _WESTERN_SHARE * num_high:
        return "cp1252"  # the detector below takes a few accented letters for Chinese or Central European
    from charset_normalizer import from_bytes

    best = from_bytes(sample, cp_isolation=_CANDIDATES, enable_fallback=False).best()
    guess = best.encoding if best is not None and best.encoding in _CANDIDATES else ""
    if guess != "cp1251" and sum(map(len, _KOI8_WORDS.findall(sample))) >= _KOI8_SHARE * num_high:
        return "koi8_u"  # nor does it know short texts in KOI8
    return guess


def _oddities(text: str) -> Iterator[str]:
    """Say what in a text a reader would not see, or would take for something else."""
    for pattern, what in _ODDITIES:
        count = sum(1 for _ in pattern.finditer(text))
        if count:
            yield f"contains {what}, {count:,} place{'' if count == 1 else 's'}"
