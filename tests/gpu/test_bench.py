"""The benchmark on a card: random weights of a small shape, the dense baseline as a graph, ceilings that make sense."""

import dataclasses

import pytest
import torch

from salalocal.bench.ceilings import measure_ceilings
from salalocal.bench.dense import _BACKENDS, DenseSubject, choose_backend
from salalocal.bench.opening import open_subject, tensor_bytes
from salalocal.bench.random_weights import random_engine, random_layout
from salalocal.bench.run import BenchOptions, run_bench
from salalocal.bench.work import QWEN3_8B
from salalocal.engine.budget import Math
from salalocal.engine.engine import EngineConfig
from salalocal.engine.load import Placement
from salalocal.engine.sampling_params import SamplingParams
from salalocal.kernels.memory_read import PIECE, read_sums, read_sums_reference
from salalocal.model.config import LIGHTNING, SPARSE, SalaConfig
from salalocal.settings import Settings

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]
CARD = torch.device("cuda")
SHAPE = dataclasses.replace(QWEN3_8B, num_layers=2, vocab_size=1024)


def small_released() -> SalaConfig:
    """Layers of the released sizes, four of them."""
    return dataclasses.replace(
        SalaConfig.released(), num_hidden_layers=4, mixer_types=(SPARSE, LIGHTNING, LIGHTNING, SPARSE)
    )


def test_reading_sums_every_word(seed: int) -> None:
    generator = torch.Generator("cuda").manual_seed(seed)
    words = torch.randint(-(2**31), 2**31 - 1, (999 * PIECE,), generator=generator, device=CARD, dtype=torch.int32)
    assert torch.equal(read_sums(words), read_sums_reference(words))


def test_ceilings_of_a_card() -> None:
    ceilings = measure_ceilings(CARD, torch.bfloat16)
    assert ceilings.int8_flops_per_s is not None
    assert 1e11 < ceilings.read_bytes_per_s < 1e13
    assert 1e13 < ceilings.float_flops_per_s < ceilings.int8_flops_per_s * 1.5


@pytest.mark.parametrize("math", ["bf16", "int8"])
@pytest.mark.parametrize("is_on_host", [False, True])
def test_random_weights_read_and_draw(math: Math, is_on_host: bool) -> None:
    config = small_released()
    layout = random_layout(config, CARD)
    engine = random_engine(config, layout, CARD, Placement(math, is_on_host), EngineConfig(4096))
    state = engine.new_state(10_000)
    logits = engine.prefill(torch.randint(0, config.vocab_size, (9000,)), state)
    assert logits is not None and bool(torch.isfinite(logits).all()) and float(logits.std()) > 0
    fork = state.fork()
    assert len(list(engine.generate(fork, logits, SamplingParams(max_tokens=20, is_loop_guarded=False)))) == 20
    assert sum(tensor_bytes(layout, torch.bfloat16).values()) < 2**31


def test_a_backend_of_torch_is_right_and_fast_enough() -> None:
    name, trials = choose_backend(SHAPE, CARD, torch.bfloat16, 2048)
    assert name in _BACKENDS["cuda"]
    assert any(trial.seconds for trial in trials), trials


def test_a_graph_draws_what_single_steps_draw(seed: int) -> None:
    """Over the same room: rows that are not filled yet are zeros for both."""
    torch.manual_seed(seed)
    subject = DenseSubject(SHAPE, "a test", CARD, torch.bfloat16, 512)
    subject.begin(3000)
    subject.read(2500, lambda tokens: None)
    room, token, expected = 2500 + 12, subject._last, []
    with torch.inference_mode():
        for position in range(2500, room):
            token = subject._model.read(token, torch.tensor([position], device=CARD), room)
            expected.append(int(token))
        for layer in subject._model._layers:
            layer.keys[:, :, 2500:].zero_()
            layer.values[:, :, 2500:].zero_()
    graph = subject._captured_step(room)
    assert [graph() for _ in range(12)] == expected


def test_a_whole_run_on_a_card(monkeypatch: pytest.MonkeyPatch) -> None:
    config = small_released()
    monkeypatch.setattr("salalocal.bench.opening.SalaConfig.released", staticmethod(lambda: config))
    monkeypatch.setattr("salalocal.bench.run.QWEN3_8B", SHAPE)
    monkeypatch.setattr("salalocal.bench.opening.with_usual_model", lambda settings, tell: settings)
    options = BenchOptions((4096, 20_000), 16, 2, "dense", ("RTX 5090",))
    settings = Settings(device="cuda", chunk_size=4096)
    report = run_bench(settings, options, lambda progress: None, lambda line: None)
    assert [len(result.depths) for result in report.results] == [2, 2] and len(report.projections) == 4
    for result in report.results:
        for depth in result.depths:
            shares = report.prefill_share(result, depth), report.decode_share(result, depth)
            assert all(share is not None and 0 < share < 1.05 for share in shares), shares
            assert depth.peak_memory_bytes is not None and depth.peak_memory_bytes > 2**29


def test_a_model_beyond_the_card_is_refused() -> None:
    from salalocal.errors import MemoryBudgetError

    with pytest.raises(MemoryBudgetError):
        open_subject(None, Settings(device="cuda"), CARD, 2**26)
