"""Bytes of a file -> bytes of what it compresses, in bounded pieces, checked to the stream's own end.

For the archive readers. A stream that is cut, altered or followed by something else raises Damage: gzip, bzip2 and
xz hold checksums that are verified only when a stream is read to its end, so readers drain it. zstd has one only if
its writer asked for it.
"""

import bz2
import lzma
import zlib
from collections.abc import Callable, Iterable, Iterator
from typing import BinaryIO, Protocol

import zstandard

from salalocal.prompt.sources.faults import Damage
from salalocal.prompt.sources.limits import Meter

PIECE_BYTES = 64 * 1024
_DECODER_MEMORY_BYTES = 128 << 20
# A zstd decoder cannot be told how much to give out; a block of 4 bytes may make 128 KiB.
_ZSTD_BITE_BYTES = 1024


class Decoder(Protocol):
    """What the decompressors of bz2 and lzma have in common: one stream, output in bounded pieces."""

    @property
    def eof(self) -> bool: ...
    @property
    def needs_input(self) -> bool: ...
    @property
    def unused_data(self) -> bytes: ...
    def decompress(self, data: bytes, max_length: int = -1, /) -> bytes: ...


class _ZlibDecoder:
    def __init__(self, window_bits: int) -> None:
        self._decoder = zlib.decompressobj(window_bits)
        self.needs_input = True

    @property
    def eof(self) -> bool:
        return self._decoder.eof

    @property
    def unused_data(self) -> bytes:
        return self._decoder.unused_data

    def decompress(self, data: bytes, max_length: int = -1, /) -> bytes:
        out = self._decoder.decompress(self._decoder.unconsumed_tail + data, max_length)
        self.needs_input = len(out) < max_length
        return out


class _ZstdDecoder:
    def __init__(self) -> None:
        self._decoder = zstandard.ZstdDecompressor(max_window_size=_DECODER_MEMORY_BYTES).decompressobj()
        self._waiting = memoryview(b"")

    @property
    def eof(self) -> bool:
        return self._decoder.eof

    @property
    def needs_input(self) -> bool:
        return not self._waiting

    @property
    def unused_data(self) -> bytes:
        return self._decoder.unused_data + bytes(self._waiting)

    def decompress(self, data: bytes, max_length: int = -1, /) -> bytes:
        if data:
            self._waiting = memoryview(bytes(self._waiting) + data)
        bite, self._waiting = self._waiting[:_ZSTD_BITE_BYTES], self._waiting[_ZSTD_BITE_BYTES:]
        return self._decoder.decompress(bite)


DECODERS: dict[str, Callable[[], Decoder]] = {
    "gzip": lambda: _ZlibDecoder(31),
    "deflate": lambda: _ZlibDecoder(-15),
    "bzip2": bz2.BZ2Decompressor,
    "xz": lambda: lzma.LZMADecompressor(lzma.FORMAT_XZ, _DECODER_MEMORY_BYTES),
    "zstd": _ZstdDecoder,
}
_DECODER_ERRORS = (zlib.error, OSError, EOFError, ValueError, lzma.LZMAError, zstandard.ZstdError, MemoryError)


def file_pieces(handle: BinaryIO, meter: Meter) -> Iterator[bytes]:
    """Read a file from where it stands to its end."""
    while piece := handle.read(PIECE_BYTES):
        meter.tick()
        yield piece


def counted(pieces: Iterable[bytes], meter: Meter) -> Iterator[bytes]:
    """Count pieces against the cap on all bytes read. Raises LimitHit."""
    for piece in pieces:
        meter.read(len(piece))
        yield piece


def decompressed(raw: Iterable[bytes], kind: str) -> Iterator[bytes]:
    """Decompress one or more streams that follow each other, zeros as padding between them. Raises Damage."""
    decoder: Decoder | None = None
    num_streams = 0
    for piece in raw:
        data = piece
        while data:
            if decoder is None:
                data = data.lstrip(b"\0") if num_streams else data
                if not data:
                    break
                decoder = DECODERS[kind]()
            yield from decode_all(decoder, data, kind)
            if not decoder.eof:
                break
            data = decoder.unused_data
            decoder = None
            num_streams += 1
    if decoder is not None or not num_streams:
        raise Damage(f"the {kind} stream is cut")


def decode_all(decoder: Decoder, data: bytes, kind: str) -> Iterator[bytes]:
    """Give out everything that a decoder makes of this input, in bounded pieces. Raises Damage."""
    while True:
        try:
            out = decoder.decompress(data, PIECE_BYTES)
        except _DECODER_ERRORS as error:
            raise Damage(f"{kind}: {str(error).strip() or 'bad data'}") from error
        data = b""
        if out:
            yield out
        if decoder.eof or decoder.needs_input:
            return


class ByteReader:
    """Exact reads over pieces of bytes; for formats that are parsed from front to back."""

    def __init__(self, pieces: Iterable[bytes]) -> None:
        self._pieces = iter(pieces)
        self._held = b""
        self._at = 0
        self._position = 0

    @property
    def position(self) -> int:
        """Bytes read so far."""
        return self._position

    def peek(self, num_bytes: int) -> bytes:
        """Look at the next bytes, fewer only at the end."""
        while len(self._held) - self._at < num_bytes:
            piece = next(self._pieces, b"")
            if not piece:
                break
            self._held = self._held[self._at :] + piece
            self._at = 0
        return self._held[self._at : self._at + num_bytes]

    def read(self, num_bytes: int) -> bytes:
        """Read exactly that many bytes; for small amounts. Raises Damage at an early end."""
        data = self.peek(num_bytes)
        if len(data) < num_bytes:
            raise Damage(f"cut at byte {self._position + len(data):,}")
        self._at += num_bytes
        self._position += num_bytes
        return data

    def pieces(self, num_bytes: int | None = None) -> Iterator[bytes]:
        """Give out that many bytes (all up to the end for None) as they come. Raises Damage at an early end."""
        left = num_bytes
        while left is None or left > 0:
            if self._at >= len(self._held):
                self._held, self._at = next(self._pieces, b""), 0
                if not self._held:
                    if left is None:
                        return
                    raise Damage(f"cut at byte {self._position:,}")
            stop = len(self._held) if left is None else min(len(self._held), self._at + left)
            piece = self._held[self._at : stop]
            self._at = stop
            self._position += len(piece)
            if left is not None:
                left -= len(piece)
            yield piece
