"""A whole benchmark on a tiny model: all depths, both subjects, ceilings, and what an interrupt or a bad wish does."""

import json
from pathlib import Path

import pytest
from tiny_model import write_tiny_model

from salalocal.bench import ceilings
from salalocal.bench.run import BenchOptions, run_bench
from salalocal.bench.walk import BenchProgress
from salalocal.errors import RequestError
from salalocal.settings import Settings


@pytest.fixture(autouse=True)
def quick_ceilings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ceilings, "_CPU_BYTES", 2**22)
    monkeypatch.setattr(ceilings, "_CPU_PRODUCT", (32, 128, 128))
    monkeypatch.setattr(ceilings, "_ENOUGH_S", 0.0)


@pytest.fixture
def settings(tmp_path: Path, seed: int) -> Settings:
    folder = write_tiny_model(tmp_path / "model", seed)
    return Settings(model=str(folder), device="cpu", chunk_size=32, origins={"model": "--model"})


def test_both_subjects_walk_through_all_depths(settings: Settings) -> None:
    told: list[BenchProgress] = []
    options = BenchOptions((100, 40, 40), gen_tokens=2, num_runs=2, baseline="dense")
    report = run_bench(settings, options, told.append, lambda line: None)
    assert [[depth.num_tokens for depth in result.depths] for result in report.results] == [[40, 100]] * 2
    assert report.ceilings is not None and not report.is_interrupted
    assert {progress.subject for progress in told} == {settings.model, "dense"}
    ours, dense = report.results
    assert dense.facts.chunk_size == 32 and "full attention" in dense.facts.description
    assert any("flash for CPUs" in note for note in report.notes)
    for result in report.results:
        for depth in result.depths:
            assert 0 < depth.chunk_s <= depth.read_s < depth.first_token_s
            share = report.prefill_share(result, depth)
            assert share is not None and share > 0
    assert ours.depths[0].peak_memory_bytes is None or ours.depths[0].peak_memory_bytes > 2**20


def test_an_interrupt_keeps_what_was_measured(settings: Settings) -> None:
    def interrupt(progress: BenchProgress) -> None:
        if progress.num_tokens > 60:
            raise KeyboardInterrupt

    report = run_bench(settings, BenchOptions((40, 100), 2, 1), interrupt, lambda line: None)
    assert report.is_interrupted and "interrupted" in report.notes[-1] and report.ceilings is not None
    assert [depth.num_tokens for depth in report.results[0].depths] == [40]
    with pytest.raises(KeyboardInterrupt):
        run_bench(settings, BenchOptions((100,), 2, 1), interrupt, lambda line: None)


def test_a_depth_beyond_what_the_model_was_made_for_is_said(settings: Settings) -> None:
    path = Path(settings.model) / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"max_position_embeddings": 100}))
    report = run_bench(settings, BenchOptions((128,), 1, 1), lambda progress: None, lambda line: None)
    assert any("contexts of up to 100 tokens" in note for note in report.notes)


@pytest.mark.parametrize(
    "wish",
    [
        {"gen_tokens": 0},
        {"num_runs": 0},
        {"baseline": "sparse"},
        {"depths": (2**30,)},
        {"cards": ("RTX 9999",)},
        {"cards": ("RTX 5090",)},
        {"memory_cap_bytes": 2**33},
    ],
)
def test_a_wish_that_makes_no_sense_is_refused_at_once(settings: Settings, wish: dict[str, object]) -> None:
    with pytest.raises(RequestError):
        run_bench(settings, BenchOptions(**wish), lambda progress: None, lambda line: None)  # type: ignore[arg-type]
