"""Bytes to text: the same text comes back, guesses are stated, and nothing is lost without a count."""

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from salalocal.prompt.sources.faults import Refused
from salalocal.prompt.sources.text import decode

SENTENCES = {
    "ru": ("Привет, как дела? Это конфигурационный файл сервера.\n", ["cp1251", "koi8_r", "cp866"]),
    "ja": ("設定ファイルです。テスト用のデータを読み込みます。ソース表示\n", ["shift_jis", "euc_jp"]),
    "zh": ("这是一个配置文件。\n端口号是8080。请读取数据。\n", ["gbk"]),
    "ko": ("이것은 설정 파일입니다. 포트 번호는 8080입니다.\n", ["euc_kr"]),
    "fr": ("# créé par André\nle café est fermé à l'été, où êtes-vous ?\n", ["latin-1", "cp1252"]),
    "de": ("// Größe der Tabelle\nint größe = 3; // für Übung\n", ["latin-1"]),
    "pt": ("# Não é possível abrir a configuração\n", ["latin-1"]),
    "pl": ("# plik utworzył Łukasz\nzażółć gęślą jaźń\n", ["cp1250"]),
    "el": ("Αυτό είναι ένα αρχείο ρυθμίσεων.\n", ["cp1253"]),
    "quotes": ("It\u2019s a \u201cquoted\u201d word \u2013 ok\n", ["cp1252"]),
}


@pytest.mark.parametrize(
    ("name", "codec"), [(name, codec) for name, (_, codecs) in SENTENCES.items() for codec in codecs]
)
@pytest.mark.parametrize("repeats", [1, 30, 3000])
def test_common_encodings_are_guessed_and_said(name: str, codec: str, repeats: int) -> None:
    text = SENTENCES[name][0] * repeats
    decoded = decode(text.encode(codec))
    assert decoded.text == text
    assert "a guess" in decoded.notes[0]


def test_one_name_in_a_large_source_file_is_western() -> None:
    code = "def f(x):\n    return x + 1\n" * 5_000
    text = f"{code}# by Martin v. Löwis\n{code}"
    assert decode(text.encode("latin-1")).text == text


@given(st.text())
def test_utf8_comes_back_as_it_was(text: str) -> None:
    if "\0" in text or text.startswith("\ufeff"):
        return
    try:
        decoded = decode(text.encode())
    except Refused:
        # Only what is full of control characters is taken for a binary.
        assert sum(char < " " or char == "\x7f" for char in text) > 0.01 * len(text)
        return
    assert decoded.text == text
    assert not any("decoded" in note for note in decoded.notes)


@given(st.binary(max_size=300))
def test_any_bytes_give_text_or_a_kind(data: bytes) -> None:
    try:
        decoded = decode(data)
    except Refused as refusal:
        assert refusal.reason.startswith("binary (")
        return
    decoded.text.encode()
    if decoded.text.encode() != data:
        assert decoded.notes or data.startswith(b"\xef\xbb\xbf")


@pytest.mark.parametrize("codec", ["utf-16-le", "utf-16-be", "utf-32-le", "utf-32-be"])
@given(text=st.text(st.characters(codec="utf-8", exclude_categories=["Cc"]), min_size=1, max_size=50))
def test_marked_wide_text_comes_back(codec: str, text: str) -> None:
    assert decode(("\ufeff" + text).encode(codec)).text == text


def test_utf16_that_is_mostly_cyrillic_is_told_by_its_spaces() -> None:
    text = "порт 8080, имя сервера: «альфа», да или нет?\n" * 20
    assert decode(text.encode("utf-16-le")).text == text


def test_every_lost_byte_is_counted(seed: int) -> None:
    rng = random.Random(seed)
    words = "déjà vu, naïve façade — ".encode() * 50
    data = bytearray()
    num_bad = rng.randrange(1, 40)
    for _ in range(num_bad):
        data += words + bytes([rng.choice([0xFF, 0xFE, 0xF8, 0xC0])]) + b" "
    decoded = decode(bytes(data))
    assert decoded.notes[0] == f"{num_bad:,} byte{'' if num_bad == 1 else 's'} not decoded"
    assert decoded.text.count("\ufffd") == num_bad


def test_random_bytes_are_no_text(seed: int) -> None:
    rng = random.Random(seed)
    for _ in range(50):
        data = rng.randbytes(rng.randrange(500, 5_000))
        with pytest.raises(Refused):
            decode(data)
        with pytest.raises(Refused):
            decode(data.replace(b"\0", b"\1"))


def test_few_nuls_are_kept_and_many_are_not_text() -> None:
    few = b"words and more words\n" * 100 + b"\0" * 20
    assert decode(few).text.endswith("\n" + "\u2400" * 20)
    for many in (few + b"\0" * 10, b"abc\0" * 100, b"key=value\0" * 10):
        with pytest.raises(Refused):
            decode(many)


def test_arrays_of_small_numbers_are_no_utf16(seed: int) -> None:
    rng = random.Random(seed)
    for size in (2, 4):
        data = b"".join(rng.randrange(200).to_bytes(size, "little") for _ in range(2_000))
        with pytest.raises(Refused):
            decode(data)


def test_room_is_asked_for_before_text_is_made() -> None:
    asked: list[int] = []
    decode(b"some text\n", asked.append)
    assert asked == [10]
    with pytest.raises(Refused):
        decode(bytes(range(256)) * 100, asked.append)
    assert asked == [10]
