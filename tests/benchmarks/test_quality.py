"""The quality table and the picked blocks on a tiny model: rows are whole, a repeated run asks nothing anew."""

import json
from pathlib import Path

import pytest
import tiny_model
import torch

from benchmarks import picked_blocks, quality
from salalocal.evals.asking import Subject
from salalocal.evals.haystack import Haystack
from salalocal.evals.needle import NeedleRequest, needle_cases
from salalocal.settings import Settings


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quality, "TEXT_TOKENS", 128)
    monkeypatch.setattr(quality, "CHUNKS", (512,))
    monkeypatch.setattr(quality, "KEYS", (2,))
    monkeypatch.setattr(quality, "ANSWER_TOKENS", 2)


@pytest.mark.usefixtures("small")
def test_a_table_has_a_row_for_each_variant(tmp_path: Path, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model.write_tiny_model(tmp_path / "model", seed)
    told: list[str] = []
    plan = quality.Plan(tmp_path / "work", str(model), "cpu", (512,), 1, 1, told.append, "8")
    plan.work.mkdir()
    names = ("bf16", "int4 RTN", "impossible")
    variants = [v for v in quality.VARIANTS if v.name in names] + [quality.Variant("impossible", math="fp7")]
    rows = quality.measure(plan, variants, has_chunks=True)
    assert rows["bf16"]["kl_mean_nats"] == 0 and rows["bf16"]["top1_agreement"] == 1 and rows["bf16"]["tokens"] == 127
    assert rows["int4 RTN"]["kl_mean_nats"] > 0 and rows["int4 RTN"]["needle_2"]["512"]["asked"] == 1
    assert "fp7" in rows["impossible"]["cannot"]
    table = json.loads((plan.work / "table.json").read_text())
    assert table["rows"] == rows and table["chunks"]["questions"] == 1
    lines = (plan.work / "table.md").read_text().splitlines()
    assert len({line.count("|") for line in lines[:5]}) == 1 and lines[4].startswith("| impossible | not run: ")
    monkeypatch.setattr(quality, "read_original", None)
    assert quality.measure(plan, variants[:2], has_chunks=False) == {name: rows[name] for name in names[:2]}


def test_picks_are_those_of_the_answers_rows(tmp_path: Path, seed: int) -> None:
    folder = tiny_model.write_tiny_model(tmp_path / "model", seed)
    runtime = Subject.find(Settings(str(folder), "cpu"), lambda line: None).open(1024)
    haystack = Haystack("made", [tiny_model.document("a.txt", "the value of data\n" * 400)], runtime.codec)
    request = NeedleRequest((512,), depths=2, samples=1)
    with torch.inference_mode():
        rows = [picked_blocks.measured([runtime], case) for case in needle_cases(request, haystack, runtime.codec)]
    num_heads = runtime.config.mixer_types.count("minicpm4") * runtime.config.sparse.num_key_value_heads
    assert [row["depth"] for row in rows] == [100, 0]
    for row in rows:
        assert row["overlap"] in (1, None) and row["heads"] == num_heads
        assert 0 <= row["heads_choosing"] <= row["heads_reading"] <= row["heads_reading_later"] <= num_heads
        assert set(row["layers_reading"]) <= set(row["layers_reading_later"])
    assert rows[-1]["heads_reading"] in (0, num_heads) or rows[-1]["heads_choosing"]
    (line,) = picked_blocks.table(rows)
    assert line.startswith("      512: 0 of 2 right; needle's block read at first for ")


def test_a_given_answer_has_the_picks_of_the_same_answer_drawn(tmp_path: Path, seed: int) -> None:
    folder = tiny_model.write_tiny_model(tmp_path / "model", seed)
    runtime = Subject.find(Settings(str(folder), "cpu"), lambda line: None).open(1024)
    prompt = torch.randint(
        16, runtime.config.vocab_size, (700,), generator=torch.Generator().manual_seed(seed)
    ).tolist()
    with torch.inference_mode():
        drawn = picked_blocks.answer(runtime, prompt)
        given = picked_blocks.answer(runtime, prompt, drawn.tokens)
        other = picked_blocks.answer(runtime, prompt[::-1], drawn.tokens)
    num_layers = runtime.config.mixer_types.count("minicpm4")
    # A row each for what is drawn and for the token that ends it, if the room did not end it.
    rows = {row for row, _, _ in drawn.picks}
    assert len(rows) in (len(drawn.tokens), len(drawn.tokens) + 1) and max(rows) == len(rows) - 1
    assert len(drawn.picks) == len(rows) * num_layers * runtime.config.sparse.num_key_value_heads
    assert {key: given.picks[key] for key in drawn.picks} == drawn.picks
    assert picked_blocks.overlap(drawn.picks, given.picks) in (1, None)
    share = picked_blocks.overlap(drawn.picks, other.picks)
    assert share is None or 0 <= share <= 1


def test_overlap_counts_what_the_first_chose() -> None:
    def picked(*chosen: int) -> picked_blocks.Picked:
        return picked_blocks.Picked(frozenset({0, *chosen}), frozenset(chosen))

    first = {(0, 0, 0): picked(3, 4), (0, 0, 1): picked(5), (1, 0, 0): picked()}
    second = {(0, 0, 0): picked(4, 7, 8), (0, 0, 1): picked(5), (1, 0, 0): picked(9)}
    assert picked_blocks.overlap(first, second) == 0.75
    assert picked_blocks.overlap({(1, 0, 0): picked()}, second) is None


def test_a_needles_block_is_where_its_value_stands(tmp_path: Path, seed: int) -> None:
    folder = tiny_model.write_tiny_model(tmp_path / "model", seed)
    runtime = Subject.find(Settings(str(folder), "cpu"), lambda line: None).open(1024)
    haystack = Haystack("made", [tiny_model.document("a.txt", "the value of data\n" * 400)], runtime.codec)
    for case in needle_cases(NeedleRequest((1024,), depths=5, samples=1), haystack, runtime.codec):
        question = case.make()
        ids = [token for segment in runtime.codec.template.render(question.conversation) for token in segment.ids]
        block = picked_blocks.needle_block(runtime, question, 64)
        around = runtime.tokenizer.decode(ids[64 * block : 64 * block + 80])
        assert question.expected[0] in around
