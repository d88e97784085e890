"""One training step on the CPU: every weight learns, the moving average follows, and what is saved is read back."""

import dataclasses
from pathlib import Path

import pytest
import torch
from training_cases import small_corpus, words_of

from training.batches import Stream
from training.model import LIGHTNING, SPARSE, EmbeddedModel, Shape
from training.train import STAGES, Phase, Trainer, restore, save

SHAPE = dataclasses.replace(Shape(), intermediate_size=64, mixer_types=(LIGHTNING, SPARSE, SPARSE, SPARSE))


@pytest.fixture
def phase() -> Phase:
    return dataclasses.replace(STAGES["3"][0], length=512, batch=2)


def test_a_step_moves_the_weights_and_the_average_half_as_far(tmp_path: Path, seed: int, phase: Phase) -> None:
    torch.manual_seed(seed)
    model = EmbeddedModel(SHAPE)
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    trainer = Trainer(model, torch.device("cpu"), tmp_path)
    stream = Stream(small_corpus(), words_of(small_corpus(), False), phase.length, phase.batch, 0.5, seed, 0.6)
    parts = trainer.step(phase, next(iter(stream)).to(torch.device("cpu")), 0.1)
    assert all(value.isfinite().all() for value in parts.values())
    kinds = [value for name, value in parts.items() if name.startswith("=")]
    total, count = torch.stack(kinds).sum(0)
    assert total / count == pytest.approx(float(parts["answer"][0]), rel=1e-3)
    moved = {name: (weight - before[name]).norm() for name, weight in model.state_dict().items()}
    assert all(distance > 0 for distance in moved.values())
    trainer.step(phase, next(iter(stream)).to(torch.device("cpu")), 0.1)
    assert trainer.average is not None
    for name, weight in trainer.average.state_dict().items():
        assert 0 < (weight - before[name]).norm() < 2.1 * moved[name] + (model.state_dict()[name] - before[name]).norm()


def test_saved_weights_are_read_back(tmp_path: Path, seed: int) -> None:
    torch.manual_seed(seed)
    one, two = EmbeddedModel(SHAPE), EmbeddedModel(SHAPE)
    save(one, tmp_path)
    restore(two, tmp_path)
    assert all(torch.equal(weight, two.state_dict()[name]) for name, weight in one.state_dict().items())
