"""Counting the tokens of documents, without a model."""

import subprocess
import sys
from pathlib import Path

import tiny_tokenizer
from tiny_model import make_pack

from salalocal.session.tokens import ContextOverflow, TextCodec


def codec(folder: Path) -> TextCodec:
    tiny_tokenizer.write_tokenizer(folder)
    return TextCodec.from_folder(folder)


def test_every_token_of_the_prompt_is_counted_once(tmp_path: Path) -> None:
    opened = codec(tmp_path)
    pack = make_pack(a="alpha\n", b="beta beta\n" * 30)
    report = opened.report(pack, system="be short")
    assert [(document.path, document.num_bytes) for document in report.documents] == [("a.txt", 6), ("b.txt", 300)]
    assert [document.tokens for document in report.documents] == [
        tokens for _, tokens in opened.template.count_document_tokens(pack)
    ]
    assert report.total_tokens == report.document_tokens + report.other_tokens
    assert report.other_tokens > opened.report(pack).other_tokens > 0
    assert [document.path for document in report.largest(1)] == ["b.txt"]


def test_no_documents(tmp_path: Path) -> None:
    report = codec(tmp_path).report(None)
    assert report.documents == () and report.document_tokens == 0 < report.total_tokens


def test_an_overflow_fits_on_a_line_and_names_the_largest(tmp_path: Path) -> None:
    pack = make_pack(**{f"a-name-of-some-length-{'x' * 60}-{n}": "word " * n for n in range(1, 30)})
    error = ContextOverflow(codec(tmp_path).report(pack), 50)
    assert len(error.message) < 290 and len(error.hint) < 290
    assert "-29.txt" in error.hint and "50" in error.message


def test_counting_imports_no_torch(tmp_path: Path) -> None:
    code = "import sys, salalocal.session.tokens; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
