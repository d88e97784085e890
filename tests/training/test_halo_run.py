"""A whole conversion in miniature: every part is there, the figures are those of the plan, and a seed repeats them."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from training_cases import small_corpus

from training import halo_run
from training.halo import MICRO, Task
from training.halo_run import Plan, Run, Tokens
from training.model import LIGHTNING, SPARSE

KINDS = (LIGHTNING, SPARSE, LIGHTNING)
TINY = dataclasses.replace(
    MICRO, hidden_size=32, intermediate_size=48, mixer_types=KINDS, head_dim=8, lightning_head_dim=8
)
TASK = Task(text_rows=2, recall_rows=4, num_pairs=12, num_questions=20)
BUDGET = Tokens(twin=3 * 768, alignment=2 * 768, distil=2 * 768, continued=2 * 768)


def record_of(folder: Path, seed: int) -> dict[str, Any]:
    folder.mkdir()
    plan = Plan(seed, TINY, num_kept=1, num_measured=1, task=TASK, tokens=BUDGET)
    halo_run.perform(Run(folder, small_corpus(), small_corpus(), plan))
    return json.loads((folder / f"seed-{seed}.json").read_text())


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def test_a_run_goes_through_all_parts_and_is_the_same_for_a_seed(tmp_path: Path, seed: int) -> None:
    one = record_of(tmp_path / "one", seed)
    figures, curves = one["figures"], one["curves"]
    assert figures["twin"]["tokens"] == BUDGET.twin
    assert figures["hybrid converted"]["tokens"] == BUDGET.conversion
    assert figures["hybrid from nothing, conversion's tokens"]["tokens"] == BUDGET.conversion
    assert figures["hybrid from nothing, all tokens"]["tokens"] == BUDGET.twin + BUDGET.conversion
    scores = [figures[f"choice: layer {layer} replaced"]["score"] for layer in range(3)]
    assert figures["kept"] == halo_run.best_layers(scores, 1)
    assert set(figures["twin"]) == {"tokens", "text_loss", "recall_128", "recall_128_cut", "recall_512"}
    spent = {name: rows[-1]["tokens"] for name, rows in curves.items()}
    assert spent.pop("hybrid from nothing, conversion's tokens") == BUDGET.conversion - BUDGET.continued
    assert spent.pop("hybrid from nothing, all tokens") == BUDGET.twin + BUDGET.conversion - BUDGET.continued
    assert list(spent.values()) == [BUDGET.twin, BUDGET.alignment, BUDGET.distil, *[BUDGET.continued] * 3]
    two = record_of(tmp_path / "two", seed)
    assert two["figures"] == figures and two["curves"] == curves


def test_budgets_scale_together() -> None:
    assert dataclasses.astuple(Tokens(100, 40, 20, 10).scaled(0.5)) == (50, 20, 10, 5)
    assert Tokens(100, 40, 20, 10).conversion == 70


def test_the_rate_warms_up_and_falls_from_the_first_to_the_last(
    tmp_path: Path, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    factors: list[float] = []

    class Noted:
        def __init__(self, model: torch.nn.Module):
            assert sum(1 for _ in model.parameters()) == 1

        def step(self, factor: float) -> None:
            factors.append(factor)

    monkeypatch.setattr(halo_run, "Optimizer", Noted)
    run = Run(tmp_path, small_corpus(), small_corpus(), Plan(seed, TINY, task=TASK))
    line = torch.nn.Linear(1, 1, bias=False)
    part = halo_run.Part("part", 100 * 768, (1.0, 0.2), 128, 0.0)
    run.train(part, line, lambda samples: line(torch.ones(1, 1)).sum())
    assert len(factors) == 100
    assert factors[0] == pytest.approx(1 / 30)
    assert factors[50] == pytest.approx(0.6)
    assert factors[-1] == pytest.approx(0.208)
    assert max(factors) < 0.8
