"""Plans: the table, the longest context, and commands that do fit."""

import json
import shlex
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_cases import random_tensors, small_config
from quantized_cases import gptq_record, written_quantized
from typer.testing import CliRunner

from salalocal.cli import app
from salalocal.engine.budget import CacheFormat, PlanOptions, WeightFormat
from salalocal.errors import CheckpointError, HubError, RequestError
from salalocal.model.config import SalaConfig
from salalocal.quant.int4 import IntScheme
from salalocal.session.plan import RELEASED_MODEL, PlanFlags, PlanRequest, make_plan, placed, plan_model, short_tokens
from salalocal.settings import Settings

GIB = 2**30


def request(ctx: int | None, gib: float, **options: object) -> PlanRequest:
    return PlanRequest(RELEASED_MODEL, ctx, int(gib * GIB), PlanOptions(**options))  # type: ignore[arg-type]


def test_the_table_holds_the_asked_context_in_its_place() -> None:
    report = make_plan(SalaConfig.released(), request(100_000, 24))
    lengths = [plan.num_tokens for plan in report.plans]
    assert 100_000 in lengths and lengths == sorted(lengths)
    assert report.fits and report.alternatives == () and report.longest_tokens > 100_000


@pytest.mark.parametrize(
    ("ctx", "gib"), [(2**20, 16), (2**20, 8), (2**19, 20), (None, 4), (2**21, 24), (2**21, 8), (4096, 10)]
)
def test_every_alternative_fits_when_it_is_run(ctx: int | None, gib: float) -> None:
    report = make_plan(SalaConfig.released(), request(ctx, gib))
    assert not report.fits and 1 <= len(report.alternatives) <= 3
    for command in report.alternatives:
        words = shlex.split(command)
        assert words[0] == "salalocal"
        result = CliRunner().invoke(app, words[1:])
        assert result.exit_code == 0, command


def test_a_context_just_fits_or_just_does_not() -> None:
    longest = make_plan(SalaConfig.released(), request(None, 24)).longest_tokens
    assert make_plan(SalaConfig.released(), request(longest, 24)).fits
    assert not make_plan(SalaConfig.released(), request(longest + 1, 24)).fits


def test_the_released_shape_needs_no_download() -> None:
    told: list[str] = []
    report = plan_model(Settings(model=RELEASED_MODEL), PlanFlags(2**16, 24 * GIB, "int4", "int8"), told.append)
    assert report.fits and "released shape" in told[1] and len(told) == 2
    assert report.request.options == PlanOptions(WeightFormat.INT4, CacheFormat.INT8)
    assert report.max_tokens == 524_288
    with pytest.raises(HubError):
        plan_model(Settings(model="nobody/nothing"), PlanFlags(), told.append)


@pytest.mark.parametrize("flags", [PlanFlags(1, GIB, "int3"), PlanFlags(1, GIB, None, "fp8"), PlanFlags(2**40, GIB)])
def test_words_and_numbers_that_make_no_sense(flags: PlanFlags) -> None:
    with pytest.raises(RequestError):
        plan_model(Settings(model=RELEASED_MODEL), flags, lambda _: None)


def test_without_a_given_memory_this_machine_is_planned_for() -> None:
    told: list[str] = []
    report = plan_model(Settings(model=RELEASED_MODEL, device="cpu"), PlanFlags(), told.append)
    assert report.request.memory_bytes > 0 and not report.request.options.is_cuda
    assert any("free on this machine" in line for line in told)


def test_keys_and_values_in_host_memory_are_offered_where_nothing_else_fits() -> None:
    int4 = {"weights": WeightFormat.INT4, "cache": CacheFormat.INT8}
    (offered, *_) = make_plan(SalaConfig.released(), request(2**21, 8, **int4)).alternatives
    assert offered.endswith("--ctx 2m --gpu-memory 8g --weights int4 --kv-cache int8 --kv-place host")
    for host_gib, fits in ((9, True), (8, False)):  # 8.69 GiB are to be locked
        wanted = replace(request(2**21, 8, **int4, is_kv_on_host=True), host_bytes=host_gib * GIB)
        report = make_plan(SalaConfig.released(), wanted)
        assert report.fits is fits
        assert all("--kv-place host" in command for command in report.alternatives[:1])
    beside = replace(request(2**21, 8, **int4), host_bytes=8 * GIB)
    assert "--kv-place" not in " ".join(make_plan(SalaConfig.released(), beside).alternatives)
    by_modules = make_plan(SalaConfig.released(), request(2**21, 8, **int4, has_kernels=False))
    assert "--kv-place" not in " ".join(by_modules.alternatives)


@pytest.mark.parametrize(
    ("options", "kv_place", "said"),
    [
        (PlanOptions(), "disk", "--kv-place is 'disk', not one of card, host"),
        (PlanOptions(is_cuda=False), "host", "on a CPU everything is in host memory"),
        (PlanOptions(has_kernels=False), "host", "which do not take this model: they take bfloat16"),
        (PlanOptions(WeightFormat.NF4), "host", "with plain or integer weights"),
    ],
)
def test_places_that_make_no_sense(options: PlanOptions, kv_place: str, said: str) -> None:
    with pytest.raises(RequestError, match=said):
        placed(SalaConfig.released(), options, kv_place)
    assert placed(SalaConfig.released(), options, "card") == placed(SalaConfig.released(), options, None) == options


def test_a_plan_with_keys_and_values_in_host_memory_is_shown() -> None:
    words = ["plan", RELEASED_MODEL, "--gpu-memory", "8g", "--weights", "int4", "--kv-cache", "int8", "--ctx", "2m"]
    result = CliRunner().invoke(app, [*words, "--kv-place", "host"])
    assert result.exit_code == 0
    lines = result.stdout.splitlines()
    assert lines[0].endswith("cache int8 in host memory, 8.00 GiB of memory") and lines[2].endswith("  on host")
    assert next(line for line in lines if "*" in line).split()[-2:] == ["fits", "8.69"]
    assert all(len(line) <= 80 for line in lines[1:])
    document = json.loads(CliRunner().invoke(app, [*words, "--kv-place", "host", "--json"]).stdout)
    assert document["kv_place"] == "host" and document["plans"][-1]["host_bytes"] > 8 * GIB
    assert CliRunner().invoke(app, words).exit_code == 3


def test_weights_that_no_kernel_takes_are_planned_module_by_module(tmp_path: Path, seed: int) -> None:
    def is_fused(model: str, weights: str | None = None) -> bool:
        flags = PlanFlags(memory_bytes=24 * GIB, weights=weights)
        return plan_model(Settings(model=model), flags, lambda _: None).request.options.is_fused

    tensors, config = random_tensors(small_config(), seed, torch.bfloat16), small_config(dtype=torch.bfloat16)
    folder = str(written_quantized(tmp_path, config, tensors, gptq_record(IntScheme(4, 16))))
    assert is_fused("builtin") and is_fused(RELEASED_MODEL, "int4") and not is_fused(folder)
    assert is_fused(folder, "bf16") is (config.lightning.num_heads == config.lightning.num_key_value_heads)


@pytest.mark.parametrize(("tokens", "text"), [(65536, "64k"), (2**20, "1m"), (1000, "1000"), (1536 * 1024, "1536k")])
def test_short_tokens(tokens: int, text: str) -> None:
    assert short_tokens(tokens) == text


@pytest.mark.parametrize(
    ("record", "word"),
    [
        (gptq_record(IntScheme(8, 16)), "int8"),
        (gptq_record(IntScheme(4, 16)), "int4"),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}, "nf4"),
    ],
)
def test_a_quantized_folder_is_planned_for_under_its_own_name(
    tmp_path: Path, seed: int, record: dict[str, Any], word: str
) -> None:
    tensors = random_tensors(small_config(), seed)
    folder = written_quantized(tmp_path, small_config(), tensors, record)
    report = plan_model(Settings(model=str(folder)), PlanFlags(memory_bytes=GIB), lambda _: None)
    assert report.request.options.weights.value == word
    assert {plan.weight_bytes for plan in report.plans} == {sum(tensor.nbytes for tensor in tensors.values())}
    result = CliRunner().invoke(app, ["plan", str(folder), "--gpu-memory", "1g"])
    assert result.exit_code == 0 and f"weights {word}, " in result.output
    other = plan_model(Settings(model=str(folder)), PlanFlags(memory_bytes=24 * GIB, weights="bf16"), lambda _: None)
    assert {plan.weight_bytes for plan in other.plans} == {2 * small_config().num_parameters}


def test_a_folder_that_cannot_be_read_is_not_planned_for(tmp_path: Path, seed: int) -> None:
    folder = written_quantized(tmp_path, small_config(), random_tensors(small_config(), seed), {"quant_method": "awq"})
    with pytest.raises(CheckpointError, match="none of the formats that can be read"):
        plan_model(Settings(model=str(folder)), PlanFlags(memory_bytes=GIB), lambda _: None)
