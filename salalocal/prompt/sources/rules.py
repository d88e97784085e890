"""Names that are not worth reading -> the reason: version control, vendored and built trees, lock files and such."""

_TREES = {
    "version control folder": ".git .hg .svn .bzr CVS _darcs .jj .pijul",
    "vendored tree": "node_modules bower_components jspm_packages vendor _vendor third_party third-party"
    " thirdparty site-packages",
    "virtual environment": ".venv venv virtualenv .direnv",
    "cache": "__pycache__ .mypy_cache .pytest_cache .ruff_cache .hypothesis .tox .nox .cache .gradle .eggs"
    " .ipynb_checkpoints .terraform .import_linter_cache .parcel-cache .turbo",
    "macOS resource forks": "__MACOSX",
}
_TREE_REASONS = {name: reason for reason, names in _TREES.items() for name in names.split()}

_LOCK_FILES = frozenset(
    [
        *("package-lock.json", "npm-shrinkwrap.json", "yarn.lock", "pnpm-lock.yaml", "bun.lock", "deno.lock"),
        *("poetry.lock", "pipfile.lock", "uv.lock", "pdm.lock", "pixi.lock", "pylock.toml", "conda-lock.yml"),
        *("cargo.lock", "gemfile.lock", "composer.lock", "go.sum", "go.work.sum", "mix.lock", "pubspec.lock"),
        *("packages.lock.json", "podfile.lock", "cartfile.resolved", "package.resolved", "flake.lock"),
        *("gradle.lockfile", ".terraform.lock.hcl", "stack.yaml.lock", "cabal.project.freeze"),
    ]
)
_MINIFIED = (".min.js", ".min.mjs", ".min.cjs", ".min.css", ".bundle.js", "-min.js")
_MAPS = tuple(f".{kind}.map" for kind in ("js", "mjs", "cjs", "css", "ts", "jsx", "tsx"))
_FILES = {".ds_store": "macOS folder settings", "thumbs.db": "thumbnail cache"}

_MINIFIABLE = (".js", ".mjs", ".cjs", ".css")
_MINIFIED_LINE_CHARS = 500
_MINIFIED_MIN_CHARS = 10_000

# Formats that only the file name tells apart from a plain zip.
_ZIP_DOCUMENTS = (".docx", ".xlsx", ".pptx", ".odt", ".ods", ".odp", ".epub")


def tree_reason(name: str) -> str:
    """Say why a folder of this name is not entered, or "" when it is."""
    if name.endswith((".egg-info", ".dist-info")):
        return "package metadata"
    return _TREE_REASONS.get(name, "")


def skipped_tree(path: str) -> tuple[str, str]:
    """Find the first folder on a path that is not entered: (the folder with "/", reason), or two empty strings."""
    parts = path.split("/")
    for index, part in enumerate(parts[:-1]):
        if reason := tree_reason(part):
            return "/".join(parts[: index + 1]) + "/", reason
    return "", ""


def file_reason(path: str) -> str:
    """Say why a file of this name is not read, or "" when it is."""
    name = path.rpartition("/")[2].lower()
    if name in _LOCK_FILES:
        return "lock file"
    if name.endswith(_MINIFIED):
        return "minified"
    if name.endswith(_MAPS):
        return "source map"
    if name.startswith("._"):
        return "macOS resource fork"
    return _FILES.get(name, "")


def zip_document_reason(name: str) -> str:
    """Say that a zip is an office document or a book, by its name, or "" when it is an archive."""
    return "office documents and e-books are not read yet" if name.lower().endswith(_ZIP_DOCUMENTS) else ""


def is_minified(path: str, text: str) -> bool:
    """Tell a script or style sheet whose lines are too long to have been written by hand."""
    if len(text) < _MINIFIED_MIN_CHARS or not path.lower().endswith(_MINIFIABLE):
        return False
    return len(text) > _MINIFIED_LINE_CHARS * (text.count("\n") + 1)
