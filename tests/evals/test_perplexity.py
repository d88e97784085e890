"""Perplexity against its definition in float64; windows that count every token once."""

import math
from pathlib import Path

import pytest
import tiny_model
import torch

from salalocal.errors import RequestError
from salalocal.evals.perplexity import (
    PerplexityRequest,
    bucket_end,
    losses,
    measure_perplexity,
    perplexity_tasks,
    windows,
)
from salalocal.evals.questionnaire import Place, Watch
from salalocal.session.runtime import Runtime
from salalocal.session.start import Sources
from salalocal.session.texts import TokenText
from salalocal.settings import Settings


def text(seed: int, *lengths: int) -> TokenText:
    generator = torch.Generator().manual_seed(seed)
    drawn = (torch.randint(3, 250, (length - 1,), generator=generator).tolist() for length in lengths)
    return TokenText("made", tuple((1, *ids) for ids in drawn))


@pytest.mark.parametrize("stride", [None, 1, 13, 49])
def test_every_token_but_the_first_is_counted_once(stride: int | None, seed: int) -> None:
    made = text(seed, 200, 50, 51, 2, 1)
    counted: dict[int, list[int]] = {}
    for window in windows(made, PerplexityRequest(50, stride)):
        number, start = map(int, window.key.split("/"))
        ids = made.texts[number]
        assert window.ids == (ids[0], *ids[1 + start : start + len(window.ids)]) and len(window.ids) <= 50
        counted.setdefault(number, []).extend(range(start + window.first_counted, start + len(window.ids)))
        if stride is not None and start:
            assert window.first_counted >= 50 - stride  # what stands in front of the first counted token
    for number, ids in enumerate(made.texts):
        assert counted.get(number, []) == list(range(1, len(ids)))


def test_a_limit_counts_so_many_tokens_and_no_more(seed: int) -> None:
    for limit in (1, 30, 49, 50, 120):
        made = windows(text(seed, 100, 100), PerplexityRequest(50, None, limit))
        assert sum(len(window.ids) - window.first_counted for window in made) == limit
    with pytest.raises(RequestError, match="no token to predict"):
        windows(text(seed, 1), PerplexityRequest(50))


@pytest.fixture
def runtime(tmp_path: Path, seed: int) -> Runtime:
    return tiny_model.open_tiny_runtime(tmp_path / "tiny", seed)


@pytest.mark.parametrize("stride", [None, 25])
def test_the_loss_is_that_of_the_definition(runtime: Runtime, stride: int | None, seed: int) -> None:
    made = windows(text(seed, 130, 40), PerplexityRequest(60, stride))
    read: list[int] = []
    records = [task.run(read.append) for task in perplexity_tasks(made, runtime)]
    total, by_end = losses(records)
    nats, num_tokens, num_bytes = 0.0, 0, 0
    for window in made:
        logits = runtime.logits(window.ids).double()
        for index in range(window.first_counted, len(window.ids)):
            nats -= float(logits[index - 1].log_softmax(-1)[window.ids[index]])
            num_tokens += 1
            num_bytes += len(runtime.tokenizer.piece_bytes(window.ids[index]))
    assert (total.num_tokens, total.num_bytes) == (num_tokens, num_bytes) == (168, num_bytes)
    assert total.nats == pytest.approx(nats, rel=1e-5)
    figures = total.to_json()
    assert figures["perplexity"] == pytest.approx(math.exp(nats / num_tokens), rel=1e-4)
    assert figures["bits_per_byte"] == pytest.approx(nats / math.log(2) / num_bytes, rel=1e-4)
    assert sum(read) == sum(len(window.ids) for window in made) and list(by_end) == [1024]


def test_buckets_double() -> None:
    assert [bucket_end(p) for p in (1, 1023, 1024, 2047, 2048, 70_000)] == [1024, 1024, 2048, 2048, 4096, 131_072]


def test_a_study_of_files(tmp_path: Path, seed: int) -> None:
    folder = tiny_model.write_tiny_model(tmp_path / "model", seed)
    (tmp_path / "text.txt").write_text("the value of data is in the file " * 20)
    told: list[str] = []
    watch = Watch(lambda progress: None, told.append)
    settings = Settings(model=str(folder), device="cpu")
    request = PerplexityRequest(80, 40)
    sources = Sources((str(tmp_path / "text.txt"),), "path")
    first, second = (
        measure_perplexity(settings, request, sources, Place(tmp_path / "records"), watch) for _ in range(2)
    )
    assert first == second and first.total.num_tokens > 100
    plain = first.to_json()
    assert plain["evaluation"] == "ppl" and plain["stride"] == 40 and plain["windows"] == first.num_windows > 2
    assert plain["by_position"][0]["up_to"] == 1024 and plain["total"]["tokens"] == first.total.num_tokens
    assert any(line.startswith("text: 1 file, ") for line in told)


@pytest.mark.parametrize(
    ("context", "stride", "said"), [(31, None, "--ctx 31"), (64, 64, "--stride 64"), (64, 0, "--stride 0")]
)
def test_what_makes_no_window_is_refused(context: int, stride: int | None, said: str) -> None:
    with pytest.raises(RequestError, match=said):
        PerplexityRequest(context, stride)
