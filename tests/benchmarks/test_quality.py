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
        assert row["overlap"] == 1 and row["heads"] == num_heads
        assert 0 <= row["heads_choosing"] <= row["heads_reading"] <= num_heads
    assert rows[-1]["heads_reading"] in (0, num_heads) or rows[-1]["heads_choosing"]
    (line,) = picked_blocks.table(rows)
    assert line.startswith("      512: needle's block read for ") and line.endswith("overlap 1.000")


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
