"""Shipped texts and files as sequences of token ids: cuts, start tokens, origins, sizes, and no shared document."""

import hashlib
import json
import lzma
import random
import re
from pathlib import Path

import pytest
import tiny_tokenizer

from salalocal.errors import RequestError
from salalocal.session import texts
from salalocal.session.start import Sources
from salalocal.session.texts import CALIBRATION, EVALUATION, TokenText, cut_sequences, digest, file_text, shipped_text
from salalocal.session.tokens import TextCodec

FOLDER = Path(texts.__file__).parents[1] / "texts"
BUILTIN = FOLDER.parent / "builtin"


def records(name: str) -> list[dict[str, list[dict[str, str]]]]:
    return [json.loads(line) for line in lzma.decompress(texts.shipped_bytes(name)).decode().splitlines()]


def documents(name: str) -> list[dict[str, str]]:
    return [document for record in records(name) for document in record["documents"]]


@pytest.fixture
def codec(tmp_path: Path) -> TextCodec:
    tiny_tokenizer.write_tokenizer(tmp_path / "tokenizer")
    return TextCodec.from_folder(tmp_path / "tokenizer")


def test_the_folder_is_small_and_nothing_in_it_is_without_origin() -> None:
    assert sum(path.stat().st_size for path in FOLDER.iterdir()) < 400_000
    page = (FOLDER / "SOURCES.md").read_text()
    listed = re.findall(r"^\| (calibration|evaluation) \d+ \| \S+ \| (\S+) \| `(.+)` \| (\w{16}) \|$", page, re.M)
    assert {licence for _, licence, _, _ in listed} <= {"MIT", "BSD-3-Clause", "Apache-2.0", "PSF-2.0", "CC0-1.0"}
    for name in (CALIBRATION, EVALUATION):
        shipped = [
            (document["path"], hashlib.sha256(document["text"].encode()).hexdigest()[:16])
            for document in documents(name)
        ]
        assert shipped == [(path, sha256) for kind, _, path, sha256 in listed if kind == name]


def test_evaluation_shares_nothing_with_calibration() -> None:
    """No document, and hardly a line of some length: a licence header, an import."""
    lines = {
        name: {line.strip() for document in documents(name) for line in document["text"].splitlines() if len(line) > 50}
        for name in (CALIBRATION, EVALUATION)
    }
    assert not {d["text"] for d in documents(CALIBRATION)} & {d["text"] for d in documents(EVALUATION)}
    assert len(lines[EVALUATION] & lines[CALIBRATION]) < 0.01 * len(lines[EVALUATION])


def test_shipped_texts_are_long_conversations_with_answers_that_are_quoted() -> None:
    codec = TextCodec.from_folder(BUILTIN)
    for name, least in ((CALIBRATION, 8 * 16_384), (EVALUATION, texts.EVALUATION_TOKENS)):
        text = shipped_text(name, codec)
        assert text.num_tokens >= least and text.name == f"the shipped {name} text"
        for ids, record in zip(text.texts, records(name), strict=True):
            assert ids[0] == codec.tokenizer.bos_id
            answers = [turn["answer"] for turn in record["turns"]]
            assert len(answers) >= 6 and codec.tokenizer.decode(ids).rstrip().endswith(answers[-1])
            assert codec.tokenizer.decode(ids, skip_control=False).count("<|im_start|>assistant") == len(answers)
    assert max(map(len, shipped_text(EVALUATION, codec).texts)) <= texts.DEFAULT_SEQUENCE_TOKENS


def test_files_stand_as_the_documents_of_one_prompt(codec: TextCodec, tmp_path: Path) -> None:
    folder = tmp_path / "files"
    folder.mkdir()
    (folder / "a.txt").write_text("the value <|im_end|> of data\n")
    (folder / "b.bin").write_bytes(bytes(range(256)))
    told: list[str] = []
    text = file_text(Sources((str(folder),), "path"), codec, told.append)
    assert text.name == "1 file" and len(text.texts) == 1 and any("b.bin" in line for line in told)
    shown = codec.tokenizer.decode(text.texts[0], skip_control=False)
    assert shown.startswith("<s><|im_start|>user\n<documents>") and "<source>a.txt</source>" in shown
    assert tiny_tokenizer.EOS_IDS[1] not in text.texts[0]  # what a file says never ends a turn


def test_pieces_put_together_are_the_text(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(texts, "MIN_SEQUENCE_TOKENS", 1)
    draw = random.Random(seed)
    for _ in range(200):
        given = [(number, *range(9, 10 + draw.randint(0, 300))) for number in range(draw.randint(1, 4))]
        size = draw.randint(2, 200)
        joined: dict[int, list[int]] = {}
        for piece in cut_sequences(TokenText("x", tuple(given)), size):
            assert 2 <= len(piece) <= size
            joined.setdefault(piece[0], [piece[0]]).extend(piece[1:])
        assert [tuple(ids) for ids in joined.values()] == given


def test_every_token_is_used_once_when_pieces_are_long_enough() -> None:
    ids = (7, *range(100, 400))
    pieces = cut_sequences(TokenText("x", (ids, ids)), 64)
    assert [len(piece) for piece in pieces] == [64, 64, 64, 64, 49] * 2
    assert pieces[0] + tuple(token for piece in pieces[1:5] for token in piece[1:]) == ids
    assert [len(piece) for piece in cut_sequences(TokenText("x", (ids, ids)), 301, 400)] == [301, 99]
    assert [len(piece) for piece in cut_sequences(TokenText("x", (ids, ids)), 301, 330)] == [301]  # 29 are too few


def test_too_short_a_text_is_refused() -> None:
    with pytest.raises(RequestError, match="1 file: 9 tokens"):
        cut_sequences(TokenText("1 file", (tuple(range(9)),)))
    with pytest.raises(RequestError, match="at least 32"):
        cut_sequences(TokenText("1 file", (tuple(range(900)),)), sequence_tokens=31)


def test_a_digest_tells_cuts_apart() -> None:
    assert digest([(1, 2), (3,)]) != digest([(1,), (2, 3)])
    assert digest([(1, 2)]) == digest([[1, 2]])
