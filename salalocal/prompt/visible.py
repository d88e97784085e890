"""Text that may reach a terminal or an error line -> the same text with its unseen characters spelled out.

For every room that shows what it did not write: file names, model text, skip lines. Each character is mapped by
itself, so `visible(a) + visible(b) == visible(a + b)`: a streamed answer can pass through piece by piece.
"""

import re
import unicodedata

# C0 but \n and \t, DEL, C1, bidi controls, lone surrogates (they cannot be written as UTF-8), tag characters.
_CONTROL = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff\U000e0000-\U000e007f]"
)
_UNSEEN_CATEGORIES = frozenset({"Cc", "Cf", "Cs", "Co", "Zl", "Zp"})
# Letters and marks by category that draw nothing: grapheme joiner, Hangul fillers, Khmer vowels, braille blank,
# variation selectors, and the whole block of tags and selectors, assigned or not.
_BLANKS = frozenset(
    "\u034f\u115f\u1160\u17b4\u17b5\u2800\u3164\uffa0"
    + "".join(map(chr, (*range(0xFE00, 0xFE10), *range(0xE0000, 0xE1000))))
)


def visible(text: str) -> str:
    """Show control, escape, bidi and tag characters as `\\x1b`, `\\u202e` or `\\U000e0041`; keep the rest."""
    return _CONTROL.sub(lambda match: _escape(match[0]), text)


def visible_name(name: str) -> str:
    """Show everything in a file name that draws nothing or moves the cursor, newlines and zero-width marks too."""
    if name.isascii() and name.isprintable():
        return name
    return "".join(_escape(char) if _is_unseen(char) else char for char in name)


def quoted_name(name: str, max_chars: int = 80) -> str:
    """Give a file name in double quotes, made visible and shortened in its middle, for messages."""
    shown = visible_name(name[: 2 * max_chars] + name[-2 * max_chars :] if len(name) > 4 * max_chars else name)
    shown = shown.replace('"', '\\"')
    if len(shown) > max_chars:
        head = max_chars // 3
        shown = f"{shown[:head]}...{shown[-(max_chars - head - 3) :]}"
    return f'"{shown}"'


def _is_unseen(char: str) -> bool:
    category = unicodedata.category(char)
    return category in _UNSEEN_CATEGORIES or (category == "Zs" and char != " ") or char in _BLANKS


def _escape(char: str) -> str:
    code = ord(char)
    if code < 0x100:
        return f"\\x{code:02x}"
    return f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"
