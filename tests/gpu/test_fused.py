"""The built-in model in 4 bits by the fused engine on a CUDA device: against its modules, and against itself.

The model picks blocks from row 4,095 on; near ties between blocks are common on random tokens, so rows behind it are
judged by their median.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from quantized_cases import written_quantized
from torch import Tensor

from salalocal.checkpoint.checkpoint import Checkpoint
from salalocal.checkpoint.hub import find_model
from salalocal.engine.engine import Engine, EngineConfig
from salalocal.engine.fused import step as fused_step
from salalocal.engine.fused.decoder import Decoder
from salalocal.engine.load import Placement, load_model
from salalocal.engine.sampling import Sampler
from salalocal.engine.sampling_params import SamplingParams
from salalocal.kernels.int4.route import Math
from salalocal.model.mixers.sparse import SparseState
from salalocal.model.state import ModelState

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.timeout(300),
]
CUDA = torch.device("cuda")
CHUNK = 512
SPARSE_FROM = 4095
GREEDY = SamplingParams(max_tokens=64, temperature=0)
SAMPLED = (
    SamplingParams(max_tokens=64, temperature=0.9, seed=5, is_loop_guarded=False),
    SamplingParams(max_tokens=64, temperature=1.2, top_p=0.9, top_k=40, seed=5, is_loop_guarded=False),
)


@cache
def engine(math: Math = "int8", is_cache_int8: bool = False) -> Engine:
    model = load_model(Checkpoint.open(find_model("builtin")), CUDA, torch.bfloat16, Placement(math))
    made = Engine(model, EngineConfig(CHUNK, is_cache_int8, is_guessing=False))
    assert made._fused is not None
    return made


@cache
def on_cpu() -> Engine:
    """The same weights in float32, by plain torch."""
    return Engine(load_model(Checkpoint.open(find_model("builtin")), torch.device("cpu"), torch.float32))


def by_modules(fused: Engine) -> Engine:
    """The same weights, module by module."""
    modules = Engine(fused.model, fused.config)
    modules._fused, modules.forward = None, modules.model
    return modules


def random_ids(seed: int, count: int) -> Tensor:
    return torch.randint(3, 8_000, (count,), generator=torch.Generator().manual_seed(seed))


def read(runner: Engine, ids: Tensor) -> tuple[ModelState, Tensor]:
    state = runner.new_state(len(ids) + 128)
    logits = runner.prefill(ids, state)
    assert logits is not None
    return state, logits


def drawn(decoder: Decoder, first: int, count: int) -> list[int]:
    """The first token and so many behind it."""
    tokens = [first]
    for _ in range(count):
        tokens.append(decoder.next_token(tokens[-1]))
    return tokens


def decoder_of(runner: Engine, state: ModelState, params: SamplingParams = GREEDY) -> Decoder:
    assert runner._fused is not None
    return Decoder(runner._fused, state, Sampler(params), params.max_tokens)


def relative_error(value: Tensor, expected: Tensor) -> float:
    return float((value.double() - expected.double()).norm() / expected.double().norm())


def row_errors(values: Tensor, expected: Tensor) -> Tensor:
    return (values.double() - expected.double()).norm(dim=-1) / expected.double().norm(dim=-1)


def assert_same_bits(state: ModelState, other: ModelState) -> None:
    state.check_whole()
    other.check_whole()
    assert state.num_tokens == other.num_tokens
    for number, (layer, expected) in enumerate(zip(state.layers, other.layers, strict=True)):
        for name, tensor in layer.tensors().items():
            assert torch.equal(tensor, expected.tensors()[name]), f"layer {number}, {name}"


def assert_greedy(runner: Engine, state: ModelState, tokens: Sequence[int]) -> None:
    """Every token is the likeliest behind those before it, read one by one as chunks, or as likely but for rounding."""
    for fed, token in pairwise(tokens):
        logits = runner.prefill([fed], state)
        assert logits is not None
        margin = float((logits.max() - logits[token]) / logits.square().mean().sqrt())
        assert margin < 0.15, f"token {token} behind {state.num_tokens} is {margin:.3f} below the likeliest"


@pytest.mark.parametrize("math", ["bf16", "int8"])
@pytest.mark.parametrize(("num_tokens", "chunk_size"), [(SPARSE_FROM, 512), (700, 100), (200, 16), (40, 1)])
def test_dense_rows_err_no_more_than_those_of_the_modules(
    seed: int, math: Math, num_tokens: int, chunk_size: int
) -> None:
    ids, fused = random_ids(seed, num_tokens), engine(math)
    exact = on_cpu().logits(ids)
    error = relative_error(fused.logits(ids, chunk_size), exact)
    of_modules = relative_error(by_modules(fused).logits(ids, chunk_size), exact)
    print(f"{math}, chunks of {chunk_size}: relative error {error:.2e}, of the modules {of_modules:.2e}")
    assert error < 1.5 * of_modules < 0.3


@pytest.mark.parametrize("math", ["bf16", "int8"])
def test_rows_that_choose_blocks_err_no_more_than_those_of_the_modules(seed: int, math: Math) -> None:
    """Rows of which two blocks change places err far more than others, in either: so few of them are left out."""
    ids, fused = random_ids(seed, 6_000), engine(math)
    exact = on_cpu().logits(ids)[SPARSE_FROM:]
    errors, of_modules = (
        row_errors(one.logits(ids)[SPARSE_FROM:], exact).quantile(torch.tensor([0.5, 0.95], dtype=torch.float64))
        for one in (fused, by_modules(fused))
    )
    print(f"{math}: row errors, median and 95 %: {errors.tolist()}, of the modules {of_modules.tolist()}")
    assert (errors < 1.5 * of_modules).all() and float(of_modules[0]) < 0.2


@pytest.mark.parametrize("math", ["bf16", "int8"])
@pytest.mark.parametrize("num_tokens", [1, 300, SPARSE_FROM - 10, 6_000])
def test_answers_are_what_chunks_of_one_token_say(seed: int, math: Math, num_tokens: int) -> None:
    runner = engine(math)
    state, logits = read(runner, random_ids(seed, num_tokens))
    before = state.fork()
    tokens = list(runner.generate(state, logits, SamplingParams(max_tokens=21, temperature=0)))
    assert len(tokens) == 21 and tokens[0] == int(logits.argmax())
    assert state.num_tokens == num_tokens + 20
    assert_greedy(runner, before, tokens)
    state.check_whole()
    for layer, expected in zip(state.layers, before.layers, strict=True):
        for name, tensor in layer.tensors().items():
            wanted = expected.tensors()[name]
            assert tensor.shape == wanted.shape
            assert tensor.numel() == 0 or relative_error(tensor, wanted) < 5e-2, name


def test_guesses_change_no_answer_but_for_rounding(seed: int) -> None:
    plain = engine()
    runner = Engine(plain.model, EngineConfig(CHUNK, is_guessing=True))
    ids = random_ids(seed, 40).repeat(30)
    state, logits = read(runner, ids)
    before = state.fork()
    generation = runner.generate(
        state, logits, SamplingParams(max_tokens=41, temperature=0, is_loop_guarded=False), guess_from=ids.tolist()
    )
    tokens = list(generation)
    print(f"guesses: {generation.guesses}")
    assert len(tokens) == 41 and generation.guesses.num_steps > 0
    assert_greedy(runner, before, tokens)


def test_a_fork_in_the_middle_goes_on_as_the_answer_does(seed: int) -> None:
    runner = engine()
    state, _ = read(runner, random_ids(seed, 5_000))
    undisturbed = state.fork()
    expected = drawn(decoder_of(runner, undisturbed), 7, 20)
    decoder = decoder_of(runner, state)
    tokens = drawn(decoder, 7, 9)
    fork = state.fork()
    tokens += drawn(decoder, tokens[-1], 11)[1:]
    assert tokens == expected
    assert drawn(decoder_of(runner, fork), tokens[9], 11) == expected[9:]
    assert_same_bits(state, undisturbed)
    assert_same_bits(fork, undisturbed)


def test_room_that_is_made_anew_changes_nothing(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    runner = engine()
    state, _ = read(runner, random_ids(seed, 2_000))
    other = state.fork()
    expected = drawn(decoder_of(runner, other), 7, 20)
    monkeypatch.setattr("salalocal.engine.fused.decoder.ROOM_TOKENS", 6)
    assert drawn(decoder_of(runner, state), 7, 20) == expected
    assert_same_bits(state, other)


class Eager:
    """In the place of a captured graph: every replay runs the step."""

    def __init__(self, run: Callable[[], None], device: torch.device) -> None:
        self.replay = run


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(max_tokens=64, temperature=0.9, seed=5),
        SamplingParams(max_tokens=64, temperature=1.5, top_k=40, top_p=0.9, seed=6),
        SamplingParams(max_tokens=64, temperature=1.2, min_p=0.02, seed=7),
    ],
)
def test_drawn_tokens_are_those_of_the_sampler(seed: int, params: SamplingParams) -> None:
    runner = engine()
    state, _ = read(runner, random_ids(seed, 900))
    eager, logits = state.fork(), []
    tokens = drawn(decoder_of(runner, state, params), 7, 20)
    with pytest.MonkeyPatch.context() as patch:
        compute = runner.model.logits

        def noted(hidden: Tensor) -> Tensor:
            logits.append(compute(hidden).clone())
            return logits[-1]

        patch.setattr(runner.model, "logits", noted)
        patch.setattr(fused_step, "_captured", Eager)
        assert drawn(decoder_of(runner, eager, params), 7, 20) == tokens  # a graph runs what was captured
    sampler = Sampler(params)
    assert [sampler.sample(rows[0], 901 + place) for place, rows in enumerate(logits[:20])] == tokens[1:]
    assert_same_bits(state, eager)


def test_a_cache_in_8_bits_loses_little(seed: int) -> None:
    whole, small = engine(), engine(is_cache_int8=True)
    ids = random_ids(seed, 6_000)
    exact = on_cpu().logits(ids)
    errors, of_whole = (row_errors(one.logits(ids), exact) for one in (small, whole))
    for rows in (slice(SPARSE_FROM), slice(SPARSE_FROM, None)):
        error, expected = float(errors[rows].median()), float(of_whole[rows].median())
        print(f"median row error {error:.2e}, with a cache in bf16 {expected:.2e}")
        assert error < 1.5 * expected < 0.3
    state, logits = read(small, ids)
    sparse = next(layer for layer in state.layers if isinstance(layer, SparseState))
    assert sparse.key_values.keys.dtype == torch.int8
    before = state.fork()
    tokens = list(small.generate(state, logits, SamplingParams(max_tokens=21, temperature=0)))
    assert_greedy(small, before, tokens)
    assert_same_bits(state.fork(), state)


@pytest.fixture(scope="module")
def untied(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """The built-in model with an output layer of its own, without which the table has to be on the card."""
    source = Checkpoint.open(find_model("builtin"))
    tensors = {name: source.tensor(name) for name in source.tensor_names}
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    config, record = replace(source.config, tie_word_embeddings=False), source.config.quantization_config
    assert record is not None
    return Checkpoint.open(written_quantized(tmp_path_factory.mktemp("untied"), config, tensors, dict(record)))


def test_a_table_in_host_memory_gives_the_same_bits(seed: int, untied: Checkpoint) -> None:
    ids, found = random_ids(seed, 1_500), []
    for is_on_host in (True, False):
        model = load_model(untied, CUDA, torch.bfloat16, Placement(is_embedding_on_host=is_on_host))
        table = model.model.embed_tokens.weight
        assert (table.device.type == "cpu" and table.is_pinned()) is is_on_host
        runner = Engine(model, EngineConfig(CHUNK, is_guessing=False))
        state, logits = read(runner, ids)
        found.append((runner.logits(ids), logits, drawn(decoder_of(runner, state), 7, 12), state))
    assert all(torch.equal(found[0][part], found[1][part]) for part in (0, 1))
    assert found[0][2] == found[1][2]
    assert_same_bits(found[0][3], found[1][3])


def test_modules_read_a_table_in_host_memory_too(seed: int, untied: Checkpoint) -> None:
    ids, found = random_ids(seed, 300), []
    for is_on_host in (True, False):
        model = load_model(untied, CUDA, torch.float16, Placement(is_embedding_on_host=is_on_host))
        runner = Engine(model, EngineConfig(CHUNK))
        assert runner._fused is None
        found.append(runner.logits(ids))
    assert torch.equal(*found)


@pytest.mark.parametrize("is_cache_int8", [False, True])
def test_answers_repeat_bit_for_bit(seed: int, is_cache_int8: bool) -> None:
    runner, ids = engine(is_cache_int8=is_cache_int8), random_ids(seed, 5_000)
    states, answers = [], []
    for _ in range(2):
        state, logits = read(runner, ids)
        answers.append((logits, list(runner.generate(state, logits, SamplingParams(max_tokens=32, temperature=0)))))
        states.append(state)
    assert torch.equal(answers[0][0], answers[1][0]) and answers[0][1] == answers[1][1]
    assert_same_bits(*states)


@pytest.mark.parametrize("is_cache_int8", [False, True])
@pytest.mark.parametrize("num_saved", [2 * CHUNK, 9 * CHUNK])
def test_a_restored_state_goes_on_as_if_it_had_never_stopped(
    seed: int, tmp_path: Path, is_cache_int8: bool, num_saved: int
) -> None:
    runner, ids = engine(is_cache_int8=is_cache_int8), random_ids(seed, 6_000)
    expected_state, expected = read(runner, ids)
    state, _ = read(runner, ids[:num_saved])
    state.save(tmp_path / "state.safetensors")
    restored, _ = ModelState.load(tmp_path / "state.safetensors", runner.new_state())
    assert restored.num_tokens == num_saved
    logits = runner.prefill(ids[num_saved:], restored)
    assert logits is not None and torch.equal(logits, expected)
    answers = [drawn(decoder_of(runner, one), 7, 12) for one in (restored, expected_state)]
    assert answers[0] == answers[1]
    assert_same_bits(restored, expected_state)


@pytest.mark.parametrize("params", [GREEDY, *SAMPLED], ids=["greedy", "drawn", "filtered"])
def test_an_answer_is_saved_as_far_as_it_came(seed: int, tmp_path: Path, params: SamplingParams) -> None:
    runner, ids = engine(), random_ids(seed, 700)
    state, _ = read(runner, ids)
    decoder = decoder_of(runner, state, params)
    tokens = drawn(decoder, 7, 6)
    state.save(tmp_path / "state.safetensors")
    restored, _ = ModelState.load(tmp_path / "state.safetensors", runner.new_state())
    assert restored.num_tokens == state.num_tokens == len(ids) + 6
    assert drawn(decoder_of(runner, restored, params), tokens[-1], 8) == drawn(decoder, tokens[-1], 8)
    assert_same_bits(restored, state)


@pytest.mark.parametrize("params", SAMPLED, ids=["drawn", "filtered"])
def test_the_same_seed_says_the_same(seed: int, tmp_path: Path, params: SamplingParams) -> None:
    runner, ids = engine(), random_ids(seed, 5_000)
    state, logits = read(runner, ids)
    again, logits_again = read(runner, ids)
    state.save(tmp_path / "state.safetensors")
    restored, _ = ModelState.load(tmp_path / "state.safetensors", runner.new_state())
    fork = state.fork()
    assert torch.equal(logits, logits_again)
    first, *others = [list(runner.generate(one, logits, params)) for one in (state, again, restored, fork)]
    assert len(first) == params.max_tokens and others == [first] * 3
    assert list(runner.generate(read(runner, ids)[0], logits, replace(params, seed=6))) != first


def test_a_read_that_was_paused_goes_on_as_if_it_had_not_been(seed: int) -> None:
    runner, ids = engine(), random_ids(seed, 6_000)
    expected_state, expected = read(runner, ids)
    state, asked = runner.new_state(len(ids) + 128), iter([False] * 5 + [True])
    assert runner.prefill(ids, state, is_cancelled=lambda: next(asked)) is None
    assert state.num_tokens == 5 * CHUNK
    logits = runner.prefill(ids[state.num_tokens :], state)
    assert logits is not None and torch.equal(logits, expected)
    assert_same_bits(state, expected_state)
