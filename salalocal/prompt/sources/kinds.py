"""First bytes -> what a file is: which archive to open, or which kind of binary to name; for the readers."""

HEAD_BYTES = 4096
"""How many bytes from the start of a file these functions want to see."""

# (offset, bytes, kind). All hold a byte that text does not hold, so no text is taken for one of them.
_BINARY_MAGIC = (
    (0, b"\x7fELF", "ELF program or library"),
    (0, b"\x89PNG\r\n\x1a\n", "PNG image"),
    (0, b"\xff\xd8\xff", "JPEG image"),
    (0, b"SQLite format 3\0", "SQLite database"),
    (0, b"\x00asm", "WebAssembly"),
    (0, b"\xca\xfe\xba\xbe", "Java class or Mach-O program"),
    (0, b"\xfe\xed\xfa\xce", "Mach-O program"),
    (0, b"\xcf\xfa\xed\xfe", "Mach-O program"),
    (0, b"\xce\xfa\xed\xfe", "Mach-O program"),
    (0, b"\x93NUMPY", "NumPy array"),
    (0, b"\x89HDF\r\n\x1a\n", "HDF5 data"),
    (0, b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1", "old Office document"),
    (0, b"\x1aE\xdf\xa3", "Matroska video"),
    (4, b"ftypM4A", "audio"),
    (0, b"\x00\x01\x00\x00\x00", "TrueType font"),
    (0, b"wOFF\x00", "web font"),
    (0, b"wOF2\x00", "web font"),
    (0, b"\x00\x00\x01\x00", "icon"),
    (0, b"!<arch>\n", "static library"),
    (0, b"\x28\xb5\x2f\xfd", "zstd data"),
)
# ASCII magic: believed only of data that is not clean text.
_BINARY_HINTS = (
    (0, b"GIF8", "GIF image"),
    (0, b"RIFF", "RIFF media"),
    (0, b"MZ", "Windows program"),
    (0, b"OggS", "Ogg media"),
    (0, b"ID3", "MP3 audio"),
    (0, b"fLaC", "FLAC audio"),
    (4, b"ftyp", "MP4 media"),
    (0, b"BM", "BMP image"),
    (0, b"II*\x00", "TIFF image"),
    (0, b"MM\x00*", "TIFF image"),
    (0, b"OTTO", "OpenType font"),
    (0, b"PAR1", "Parquet data"),
    (0, b"GGUF", "GGUF model"),
    (0, b"Rar!", "RAR archive"),
    (0, b"7z\xbc\xaf", "7z archive"),
    (0, b"\x80\x02", "pickle"),
    (0, b"\x80\x04\x95", "pickle"),
    (0, b"\xed\xab\xee\xdb", "RPM package"),
)
_STREAM_MAGIC = (
    (b"\x1f\x8b", "gzip"),
    (b"\xfd7zXZ\x00", "xz"),
    (b"\x28\xb5\x2f\xfd", "zstd"),
)
_USTAR = (b"ustar\x00", b"ustar  \x00")


def archive_kind(head: bytes) -> str:
    """Tell "zip", "tar", "gzip", "bzip2", "xz" or "zstd" by the first bytes; "" for everything else."""
    if head.startswith((b"PK\x03\x04", b"PK\x05\x06")):
        return "zip"
    for magic, kind in _STREAM_MAGIC:
        if head.startswith(magic):
            return kind
    if head[:3] == b"BZh" and head[3:4] in b"123456789" and head[4:10] in (b"1AY&SY", b"\x17rE8P\x90"):
        return "bzip2"
    return "tar" if is_tar(head) else ""


def is_tar(head: bytes) -> bool:
    """Tell a tar by its first block: the magic of POSIX and GNU, or, older than those, a checksum that fits."""
    block = head[:512]
    if len(block) < 512:
        return False
    return block[257:263] in _USTAR or block[257:265] in _USTAR or (any(block) and tar_checksum_fits(block))


def tar_checksum_fits(block: bytes) -> bool:
    """Check a tar header's sum of bytes, counted unsigned or, by old tools, signed."""
    try:
        stated = int(block[148:156].replace(b"\0", b" ").split()[0], 8)
    except (ValueError, IndexError):
        return False
    summed = block[:148] + b" " * 8 + block[156:512]
    unsigned = sum(summed)
    return stated == unsigned or stated == unsigned - 256 * sum(byte > 127 for byte in summed)


def binary_kind(head: bytes) -> str:
    """Name a binary that its first bytes give away beyond doubt; "" when only its text-likeness can tell."""
    for offset, magic, kind in _BINARY_MAGIC:
        if head.startswith(magic, offset):
            return kind
    if len(head) > 9 and head[8:9] == b"{" and 2 <= int.from_bytes(head[:8], "little") <= 100_000_000:
        return "safetensors weights"
    return ""


def guessed_binary_kind(head: bytes) -> str:
    """Name data that is known not to be text."""
    for offset, magic, kind in _BINARY_HINTS:
        if head.startswith(magic, offset):
            return kind
    return binary_kind(head) or "unknown kind"
