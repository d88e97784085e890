"""A tiny model folder with random weights and the byte-level tokenizer: for tests of sessions, chat and commands.

Both mixers, sparse from 64 tokens on, so that a prompt of a few hundred tokens takes every branch. Its logits are
wide apart and those of the end tokens are zero, so that an answer runs on until something else ends it.
"""

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import checkpoint_cases
import pytest
import tiny_tokenizer

from salalocal.prompt.pack import PromptPack
from salalocal.prompt.sources import Document, Reading
from salalocal.session.runtime import LoadOptions, Runtime, open_runtime

CONTEXT_LIMIT = 20_000
CHUNK_SIZE = 32


def write_tiny_model(folder: Path, seed: int) -> Path:
    """Write config, weights, tokenizer and chat template; gives back the folder."""
    config = checkpoint_cases.small_config(vocab_size=tiny_tokenizer.VOCAB_SIZE)
    config = dataclasses.replace(config, eos_token_ids=tiny_tokenizer.EOS_IDS, max_position_embeddings=CONTEXT_LIMIT)
    tensors = checkpoint_cases.random_tensors(config, seed)
    tensors["lm_head.weight"] *= 20
    tensors["lm_head.weight"][list(tiny_tokenizer.EOS_IDS)] = 0
    tiny_tokenizer.write_tokenizer(folder)
    return checkpoint_cases.written(folder, config, tensors)


def open_tiny_runtime(folder: Path, seed: int) -> Runtime:
    """Write and open a tiny model that reads 32 tokens at a time."""
    return open_runtime(write_tiny_model(folder, seed), "tiny", LoadOptions("cpu", chunk_size=CHUNK_SIZE))


def with_stop_token(runtime: Runtime, token: int) -> Runtime:
    """The same model, which ends its answers at this token."""
    config = runtime.config
    return dataclasses.replace(
        runtime, config=dataclasses.replace(config, eos_token_ids=(*config.eos_token_ids, token))
    )


def document(path: str, text: str) -> Document:
    """A document as read_sources makes it."""
    return Document(path, text, sha256=path, num_bytes=len(text.encode()))


def make_pack(**texts: str) -> PromptPack:
    """A pack of documents named after the arguments."""
    return PromptPack.build(Reading(tuple(document(f"{name}.txt", text) for name, text in texts.items())), "given")


class Feeds:
    """Counts the tokens that were read (not drawn), call by call."""

    def __init__(self) -> None:
        self.calls: list[tuple[int, int]] = []

    @property
    def num_tokens(self) -> int:
        """All tokens read."""
        return sum(end - start for start, end in self.calls)


@contextmanager
def counting_feeds(runtime: Runtime) -> Iterator[Feeds]:
    """Watch what is read while this is open: (first position, end) for every call of the engine."""
    feeds = Feeds()
    prefill = runtime.engine.prefill

    def counted(ids: Any, state: Any, *rest: Any, **options: Any) -> Any:
        feeds.calls.append((state.num_tokens, state.num_tokens + len(ids)))
        return prefill(ids, state, *rest, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runtime.engine, "prefill", counted)
        yield feeds
