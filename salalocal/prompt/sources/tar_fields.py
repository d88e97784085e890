"""Fields of tar headers and pax records -> numbers and names; nonsense raises Damage. For tar.py and sparse.py."""

import re

from salalocal.prompt.sources.faults import Damage

MAX_SIZE = 1 << 60
_RECORD = re.compile(rb"(\d{1,9}) ([^=]{1,255})=")
_OCTAL = re.compile(rb" *([0-7]*)[ \0]*\Z")


def number(value: bytes, what: str) -> int:
    """Read a header number: octal digits, or base 256 when the first bit is set. Raises Damage."""
    if value[0] & 0x80:
        result = int.from_bytes(value, "big") & ((1 << (8 * len(value) - 1)) - 1)
        is_negative = bool(value[0] & 0x40)
    else:
        match = _OCTAL.match(value)
        if match is None:
            raise Damage(f"the {what} in a header is not a number")
        result, is_negative = int(match[1] or b"0", 8), False
    if is_negative or result > MAX_SIZE:
        raise Damage(f"the {what} in a header makes no sense")
    return result


def decimal(value: bytes, what: str) -> int:
    """Read a decimal number of a pax record or a sparse map. Raises Damage."""
    if not value.isdigit() or len(value) > 19 or int(value) > MAX_SIZE:
        raise Damage(f"the {what} makes no sense")
    return int(value)


def pax_records(data: bytes) -> dict[bytes, bytes]:
    """Split the data of a pax header into its records. Raises Damage.

    The pieces of a sparse map that stand in records of their own (format 0.0) are joined to one, as in format 0.1.
    """
    records: dict[bytes, bytes] = {}
    sparse_parts = []
    at = 0
    while at < len(data):
        match = _RECORD.match(data, at)
        stop = at + int(match[1]) if match else 0
        if match is None or not match.end() < stop <= len(data) or data[stop - 1 : stop] != b"\n":
            raise Damage("a pax record is broken")
        key, value = match[2], data[match.end() : stop - 1]
        if key in (b"GNU.sparse.offset", b"GNU.sparse.numbytes"):
            sparse_parts.append(value)
        else:
            records[key] = value
        at = stop
    if sparse_parts:
        records[b"GNU.sparse.map"] = b",".join(sparse_parts)
    return records
