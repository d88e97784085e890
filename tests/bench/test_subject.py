"""A model behind an engine as a subject: it reads and draws what it is told to, and leaves the state as it was."""

from pathlib import Path

import pytest
import torch
from tiny_model import CHUNK_SIZE, open_tiny_runtime

from salalocal.bench.subject import EngineSubject, SubjectFacts
from salalocal.bench.work import DenseCost, DenseShape
from salalocal.model.mixers.sparse import SparseState

COST = DenseCost(DenseShape(10, 8, 8, 1, 1, 1, 8), 4)


@pytest.fixture
def subject(tmp_path: Path, seed: int) -> EngineSubject:
    engine = open_tiny_runtime(tmp_path / "model", seed).engine
    return EngineSubject(engine, SubjectFacts("tiny", "tiny", 1, 1, "fp32", "fp32", "fp32", CHUNK_SIZE), COST)


def test_reading_reports_every_chunk_and_ends_where_it_should(subject: EngineSubject) -> None:
    subject.begin(300)
    told: list[int] = []
    subject.read(100, told.append)
    assert told == [32, 64, 96, 100]
    assert subject._state is not None and subject._state.num_tokens == 100


def test_drawing_leaves_what_was_read(subject: EngineSubject) -> None:
    subject.begin(300)
    subject.read(100, lambda tokens: None)
    state, logits = subject._state, subject._logits
    assert state is not None and logits is not None
    before = [{name: tensor.clone() for name, tensor in layer.tensors().items()} for layer in state.layers]
    drawn = subject.draw(2, 3, is_last=False)
    assert len(drawn.runs_s) == 3 and min(drawn.first_s, drawn.setup_s, *drawn.runs_s) > 0
    assert state.num_tokens == 100
    for layer, kept in zip(state.layers, before, strict=True):
        assert all(torch.equal(tensor, kept[name]) for name, tensor in layer.tensors().items())
    again = subject._engine.prefill([7, 8], state.fork())
    subject.draw(2, 1, is_last=False)
    repeated = subject._engine.prefill([7, 8], state.fork())
    assert again is not None and repeated is not None and torch.equal(again, repeated)


def test_the_last_draw_needs_no_second_state(subject: EngineSubject) -> None:
    subject.begin(300)
    subject.read(64, lambda tokens: None)
    subject.draw(2, 2, is_last=True)
    assert subject._state is not None and subject._state.num_tokens == 64 + 1 + 2 * 2


def test_warming_up_reads_and_draws_on_the_state_of_the_walk(subject: EngineSubject) -> None:
    with pytest.raises(ValueError, match="before begin"):
        subject.warm_up([20, 1000])
    subject.begin(1000)
    state = subject._state
    assert state is not None
    buffer = next(layer for layer in state.layers if isinstance(layer, SparseState)).key_values.keys.untyped_storage()
    subject.warm_up([20, 1000])
    assert subject._state is state and state.num_tokens == CHUNK_SIZE + 3, "a chunk, and what was drawn"
    kept = next(layer for layer in state.layers if isinstance(layer, SparseState)).key_values.keys.untyped_storage()
    assert kept.data_ptr() == buffer.data_ptr()
    subject.begin(1000)
    assert subject._state is not state and subject._state is not None and subject._state.num_tokens == 0
    with pytest.raises(ValueError, match="before read"):
        subject.draw(1, 1, is_last=True)
