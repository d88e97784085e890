"""The texts that ship for calibration and evaluation: conversations about small archives, licence-clean.

In: training/data (the corpus and the wheels that `data.py` fetches), the standard library of CPython, this repository's
own pages and code at one commit, and a clone of the Chinese translation of Python's documentation. Out, in
salalocal/texts/: {calibration,evaluation}.jsonl.xz, SOURCES.md with origin and digest of every document, LICENSES.txt.
For: salalocal/session/texts.py. Run: `python -m training.texts --translations CLONE_OF_PYTHON_DOCS_ZH_CN`.

What is evaluated on comes from packages that neither the built-in model's training nor the calibration has seen, and
from pages of the language reference that are in neither. Conversations stand in an order in which every beginning of
the list is a fair mix, since a user may ask for fewer tokens than there are.
"""

import argparse
import hashlib
import json
import lzma
import random
import re
import subprocess
import sys
import sysconfig
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

from training.archive import ArchiveMaker
from training.corpus import Corpus
from training.data import find_wheel
from training.evaluate import unique_paths
from training.invent import word_list

ROOT = Path(__file__).parents[1]
TEXTS = ROOT / "salalocal" / "texts"
SEED = "texts-1"

CONVERSATION_TOKENS = 16_300  # of the built-in tokenizer; a bigger vocabulary makes fewer of them
PROSE_CHARACTERS = 50_000
CHINESE_CHARACTERS = 7_000
DRAWS = 30  # archives drawn for one place; the longest that fits is taken

TRAIN_PACKAGES = ("attrs", "click", "cpython-lib", "django", "httpx", "pydantic", "starlette")
HELD_OUT_PACKAGES = ("celery", "sqlalchemy")
LICENCES = {
    **dict.fromkeys(("attrs", "pydantic", "sqlalchemy"), "MIT"),
    **dict.fromkeys(("click", "django", "httpx", "starlette", "celery"), "BSD-3-Clause"),
    **dict.fromkeys(("cpython-lib", "python-reference", "cpython-headers"), "PSF-2.0"),
    "python-docs-zh-cn": "CC0-1.0",
    "salalocal": "Apache-2.0",
    "invented": "Apache-2.0",
}

OWN_COMMIT = "42e5fe0"
OWN_PAGES = (
    *("README.md", "docs/architecture.md", "docs/model.md", "CONTRIBUTING.md", "training/README.md"),
    *("salalocal/kernels/lightning.py", "salalocal/prompt/pack.py", "salalocal/settings.py"),
)
TRANSLATION_COMMIT = "693cf6be2bc17f3d50ee21fe207c6964f3fab130"
TRANSLATED_PAGES = ("tutorial/controlflow.po", "tutorial/datastructures.po")
WEB_FILES = re.compile(r"django/contrib/admin/(static/admin/(js|css)/[a-z_]+\.(js|css)|templates/admin/\w+\.html)")
HEADERS = ("object.h", "methodobject.h", "pyport.h", "sliceobject.h", "bytesobject.h")


@dataclass
class Conversation:
    """Documents of one kind with questions about them. `sources` names where each document comes from."""

    kind: str
    documents: list[tuple[str, str]]
    turns: list[tuple[str, str]]
    sources: list[str] = field(default_factory=list)

    def record(self) -> dict[str, object]:
        """One line of the shipped file."""
        return {
            "documents": [{"path": path, "text": text} for path, text in self.documents],
            "turns": [{"question": question, "answer": answer} for question, answer in self.turns],
        }


def packages(split: str, names: tuple[str, ...]) -> Corpus:
    """The corpus of one split, these packages only."""
    whole = Corpus.load(split)
    return Corpus({name: whole.packages[name] for name in names}, whole.tokenizer)


def archive(corpus: Corpus, package: str, words: list[str]) -> Conversation:
    """Files of a package with invented lines in them, and questions that quote their lines."""
    one = Corpus({package: corpus.packages[package]}, corpus.tokenizer)
    maker = ArchiveMaker(one, words, random.Random(f"{SEED} {package}"))
    drawn = [unique_paths(maker.archive(CONVERSATION_TOKENS - 1_200, 10)) for _ in range(DRAWS)]
    lengths = [len(maker.prompt(documents)[0]) for documents in drawn]
    fitting = [length if length <= CONVERSATION_TOKENS - 800 else 0 for length in lengths]
    documents = drawn[fitting.index(max(fitting))]
    turns = [(turn.question, turn.answer) for turn in maker.turns(documents, 14)]
    real = {file.path for file in corpus.packages[package]}
    texts = [(document.path, "".join(document.lines)) for document in documents]
    return Conversation("archive", texts, turns, [package if path in real else "invented" for path, _ in texts])


def sentences(texts: list[str], end: str) -> list[str]:
    """The sentences of plain paragraphs that can be quoted without doubt: neither short nor long, and only once."""
    found = []
    for text in texts:
        for paragraph in re.split(r"\n\s*\n", text):
            line = " ".join(paragraph.split())
            found += [part.strip() for part in re.findall(rf".+?[{end}](?:\s|$)" if end == "." else rf".+?{end}", line)]
            found.append("")  # the end of a paragraph
    whole = "\n".join(" ".join(text.split()) for text in texts)
    return [s if is_plain(s) and whole.count(s) == 1 else "" for s in found]


def is_plain(sentence: str) -> bool:
    """Prose of a middling length: no table, code or heading."""
    first = sentence[:1]
    return 30 <= len(sentence.encode()) <= 240 and (first.isupper() or not first.isascii()) and "|" not in sentence


def quoting(texts: list[str], seed: str, wording: str, end: str = ".", count: int = 8) -> list[tuple[str, str]]:
    """Questions for the sentence that follows another one."""
    found = sentences(texts, end)
    pairs = [(first, second) for first, second in pairwise(found) if first and second]
    return [(wording.format(first), second) for first, second in random.Random(seed).sample(pairs, count)]


def prose(part: int) -> Conversation:
    """Pages of Python's language reference; parts share no page, and no section that stands in several pages."""
    from pydoc_data.topics import topics

    names = sorted(topics, key=lambda name: hashlib.sha256(f"{SEED} {name}".encode()).digest())
    chosen: list[list[str]] = [[], [], []]
    sizes = [0, 0, 0]
    seen: set[str] = set()
    for name in names:
        smallest = sizes.index(min(sizes))
        lines = {line.strip() for line in topics[name].splitlines() if len(line.strip()) > 40}
        is_fitting = 600 < len(topics[name]) < 30_000 and sizes[smallest] + len(topics[name]) <= PROSE_CHARACTERS
        if is_fitting and not lines & seen:
            chosen[smallest].append(name)
            sizes[smallest] += len(topics[name])
            seen |= lines
    documents = [(f"reference/{name}.rst", topics[name].strip() + "\n") for name in chosen[part]]
    turns = quoting([text for _, text in documents], f"{SEED} prose {part}", 'Which sentence follows "{}"?')
    return Conversation("prose", documents, turns, ["python-reference"] * len(documents))


def web() -> Conversation:
    """JavaScript, style sheets, templates and C headers."""
    wheel = find_wheel("django")
    assert wheel is not None, "python training/data.py fetches it"
    documents, sources = [], []
    with zipfile.ZipFile(wheel) as stored:
        names = sorted(n for n in stored.namelist() if WEB_FILES.fullmatch(n))
        names.sort(key=lambda n: hashlib.sha256(n.encode()).digest())
        for name in names:
            text = stored.read(name).decode()
            if 800 < len(text) < 8_000 and sum(len(t) for _, t in documents) + len(text) < 26_000:
                documents.append((name, text))
                sources.append("django")
    for name in HEADERS:
        text = (Path(sysconfig.get_path("include")) / name).read_text()
        if sum(len(t) for _, t in documents) + len(text) < 44_000:
            documents.append((f"Include/{name}", text.expandtabs(4)))
            sources.append("cpython-headers")
    lines = [line for _, text in documents for line in text.splitlines()]
    unique = [line.strip() if 16 <= len(line.strip()) <= 90 and lines.count(line) == 1 else "" for line in lines]
    pairs = [(a, b) for a, b in pairwise(unique) if a and b]
    turns = [(f"Which line follows `{a}`?", b) for a, b in random.Random(f"{SEED} web").sample(pairs, 8)]
    return Conversation("web", documents, turns, sources)


def git_text(repository: Path, commit: str, path: str) -> str:
    """A file of a commit."""
    command = ["git", "-C", str(repository), "show", f"{commit}:{path}"]
    return subprocess.run(command, check=True, capture_output=True).stdout.decode()


def own() -> Conversation:
    """This project's own pages and code."""
    documents = [(path, git_text(ROOT, OWN_COMMIT, path)) for path in OWN_PAGES]
    pages = [text for path, text in documents if path.endswith(".md")]
    turns = quoting(pages, f"{SEED} own", 'Which sentence follows "{}"?')
    return Conversation("own", documents, turns, ["salalocal"] * len(documents))


def chinese(repository: Path) -> Conversation:
    """Chinese prose: the translator's half of two chapters."""
    documents = []
    for path in TRANSLATED_PAGES:
        text = "\n\n".join(translations(git_text(repository, TRANSLATION_COMMIT, path)))
        documents.append((path.replace(".po", ".txt"), text[:CHINESE_CHARACTERS].rpartition("\n\n")[0] + "\n"))
    wording = "“{}”的下一句是什么？"  # noqa: RUF001
    turns = quoting([text for _, text in documents], f"{SEED} chinese", wording, end="。", count=6)
    return Conversation("chinese", documents, turns, ["python-docs-zh-cn"] * len(documents))


def translations(po: str) -> Iterator[str]:
    """The msgstr of every entry, without the header."""
    for entry in po.split("\n\n")[1:]:
        _, found, translated = entry.partition("\nmsgstr ")
        text = "".join(json.loads(line) for line in translated.split("\n") if line.startswith('"')) if found else ""
        if text:
            yield text


def conversations(repository: Path) -> dict[str, list[Conversation]]:
    """Both lists, in their order."""
    train, held_out = packages("train", TRAIN_PACKAGES), packages("heldout", HELD_OUT_PACKAGES)

    def archives(corpus: Corpus, is_heldout: bool) -> Iterator[Conversation]:
        lines = [line for name in corpus.names for file in corpus.packages[name] for line in file.lines]
        words = word_list(lines, corpus.tokenizer, is_heldout)
        for name in corpus.names:
            yield archive(corpus, name, words)

    made, tested = archives(train, False), archives(held_out, True)
    return {
        "calibration": [
            *(next(made), prose(0), next(made), web(), next(made), own(), next(made)),
            *(next(made), prose(1), chinese(repository), next(made), next(made)),
        ],
        "evaluation": [next(tested), next(tested), prose(2)],
    }


def sources_page(made: dict[str, list[Conversation]], sizes: dict[str, int]) -> str:
    """SOURCES.md: the rule, a table of sources, and every document with its digest."""
    rows = []
    for name, found in made.items():
        for number, conversation in enumerate(found, 1):
            for (path, text), source in zip(conversation.documents, conversation.sources, strict=True):
                digest = hashlib.sha256(text.encode()).hexdigest()[:16]
                rows.append(f"| {name} {number} | {source} | {LICENCES[source]} | `{path}` | {digest} |")
    listed = "\n".join(rows)
    return f"""# Texts for calibration and evaluation

Conversations about small archives. `calibration.jsonl.xz` ({sizes["calibration"]:,} bytes) is what `quantize --method
gptq` calibrates on without `--calibration`; `evaluation.jsonl.xz` ({sizes["evaluation"]:,} bytes) is what `eval
divergence` and the quality card measure on. They share no document. `python -m training.texts` makes this folder.

`{sys.implementation.name} {".".join(map(str, sys.version_info[:3]))}` gave cpython-lib, cpython-headers (`Include/`)
and python-reference (`pydoc_data/topics.py`); the packages are those that `training/manifest.json` pins;
python-docs-zh-cn is https://github.com/python/python-docs-zh-cn at {TRANSLATION_COMMIT},
`msgstr` only, which its translators have given under CC0; salalocal is this repository at {OWN_COMMIT}. Questions,
answers and the documents called invented were generated by `training/`. Files of an archive may be cut to a run of
their lines, with invented lines put in. LICENSES.txt holds the licences.

| conversation | source | licence | document | sha256 |
|---|---|---|---|---|
{listed}
"""


def licences(used: set[str]) -> str:
    """The licence texts of everything that is not ours."""
    parts = []
    for package in sorted(used & {*TRAIN_PACKAGES, *HELD_OUT_PACKAGES} - {"cpython-lib"}):
        wheel = find_wheel(package)
        assert wheel is not None, "python training/data.py fetches it"
        with zipfile.ZipFile(wheel) as stored:
            names = [n for n in stored.namelist() if re.search(r"\.dist-info/(licenses/)?(LICEN[CS]E[^/]*)$", n)]
            assert names, f"{package}: no licence in its wheel"
            text = stored.read(sorted(names)[0]).decode().strip()
        parts.append(f"{package} ({LICENCES[package]})\n\n{text}")
    python = (Path(sysconfig.get_path("stdlib")) / "LICENSE.txt").read_text().strip()
    parts.append(f"cpython-lib, cpython-headers, python-reference (PSF-2.0)\n\n{python}")
    rule = "\n\n" + "=" * 80 + "\n\n"
    return rule.join(parts) + "\n"


def main() -> None:
    """Makes everything and says how large it is."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--translations", type=Path, required=True, help="a clone of python/python-docs-zh-cn")
    arguments = parser.parse_args()
    made = conversations(arguments.translations)
    TEXTS.mkdir(exist_ok=True)
    sizes = {}
    for name, found in made.items():
        lines = "".join(json.dumps(conversation.record(), ensure_ascii=False) + "\n" for conversation in found)
        packed = lzma.compress(lines.encode(), preset=9 | lzma.PRESET_EXTREME)
        (TEXTS / f"{name}.jsonl.xz").write_bytes(packed)
        sizes[name] = len(packed)
        print(f"{name}: {len(found)} conversations, {len(lines.encode()):,} bytes, packed {len(packed):,}")
    used = {source for found in made.values() for conversation in found for source in conversation.sources}
    (TEXTS / "SOURCES.md").write_text(sources_page(made, sizes))
    (TEXTS / "LICENSES.txt").write_text(licences(used))


if __name__ == "__main__":
    main()
