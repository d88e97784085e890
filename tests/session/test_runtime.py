"""The API for programs: load, logits, generate, session."""

import inspect
from dataclasses import replace
from pathlib import Path

import pytest
import tiny_model
import tiny_tokenizer
import torch
from checkpoint_cases import random_tensors, small_config
from quantized_cases import GROUPS_OF_16, gptq_record, projections, quantized_tensors, written_quantized

import salalocal
from salalocal.checkpoint.checkpoint import Checkpoint
from salalocal.device import DeviceMemory
from salalocal.engine.budget import CacheFormat, PlanOptions, WeightFormat
from salalocal.engine.engine import EngineConfig
from salalocal.errors import CheckpointError, ContextError, HubError, MemoryBudgetError, RequestError
from salalocal.session import runtime as runtime_module
from salalocal.session.events import Finish
from salalocal.session.runtime import LoadOptions, Runtime, open_runtime
from salalocal.settings import Settings


def test_load_opens_a_folder(tmp_path: Path, seed: int) -> None:
    folder = tiny_model.write_tiny_model(tmp_path, seed)
    runtime = salalocal.load(folder, device="cpu", dtype="float32")
    assert runtime.config.vocab_size == tiny_tokenizer.VOCAB_SIZE == runtime.tokenizer.vocab_size
    assert runtime.engine.model.dtype == torch.float32
    assert salalocal.load(str(folder), device="cpu", dtype=torch.bfloat16).engine.model.dtype == torch.bfloat16


def test_load_takes_what_the_readme_says() -> None:
    parameters = inspect.signature(salalocal.load).parameters
    assert list(parameters) == ["model", "device", "dtype"]
    assert parameters["model"].default == "builtin"


def test_what_cannot_be_loaded_is_named(tmp_path: Path, seed: int) -> None:
    with pytest.raises(HubError):
        salalocal.load("nobody/nothing")
    with pytest.raises(RequestError, match="float7"):
        salalocal.load(tiny_model.write_tiny_model(tmp_path, seed), dtype="float7")
    with pytest.raises(RequestError, match="tpu"):
        salalocal.load(tmp_path, device="tpu")
    tiny_tokenizer.write_tokenizer(tmp_path, tiny_tokenizer.tokenizer_json() | {"added_tokens": _one_more_token()})
    with pytest.raises(CheckpointError, match="tokenizer knows"):
        salalocal.load(tmp_path, device="cpu")


def _one_more_token() -> list[dict[str, object]]:
    added = tiny_tokenizer.tokenizer_json()["added_tokens"]
    return [*added, {**added[-1], "id": added[-1]["id"] + 1, "content": "<|more|>"}]


def test_memory_is_checked_before_the_weights_are_read(tmp_path: Path, seed: int) -> None:
    folder = tiny_model.write_tiny_model(tmp_path, seed)
    with pytest.raises(MemoryBudgetError):
        open_runtime(folder, "tiny", LoadOptions("cpu", num_tokens=2**31))


def test_options_are_what_the_settings_say() -> None:
    settings = Settings(device="cpu", dtype="bfloat16", chunk_size=64, math="bf16", kv_cache="int8")
    assert LoadOptions.of(settings, 1000) == LoadOptions("cpu", "bfloat16", 64, 1000, "bf16", "int8")
    assert LoadOptions.of(Settings(kv_place="host", guess=False), 7) == LoadOptions(
        num_tokens=7, kv_place="host", guess=False
    )
    assert LoadOptions.of(Settings(), 7) == LoadOptions(num_tokens=7)


@pytest.mark.parametrize(
    ("options", "said", "hint"),
    [
        (LoadOptions("cpu", math="int4"), "--math is 'int4', not one of bf16, int8, fp8", "--math int8"),
        (LoadOptions("cpu", kv_cache="fp8"), "--kv-cache is 'fp8', not one of fp32, int8", "follows from the dtype"),
        (LoadOptions("cpu", "bfloat16", kv_cache="fp32"), "not one of bf16, int8", "--dtype"),
        (LoadOptions("cpu", kv_place="host"), "--kv-place host is for cards", "leave it out"),
        (LoadOptions("cpu", kv_place="disk"), "'disk', not one of card, host", "--kv-place host"),
    ],
)
def test_math_and_cache_that_make_no_sense(
    tmp_path: Path, seed: int, options: LoadOptions, said: str, hint: str
) -> None:
    with pytest.raises(RequestError, match=said) as refused:
        open_runtime(tiny_model.write_tiny_model(tmp_path, seed), "tiny", options)
    assert hint in refused.value.hint


def test_a_cache_in_8_bits_is_asked_for_by_name(tmp_path: Path, seed: int) -> None:
    folder = tiny_model.write_tiny_model(tmp_path, seed)
    ids = torch.randint(3, 200, (150,), generator=torch.Generator().manual_seed(seed)).tolist()
    runtimes = [open_runtime(folder, "tiny", LoadOptions("cpu", kv_cache=name)) for name in (None, "fp32", "int8")]
    assert [runtime.engine.config.is_cache_int8 for runtime in runtimes] == [False, False, True]
    usual, whole, small = (runtime.engine.new_state(4_000).nbytes for runtime in runtimes)
    assert usual == whole and small < whole
    expected, same, near = (runtime.logits(ids) for runtime in runtimes)
    assert torch.equal(expected, same) and not torch.equal(expected, near)
    assert (near - expected).norm() < 0.1 * expected.norm()


def test_a_session_with_a_cache_in_8_bits(tmp_path: Path, seed: int) -> None:
    folder = tiny_model.write_tiny_model(tmp_path, seed)
    runtime = open_runtime(folder, "tiny", LoadOptions("cpu", chunk_size=tiny_model.CHUNK_SIZE, kv_cache="int8"))
    session = runtime.session(pack=tiny_model.make_pack(one="alpha = 1\n" * 20))
    sampling = salalocal.SamplingParams(max_tokens=5)
    first, second = (list(session.ask(question, sampling))[-1] for question in ("one?", "two?"))
    assert isinstance(first, Finish) and isinstance(second, Finish)
    assert first.usage.context_tokens < second.usage.context_tokens and second.usage.cached_tokens > 0


# What a run decides before it loads, on a card of which only the figures are here.
@pytest.mark.parametrize(
    ("gibibytes", "dtype", "is_tied", "has_kernels", "is_embedding_on_host", "chunk_size"),
    [
        (8, torch.bfloat16, False, True, True, 8192),
        (8, torch.bfloat16, True, True, False, 8192),
        (80, torch.bfloat16, False, True, False, 8192),
        (8, torch.float16, False, True, False, 512),  # the kernels take bf16 alone
        (8, torch.bfloat16, False, False, False, 512),  # and no groups of 16
    ],
)
def test_a_card_of_some_size_gets_its_plan(
    tmp_path: Path,
    seed: int,
    monkeypatch: pytest.MonkeyPatch,
    gibibytes: int,
    dtype: torch.dtype,
    is_tied: bool,
    has_kernels: bool,
    is_embedding_on_host: bool,
    chunk_size: int,
) -> None:
    config = small_config(is_tied, torch.bfloat16)
    if has_kernels:
        monkeypatch.setattr(runtime_module, "why_no_kernels", lambda config: "")
    tensors = random_tensors(config, seed, torch.bfloat16)
    stored, _ = quantized_tensors(tensors, projections)
    checkpoint = Checkpoint.open(written_quantized(tmp_path, config, stored, gptq_record(GROUPS_OF_16)))
    memory = DeviceMemory(gibibytes * 2**30, gibibytes * 2**30 - 2**29)
    monkeypatch.setattr(runtime_module, "device_memory", lambda device: memory)
    options = LoadOptions("cuda", num_tokens=2**15, math="bf16", kv_cache="int8")
    plan = runtime_module._plan(checkpoint, torch.device("cuda"), dtype, options, "small")
    assert (plan.weights, plan.cache, plan.math) == (WeightFormat.INT4, CacheFormat.INT8, "bf16")
    assert (plan.is_embedding_on_host, plan.chunk_size) == (is_embedding_on_host, chunk_size)
    assert plan.is_fused is (has_kernels and dtype == torch.bfloat16)
    if plan.is_fused:
        on_host = runtime_module._plan(
            checkpoint, torch.device("cuda"), dtype, replace(options, kv_place="host"), "small"
        )
        assert on_host == replace(plan, is_kv_on_host=True)
        monkeypatch.setattr(runtime_module, "lockable_bytes", lambda: 2**20)
        with pytest.raises(MemoryBudgetError, match="GiB of host memory that stays locked"):
            runtime_module._plan(checkpoint, torch.device("cuda"), dtype, replace(options, kv_place="host"), "small")
    else:
        with pytest.raises(RequestError, match="needs the kernels for cards"):
            runtime_module._plan(checkpoint, torch.device("cuda"), dtype, replace(options, kv_place="host"), "small")
    too_long = LoadOptions("cuda", num_tokens=2**31)
    if plan.is_fused:
        with pytest.raises(RequestError, match="on a card 524,288 are supported"):
            runtime_module._plan(checkpoint, torch.device("cuda"), dtype, too_long, "small")
        too_long = replace(too_long, num_tokens=2**19)
        monkeypatch.setattr(runtime_module, "device_memory", lambda device: DeviceMemory(2**30, 2**24))
    with pytest.raises(MemoryBudgetError, match="tokens needs"):
        runtime_module._plan(checkpoint, torch.device("cuda"), dtype, too_long, "small")


@pytest.mark.parametrize(
    ("is_on_host", "guess", "is_guessing"),
    [(False, None, True), (True, None, False), (True, True, True), (False, False, False)],
)
def test_guesses_are_made_unless_keys_are_far_away(is_on_host: bool, guess: bool | None, is_guessing: bool) -> None:
    options = PlanOptions(cache=CacheFormat.INT8, chunk_size=2048, is_kv_on_host=is_on_host)
    made = runtime_module.engine_config(options, guess)
    assert made == EngineConfig(2048, True, is_guessing, is_on_host)


def test_logits_are_those_of_every_token_in_fp32(runtime: Runtime, seed: int) -> None:
    ids = torch.randint(3, 200, (150,), generator=torch.Generator().manual_seed(seed)).tolist()
    logits = runtime.logits(ids)
    assert logits.shape == (150, runtime.config.vocab_size) and logits.dtype == torch.float32
    torch.testing.assert_close(runtime.logits(ids, chunk_size=7), logits, atol=1e-3, rtol=1e-3)


def test_generate_streams_text_and_tells_all_afterwards(runtime: Runtime) -> None:
    generation = runtime.generate("the value of", max_tokens=20)
    deltas = list(generation)
    assert generation.finish == "length" and len(generation.token_ids) == 20
    assert "".join(map(str, deltas)) == generation.text == runtime.tokenizer.decode(generation.token_ids)
    assert [token for delta in deltas for token in delta.token_ids] == generation.token_ids
    assert list(generation) == []


def test_text_is_encoded_as_plain_text_behind_bos(runtime: Runtime) -> None:
    text = "<|im_start|>the value"
    ids = [runtime.tokenizer.bos_id, *runtime.tokenizer.encode(text)]
    assert runtime.tokenizer.id("<|im_start|>") not in ids
    from_text = runtime.generate(text, max_tokens=5)
    from_ids = runtime.generate(ids, max_tokens=5)  # type: ignore[arg-type]
    assert list(map(str, from_text)) == list(map(str, from_ids))


def test_generate_draws_the_likeliest_token_of_the_logits(runtime: Runtime) -> None:
    ids = [1, *runtime.tokenizer.encode("what is the value of data")]
    generation = runtime.generate(ids, max_tokens=8)
    list(generation)
    rows = runtime.logits([*ids, *generation.token_ids])[len(ids) - 1 : -1]
    for row, token in zip(rows, generation.token_ids, strict=True):
        assert row[token] >= row.max() - 1e-2


def test_seeds_repeat_and_sampling_varies(runtime: Runtime) -> None:
    def draw(seed: int) -> list[int]:
        generation = runtime.generate("data", max_tokens=10, temperature=20.0, seed=seed)
        list(generation)
        return generation.token_ids

    assert draw(3) == draw(3) != draw(4)


def test_generate_refuses_what_makes_no_sense(runtime: Runtime) -> None:
    with pytest.raises(RequestError, match="temperature"):
        runtime.generate("a", temperature=-1)
    with pytest.raises(RequestError):
        runtime.generate([])
    with pytest.raises(RequestError):
        runtime.generate("a", stop=[""])
    with pytest.raises(ContextError):
        runtime.generate([5] * tiny_model.CONTEXT_LIMIT)


def test_a_session_about_files(runtime: Runtime, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("alpha = 1\n")
    session = runtime.session([tmp_path / "notes.txt"])
    assert [document.path for document in session.pack or ()] == ["notes.txt"]
    assert session.pack is not None and list(session.ask("what?", salalocal.SamplingParams(max_tokens=3)))
    with pytest.raises(RequestError):
        runtime.session(["x"], pack=session.pack)
