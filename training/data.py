"""Training text: packages from the Python index and the interpreter's own library -> one packed corpus and a manifest.

In: the package lists below. Out: training/data/corpus.jsonl.gz (git-ignored) with one file a line, {"package", "path",
"text", "split"}, and training/manifest.json (committed) with version, licence and sha256 of every wheel. For:
training/tokenizer.py and training/corpus.py. Run: `python training/data.py`.

Only packages under permissive licences are used. Whole packages are held out for the evaluation.
"""

import gzip
import hashlib
import json
import subprocess
import sys
import sysconfig
import zipfile
from collections.abc import Iterator
from pathlib import Path

HERE = Path(__file__).parent
WHEELS = HERE / "data" / "wheels"
CORPUS = HERE / "data" / "corpus.jsonl.gz"
MANIFEST = HERE / "manifest.json"

TRAIN_PACKAGES = {
    "django": "BSD-3-Clause",
    "twisted": "MIT",
    "flask": "BSD-3-Clause",
    "werkzeug": "BSD-3-Clause",
    "jinja2": "BSD-3-Clause",
    "click": "BSD-3-Clause",
    "requests": "Apache-2.0",
    "urllib3": "MIT",
    "httpx": "BSD-3-Clause",
    "aiohttp": "Apache-2.0",
    "starlette": "BSD-3-Clause",
    "fastapi": "MIT",
    "pydantic": "MIT",
    "attrs": "MIT",
    "pytest": "MIT",
    "tornado": "Apache-2.0",
    "scrapy": "BSD-3-Clause",
    "setuptools": "MIT",
    "pip": "MIT",
    "poetry": "MIT",
    "poetry-core": "MIT",
    "sphinx": "BSD-2-Clause",
    "pygments": "BSD-2-Clause",
    "luigi": "Apache-2.0",
    "dask": "BSD-3-Clause",
    "distributed": "BSD-3-Clause",
    "bokeh": "BSD-3-Clause",
    "ipython": "BSD-3-Clause",
    "peewee": "MIT",
    "alembic": "MIT",
    "marshmallow": "MIT",
    "kombu": "BSD-3-Clause",
    "redis": "MIT",
    "jsonschema": "MIT",
    "virtualenv": "MIT",
    "tox": "MIT",
    "wagtail": "BSD-3-Clause",
    "djangorestframework": "BSD-3-Clause",
    "apache-airflow-core": "Apache-2.0",
    "huggingface-hub": "Apache-2.0",
    "nltk": "Apache-2.0",
    "spacy": "MIT",
    "mypy": "MIT",
    "black": "MIT",
    "prefect": "Apache-2.0",
    "mlflow-skinny": "Apache-2.0",
    "optuna": "MIT",
    "gunicorn": "MIT",
    "uvicorn": "BSD-3-Clause",
    "streamlit": "Apache-2.0",
}
HELD_OUT_PACKAGES = {
    "networkx": "BSD-3-Clause",
    "sqlalchemy": "MIT",
    "celery": "BSD-3-Clause",
    "rich": "MIT",  # not used: pip, in the training list, carries a copy
    "textual": "MIT",
}
SUFFIXES = (".py", ".md", ".rst", ".toml", ".cfg", ".ini", ".yaml", ".yml", ".json")
MIN_FILE_BYTES, MAX_FILE_BYTES = 150, 60_000
PACKAGE_CAP_BYTES = 3_500_000


def pinned() -> dict[str, dict[str, str]]:
    """Versions and digests of the committed manifest, by package; empty when there is none yet."""
    if not MANIFEST.exists():
        return {}
    return {row["package"]: row for row in json.loads(MANIFEST.read_text()) if row["sha256"]}


def download(pins: dict[str, dict[str, str]]) -> None:
    """Fetches one wheel a package: the pinned version, or the newest where nothing is pinned."""
    WHEELS.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--only-binary=:all:", "-d", str(WHEELS)]
    for name in (*TRAIN_PACKAGES, *HELD_OUT_PACKAGES):
        wanted = f"{name}=={pins[name]['version']}" if name in pins else name
        if find_wheel(name) is None and subprocess.run([*command, wanted], check=False).returncode != 0:
            print(f"skipped: no wheel for {wanted}", file=sys.stderr)


def find_wheel(package: str) -> Path | None:
    """The downloaded wheel of a package."""
    prefix = package.replace("-", "_") + "-"
    return next((w for w in sorted(WHEELS.glob("*.whl")) if w.name.lower().startswith(prefix)), None)


def clean(raw: bytes) -> str | None:
    """File bytes as text with plain newlines, or None if it is not usable training text."""
    if not MIN_FILE_BYTES <= len(raw) <= MAX_FILE_BYTES:
        return None
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError:
        return None
    text = text.replace("\r\n", "\n").replace("\r", "\n").expandtabs(4)
    too_foreign = sum(ord(character) > 126 for character in text) > 0.02 * len(text)
    too_wide = max(map(len, text.split("\n"))) > 400
    return None if too_foreign or too_wide else text


def wheel_files(wheel: Path) -> Iterator[tuple[str, bytes]]:
    """Text members of a wheel by path, in a fixed pseudo-random order, so that a cap takes a fair sample."""
    with zipfile.ZipFile(wheel) as archive:
        names = [n for n in archive.namelist() if n.endswith(SUFFIXES) and ".dist-info/" not in n]
        for name in sorted(names, key=lambda n: hashlib.sha256(n.encode()).digest()):
            yield name, archive.read(name)


def library_files() -> Iterator[tuple[str, bytes]]:
    """The interpreter's own modules, without tests and installed packages."""
    root = Path(sysconfig.get_path("stdlib"))
    skipped = {"site-packages", "test", "tests", "idlelib", "lib2to3", "ensurepip", "__pycache__"}
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root)
        if not skipped & set(relative.parts):
            yield f"Lib/{relative.as_posix()}", path.read_bytes()


def pack(files: Iterator[tuple[str, bytes]], package: str, split: str, seen: set[str], out: gzip.GzipFile) -> int:
    """Appends one package's usable files to the corpus; returns the bytes of text written."""
    total = 0
    for path, raw in files:
        text = clean(raw)
        digest = hashlib.sha256(raw).hexdigest()
        if text is None or digest in seen:
            continue
        seen.add(digest)
        record = {"package": package, "path": path, "text": text, "split": split}
        out.write(json.dumps(record).encode() + b"\n")
        total += len(text)
        if total > PACKAGE_CAP_BYTES:
            break
    return total


def main() -> None:
    """Downloads, packs and writes the manifest."""
    pins = pinned()
    download(pins)
    manifest: list[dict[str, object]] = []
    seen: set[str] = set()
    with gzip.GzipFile(CORPUS, "wb", mtime=0) as out:
        for split, packages in (("heldout", HELD_OUT_PACKAGES), ("train", TRAIN_PACKAGES)):
            for package, licence in packages.items():
                wheel = find_wheel(package)
                if wheel is None:
                    continue
                used = pack(wheel_files(wheel), package, split, seen, out)
                sha256 = hashlib.sha256(wheel.read_bytes()).hexdigest()
                if package in pins and pins[package]["sha256"] != sha256:
                    raise SystemExit(f"{wheel.name} has the digest {sha256}, the manifest says another")
                version = wheel.name.split("-")[1]
                row = {"package": package, "version": version, "licence": licence, "split": split}
                manifest.append({**row, "sha256": sha256, "text_bytes": used})
        used = pack(library_files(), "cpython-lib", "train", seen, out)
        version = ".".join(map(str, sys.version_info[:3]))
        row = {"package": "cpython-lib", "version": version, "licence": "PSF-2.0", "split": "train"}
        manifest.append({**row, "sha256": None, "text_bytes": used})
    MANIFEST.write_text(json.dumps(manifest, indent=1) + "\n")
    print(f"{sum(int(str(r['text_bytes'])) for r in manifest) / 1e6:.1f} MB of text from {len(manifest)} packages")


if __name__ == "__main__":
    main()
