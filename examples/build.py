"""Packs examples/beacon/ into examples/beacon.tar.gz, the same bytes every time. Run: `python examples/build.py`."""

import gzip
import io
import sys
import tarfile
from pathlib import Path

HERE = Path(__file__).parent


def main() -> None:
    """Writes the archive."""
    plain = io.BytesIO()
    with tarfile.open(fileobj=plain, mode="w", format=tarfile.USTAR_FORMAT) as archive:
        for path in sorted(p for p in (HERE / "beacon").rglob("*") if p.is_file() and "__pycache__" not in p.parts):
            data = path.read_bytes()
            member = tarfile.TarInfo(path.relative_to(HERE).as_posix())
            member.size, member.mode = len(data), 0o644
            archive.addfile(member, io.BytesIO(data))
    target = HERE / "beacon.tar.gz"
    with target.open("wb") as file, gzip.GzipFile(filename="", mode="wb", fileobj=file, mtime=0) as packed:
        packed.write(plain.getvalue())
    sys.stdout.write(f"{target.name}: {target.stat().st_size:,} bytes\n")


if __name__ == "__main__":
    main()
