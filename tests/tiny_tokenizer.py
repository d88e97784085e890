"""Tiny deterministic tokenizers as model folders, for tests of every room.

write_tokenizer: byte-level BPE (GPT-2 split), as the embedded model has. write_metaspace_tokenizer: SentencePiece style
(dummy prefix, U+2581 for spaces, byte fallback), as the released 9B has. Both hold the same special tokens in the same
places: <unk> 0, <s> 1, </s> 2 and the eight ChatML and code markers behind the base pieces.
"""

import json
from pathlib import Path
from typing import Any

from salalocal.prompt.template import STANDARD_TEMPLATE

CONTROL_TOKENS = (
    "<|im_end|>",
    "<|im_start|>",
    "<|tool_call|>",
    "<|execute_start|>",
    "<|execute_end|>",
    "<|fim_prefix|>",
    "<|fim_middle|>",
    "<|fim_suffix|>",
)
START_TOKENS = ("<unk>", "<s>", "</s>")
WORDS = [
    *("the", "return", "self", "import", "value", "name", "def", "class", "from", "that", "this", "with", "for", "and"),
    *("not", "file", "config", "test", "data", "what", "is", "in", "of", "to", "a", "b", "c", "user", "assistant"),
    *("system", "documents", "document", "source", "content", "index", "print", "None", "True"),
]


def byte_alphabet() -> list[str]:
    """The printable character that stands for each byte in a byte-level vocabulary."""
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAC + 1), *range(0xAE, 0xFF + 1)]
    spare = iter(range(256, 512))
    return [chr(byte) if byte in printable else chr(next(spare)) for byte in range(256)]


def _grow(vocab: dict[str, int], words: list[str], space: str) -> list[list[str]]:
    """Merges that build each word from left to right, then the word behind a space; new pieces go to the end."""
    merges = [[word[: end - 1], word[end - 1]] for word in words for end in range(2, len(word) + 1)]
    merges += [[space, word] for word in words]
    unique = {left + right: [left, right] for left, right in reversed(merges) if left + right not in vocab}
    ordered = list(reversed(unique.values()))
    vocab.update({left + right: len(vocab) + i for i, (left, right) in enumerate(ordered)})
    return ordered


def _added(vocab_size: int) -> list[dict[str, Any]]:
    contents = [*enumerate(START_TOKENS), *enumerate(CONTROL_TOKENS, start=vocab_size)]
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    return [{"id": i, "content": content, **flags} for i, content in contents]


def tokenizer_json() -> dict[str, Any]:
    """The byte-level tokenizer.json: 3 + 256 + merged pieces + 8 control tokens."""
    vocab = {token: i for i, token in enumerate([*START_TOKENS, *byte_alphabet()])}
    space, newline = byte_alphabet()[32], byte_alphabet()[10]
    merges = _grow(vocab, [*WORDS, space * 4, newline * 2], space)
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": _added(len(vocab)),
        "normalizer": None,
        "pre_tokenizer": byte_level,
        "post_processor": None,
        "decoder": byte_level,
        "model": {"type": "BPE", "unk_token": None, "byte_fallback": False, "vocab": vocab, "merges": merges},
    }


def metaspace_tokenizer_json() -> dict[str, Any]:
    """The SentencePiece-style tokenizer.json: bytes as <0xNN>, printable ASCII, merged pieces, control tokens."""
    mark = "\u2581"
    pieces = [*START_TOKENS, *(f"<0x{byte:02X}>" for byte in range(256)), mark, *map(chr, range(33, 127)), "é", "中"]
    vocab = {token: i for i, token in enumerate(pieces)}
    merges = _grow(vocab, [*WORDS, mark * 4], mark)
    space_to_mark = {"type": "Replace", "pattern": {"String": " "}, "content": mark}
    mark_to_space = {"type": "Replace", "pattern": {"String": mark}, "content": " "}
    strip = {"type": "Strip", "content": " ", "start": 1, "stop": 0}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": _added(len(vocab)),
        "normalizer": {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": mark}, space_to_mark]},
        "pre_tokenizer": None,
        "post_processor": None,
        "decoder": {"type": "Sequence", "decoders": [mark_to_space, {"type": "ByteFallback"}, {"type": "Fuse"}, strip]},
        "model": {
            "type": "BPE",
            "unk_token": "<unk>",
            "fuse_unk": True,
            "byte_fallback": True,
            "vocab": vocab,
            "merges": merges,
        },
    }


VOCAB_SIZE = tokenizer_json()["added_tokens"][-1]["id"] + 1
BOS_ID = 1
EOS_IDS = (2, VOCAB_SIZE - len(CONTROL_TOKENS))


def write_tokenizer(folder: Path, tokenizer: dict[str, Any] | None = None) -> None:
    """Write tokenizer.json, tokenizer_config.json, special_tokens_map.json, generation_config.json, the template."""
    tokenizer = tokenizer_json() if tokenizer is None else tokenizer
    im_end = next(added["id"] for added in tokenizer["added_tokens"] if added["content"] == "<|im_end|>")
    special = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "</s>"}
    folder.mkdir(parents=True, exist_ok=True)
    files = {
        "tokenizer.json": tokenizer,
        "tokenizer_config.json": {"add_bos_token": True, "add_eos_token": False, **special},
        "special_tokens_map.json": special,
        "generation_config.json": {"bos_token_id": BOS_ID, "eos_token_id": [2, im_end]},
    }
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content, ensure_ascii=False, indent=1), encoding="utf-8")
    (folder / "chat_template.jinja").write_text(STANDARD_TEMPLATE, encoding="utf-8")


def write_metaspace_tokenizer(folder: Path) -> None:
    """The same files around the SentencePiece-style tokenizer."""
    write_tokenizer(folder, metaspace_tokenizer_json())
