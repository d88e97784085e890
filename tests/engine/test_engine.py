"""The engine: prefill, logits and answers, and what the state holds at every moment."""

import math
from collections.abc import Callable

import pytest
import torch
from checkpoint_cases import small_config
from torch import Tensor

from salalocal import device as device_module
from salalocal.engine import engine as engine_module
from salalocal.engine.engine import Engine, EngineConfig
from salalocal.engine.sampling_params import SamplingParams
from salalocal.errors import BackendError, MemoryBudgetError, NumericError, RequestError
from salalocal.model.sala import SalaModel, SwitchRule

LENGTH = 150  # past dense_len = 64 and past the block budget of 5 x 8 tokens


def small_engine(seed: int, chunk_size: int = 32) -> Engine:
    model = SalaModel(small_config(), dtype=torch.float32)
    model.init_weights(generator=torch.Generator().manual_seed(seed))
    return Engine(model, EngineConfig(chunk_size))


def random_ids(seed: int, length: int = LENGTH) -> list[int]:
    return torch.randint(0, 96, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=2e-4, atol=2e-4)


def after(count: int) -> Callable[[], bool]:
    """A cancel that says yes from the call number `count` + 1 on."""
    calls = [0]

    def is_cancelled() -> bool:
        calls[0] += 1
        return calls[0] > count

    return is_cancelled


def test_prefill_gives_the_logits_of_the_last_token(seed: int) -> None:
    engine, ids = small_engine(seed), random_ids(seed)
    with torch.no_grad():
        expected = engine.model.logits(engine.model(torch.tensor([ids]), engine.model.new_state()))[0]
    state = engine.new_state(len(ids))
    progress: list[tuple[int, int]] = []
    found = engine.prefill(ids, state, lambda done, total: progress.append((done, total)))
    assert found is not None and found.dtype == torch.float32 and found.shape == (96,)
    close(found, expected[-1])
    found += 1  # a caller may change it
    assert state.num_tokens == LENGTH
    assert progress == [(32, 150), (64, 150), (96, 150), (128, 150), (150, 150)]


@pytest.mark.parametrize("chunk_size", [1, 7, 64, 128, 1000])
def test_logits_do_not_depend_on_the_chunks(seed: int, chunk_size: int) -> None:
    engine, ids = small_engine(seed), random_ids(seed)
    expected = engine.logits(ids, chunk_size=LENGTH)
    assert expected.shape == (LENGTH, 96) and expected.dtype == torch.float32
    close(engine.logits(torch.tensor(ids), chunk_size), expected)
    last = Engine(engine.model, EngineConfig(chunk_size)).prefill(ids, engine.new_state())
    assert last is not None
    close(last, expected[-1])


def test_the_switch_rules_differ_only_where_they_should(seed: int) -> None:
    engine, ids = small_engine(seed), random_ids(seed)
    by_position = engine.logits(ids)
    always, prompt = engine.logits(ids, switch=SwitchRule.ALWAYS), engine.logits(ids, switch=SwitchRule.PROMPT)
    budget_tokens = (3 + 2) * 8
    close(always[:budget_tokens], by_position[:budget_tokens])
    assert not torch.allclose(always[budget_tokens:63], by_position[budget_tokens:63], atol=1e-3)
    close(prompt, always)  # the prompt is longer than dense_len
    short = ids[:60]
    close(engine.logits(short, switch=SwitchRule.PROMPT), engine.logits(short))


def test_logits_are_computed_in_bounded_pieces(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    engine, ids = small_engine(seed, 128), random_ids(seed)
    expected = engine.logits(ids)
    monkeypatch.setattr(engine_module, "_LOGIT_ROWS", 50)
    pieces = list(engine.iter_logits(ids))
    assert [len(piece) for piece in pieces] == [50, 50, 28, 22]
    close(torch.cat(pieces), expected)


def test_a_walk_over_logits_leaves_the_callers_own_work_alone(seed: int) -> None:
    engine = small_engine(seed)
    for piece in engine.iter_logits(random_ids(seed)):
        assert not torch.is_inference_mode_enabled() and torch.is_grad_enabled()
        weight = torch.ones((), requires_grad=True)
        (weight * float(piece.mean())).backward()
        break


def test_logits_that_do_not_fit_are_refused_before_the_work(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = small_engine(seed)
    monkeypatch.setattr(
        engine_module, "device_memory", lambda _: device_module.DeviceMemory(10**6, 4 * 96 * LENGTH - 1)
    )
    monkeypatch.setattr(engine, "iter_logits", lambda *_: pytest.fail("started"))
    with pytest.raises(MemoryBudgetError, match="logits of 150 tokens x 96"):
        engine.logits(random_ids(seed))


@pytest.mark.parametrize("num_chunks", [0, 1, 2, 4])
def test_a_cancelled_prefill_goes_on_bit_by_bit_as_if_it_had_not_been(seed: int, num_chunks: int) -> None:
    engine, ids = small_engine(seed), random_ids(seed)
    state = engine.new_state()
    assert engine.prefill(ids, state, is_cancelled=after(num_chunks)) is None
    assert state.num_tokens == 32 * num_chunks
    found = engine.prefill(ids[state.num_tokens :], state)
    expected = engine.prefill(ids, engine.new_state())
    assert found is not None and expected is not None and torch.equal(found, expected)


def test_a_cancel_after_the_last_chunk_is_too_late(seed: int) -> None:
    engine, ids = small_engine(seed), random_ids(seed)
    assert engine.prefill(ids, engine.new_state(), is_cancelled=after(5)) is not None


def test_the_same_call_twice_gives_the_same_bits(seed: int) -> None:
    engine, ids = small_engine(seed), random_ids(seed)
    assert torch.equal(engine.logits(ids), engine.logits(ids))


def expected_greedy(engine: Engine, ids: list[int], count: int) -> list[int]:
    """Greedy decoding without a cache: the whole text again for every token."""
    text = list(ids)
    for _ in range(count):
        text.append(int(engine.logits(text, chunk_size=1000)[-1].argmax()))
    return text[len(ids) :]


def start(engine: Engine, ids: list[int]) -> tuple[Tensor, "engine_module.ModelState"]:
    state = engine.new_state()
    logits = engine.prefill(ids, state)
    assert logits is not None
    return logits, state


def holds(engine: Engine, state: "engine_module.ModelState", ids: list[int]) -> None:
    """Checks that a state holds exactly these tokens: as many, and the next logits are theirs."""
    assert state.num_tokens == len(ids)
    fork = state.fork()
    found = engine.prefill([5], fork)
    assert found is not None
    close(found, engine.logits([*ids, 5])[-1])


def test_an_answer_is_the_greedy_one_and_ends_by_length(seed: int) -> None:
    engine, ids = small_engine(seed), random_ids(seed, 58)  # decoding crosses dense_len = 64
    logits, state = start(engine, ids)
    answer = engine.generate(state, logits, SamplingParams(max_tokens=12))
    found = list(answer)
    assert found == answer.ids == expected_greedy(engine, ids, 12)
    assert answer.reason == "length"
    holds(engine, state, ids + found[:-1])


def test_the_state_holds_all_but_the_last_token_after_every_step(seed: int) -> None:
    engine, ids = small_engine(seed), random_ids(seed, 20)
    logits, state = start(engine, ids)
    answer = engine.generate(state, logits, SamplingParams(max_tokens=5, temperature=1.0, seed=seed))
    assert answer.reason is None and state.num_tokens == 20
    for count, token in enumerate(answer, 1):
        assert token == answer.ids[-1] and len(answer.ids) == count
        assert state.num_tokens == 20 + count - 1
        assert answer.reason == ("length" if count == 5 else None)
        holds(engine, state, ids + answer.ids[:-1])
    assert list(answer) == []


def test_a_stop_token_is_yielded_and_not_fed(seed: int) -> None:
    engine, ids = small_engine(seed), random_ids(seed, 20)
    expected = expected_greedy(engine, ids, 6)
    stop = expected[3]
    place = expected.index(stop)
    logits, state = start(engine, ids)
    answer = engine.generate(state, logits, SamplingParams(max_tokens=place + 1), stop_ids=(95 - stop + 96, stop))
    assert list(answer) == expected[: place + 1]
    assert answer.reason == "stop"  # though the length is reached too
    holds(engine, state, ids + expected[:place])


@pytest.mark.parametrize("count", [0, 1, 4])
def test_a_cancel_ends_before_the_next_token(seed: int, count: int) -> None:
    engine, ids = small_engine(seed), random_ids(seed, 20)
    logits, state = start(engine, ids)
    answer = engine.generate(state, logits, SamplingParams(), is_cancelled=after(count))
    found = list(answer)
    assert len(found) == count and answer.reason == "cancelled"
    holds(engine, state, ids + found[:-1])


def test_an_abandoned_answer_leaves_a_good_state(seed: int) -> None:
    engine, ids = small_engine(seed), random_ids(seed, 20)
    logits, state = start(engine, ids)
    answer = engine.generate(state, logits, SamplingParams())
    next(answer), next(answer), next(answer)
    holds(engine, state, ids + answer.ids[:2])


def test_a_loop_is_ended_unless_the_guard_is_off(seed: int) -> None:
    engine, ids = small_engine(seed), random_ids(seed, 20)
    with torch.no_grad():
        assert engine.model.lm_head is not None
        head = engine.model.get_parameter("lm_head.weight")
        head.zero_()  # all logits equal: token 0 for ever
    logits, state = start(engine, ids)
    answer = engine.generate(state, logits, SamplingParams(max_tokens=400))
    assert list(answer) == [0] * 256 and answer.reason == "repetition"
    assert state.num_tokens == 20 + 255
    logits, state = start(engine, ids)
    answer = engine.generate(state, logits, SamplingParams(max_tokens=260, is_loop_guarded=False))
    assert list(answer) == [0] * 260 and answer.reason == "length"


def test_one_seed_gives_one_answer(seed: int) -> None:
    engine, ids = small_engine(seed), random_ids(seed, 20)

    def answer(number: int) -> list[int]:
        logits, state = start(engine, ids)
        params = SamplingParams(temperature=1.5, top_p=0.95, seed=number, max_tokens=30)
        return list(engine.generate(state, logits, params))

    assert answer(3) == answer(3)
    assert answer(3) != answer(4)


def test_nan_in_a_step_yields_nothing(seed: int) -> None:
    engine, ids = small_engine(seed), random_ids(seed, 20)
    logits, state = start(engine, ids)
    answer = engine.generate(state, logits, SamplingParams(max_tokens=10))
    first = next(answer)
    with torch.no_grad():
        engine.model.get_parameter("model.layers.2.self_attn.v_proj.weight")[0, 0] = math.nan
    with pytest.raises(NumericError, match="NaN"):
        next(answer)
    assert answer.ids == [first]
    assert NumericError.exit_code == 7


def test_nan_logits_given_or_computed_are_refused(seed: int) -> None:
    engine, ids = small_engine(seed), random_ids(seed, 20)
    logits, state = start(engine, ids)
    logits[3] = math.nan
    with pytest.raises(NumericError):
        next(engine.generate(state, logits, SamplingParams()))
    with torch.no_grad():
        engine.model.get_parameter("lm_head.weight")[3, 0] = math.inf
    for run in (lambda: engine.logits(ids), lambda: engine.prefill(ids, engine.new_state())):
        with pytest.raises(NumericError, match="logits"):
            run()


@pytest.mark.parametrize("chunk_size", [0, -1, 1.0, True, None, "512"])
def test_a_chunk_size_that_makes_no_sense_is_refused(chunk_size: object) -> None:
    with pytest.raises(RequestError, match="chunk_size"):
        EngineConfig(chunk_size)  # type: ignore[arg-type]


def test_ids_are_checked_before_the_state_is_touched(seed: int) -> None:
    engine = small_engine(seed)
    state = engine.new_state()
    with pytest.raises(RequestError, match="96 is outside the vocabulary"):
        engine.prefill([3, 96], state)
    assert state.num_tokens == 0


@pytest.mark.parametrize("config", [EngineConfig(), EngineConfig(is_cache_int8=True), EngineConfig(is_kv_on_host=True)])
def test_states_are_asked_for_as_the_config_has_it(config: EngineConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    model, asked = SalaModel(small_config(), dtype=torch.float32), []
    monkeypatch.setattr(engine_module, "why_not_fused", lambda model: "")
    monkeypatch.setattr(engine_module, "FusedModel", lambda model: model)
    monkeypatch.setattr(model, "new_state", lambda *arguments: asked.append(arguments))
    Engine(model, config).new_state(100)
    (arguments,) = asked
    assert arguments[1] > 100, "room for a step that runs ahead"
    assert arguments[4:] == (config.is_cache_int8, config.is_kv_on_host)


def test_keys_in_host_memory_need_the_fused_kernels(seed: int) -> None:
    with pytest.raises(BackendError, match="fused kernels: it is not on a CUDA device"):
        Engine(small_engine(seed).model, EngineConfig(is_kv_on_host=True))


def test_a_sampled_answer_is_the_same_from_a_fork_in_its_middle(seed: int) -> None:
    engine, ids = small_engine(seed), random_ids(seed, 70)
    params = SamplingParams(temperature=1.5, seed=seed, max_tokens=20, is_loop_guarded=False)
    state = engine.new_state(len(ids))
    logits = engine.prefill(ids, state)
    assert logits is not None
    answer, forks = engine.generate(state, logits, params), []
    for token in answer:
        if len(answer.ids) == 8:
            forks.append((state.fork(), token))
    fork, token = forks[0]
    more = engine.prefill([token], fork)
    assert more is not None
    assert list(engine.generate(fork, more, params))[:12] == answer.ids[8:]


def test_a_closed_answer_ends_as_cancelled_and_settles_its_state(seed: int) -> None:
    engine, ids = small_engine(seed), random_ids(seed, 20)
    state = engine.new_state(len(ids))
    logits = engine.prefill(ids, state)
    assert logits is not None
    answer, settled = engine.generate(state, logits, SamplingParams()), []
    next(answer)
    state.lend(lambda: settled.append(True))
    answer.close()
    assert settled == [True] and answer.reason == "cancelled" and list(answer) == []
    answer.close()
