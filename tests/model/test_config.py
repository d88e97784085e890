"""SalaConfig: the released file is read exactly, and every field that cannot be is named."""

import copy
import dataclasses
import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from small_configs import CONFIGS, tensor_shapes

from salalocal.errors import CheckpointError
from salalocal.model.config import LIGHTNING, SPARSE, SalaConfig

RELEASED: dict[str, Any] = json.loads(Path(__file__).with_name("released_config.json").read_text())


def changed(**changes: Any) -> dict[str, Any]:
    """The released file with other values; `sparse_` in front reaches into sparse_config, None-like DROP removes."""
    raw = copy.deepcopy(RELEASED)
    for name, value in changes.items():
        where = raw["sparse_config"] if name.startswith("sparse_") and name != "sparse_config" else raw
        key = name.removeprefix("sparse_") if where is not raw else name
        if value is DROP:
            del where[key]
        else:
            where[key] = value
    return raw


DROP = object()


def test_released_file_is_the_released_config() -> None:
    config = SalaConfig.from_hf(RELEASED)
    assert config == SalaConfig.released()
    assert config.unknown_fields == ()
    assert config.num_parameters == 9_477_203_968
    assert [layer for layer, mixer in enumerate(config.mixer_types) if mixer == SPARSE] == [
        0,
        9,
        16,
        17,
        22,
        29,
        30,
        31,
    ]
    assert config.residual_scale == pytest.approx(0.24748737341529164, abs=1e-16)
    assert config.logit_divisor == 16
    assert config.eos_token_ids == (2, 73440)


@pytest.mark.parametrize("name", CONFIGS)
def test_parameters_are_counted_as_the_tensors_are(name: str) -> None:
    expected = sum(math.prod(shape) for shape in tensor_shapes(CONFIGS[name]).values())
    assert SalaConfig.from_hf(CONFIGS[name]).num_parameters == expected


@pytest.mark.parametrize("raw", [RELEASED, *CONFIGS.values()])
def test_written_and_read_again_it_is_the_same(raw: dict[str, Any]) -> None:
    config = SalaConfig.from_hf({**raw, "quantization_config": {"bits": 4, "nested": {"a": [1]}}})
    again = SalaConfig.from_hf(json.loads(json.dumps(config.to_hf())))
    assert again == config and again.digest == config.digest and again.unknown_fields == ()


def test_aliases_of_mixer_names_are_normalised() -> None:
    for alias in ("minicpm4", "minicpm", "standard", "attention", "attn"):
        assert SalaConfig.from_hf(changed(mixer_types=[alias] * 32)).mixer_types == (SPARSE,) * 32
    for alias in ("lightning", "lightning_attn", "lightning-attn"):
        assert SalaConfig.from_hf(changed(mixer_types=[alias] * 32)).mixer_types == (LIGHTNING,) * 32


def test_older_and_newer_spellings() -> None:
    assert SalaConfig.from_hf(changed(dtype=DROP, torch_dtype="float16")).dtype == "float16"
    assert SalaConfig.from_hf(changed(torch_dtype="bfloat16")).dtype == "bfloat16"
    with pytest.raises(CheckpointError, match="torch_dtype"):
        SalaConfig.from_hf(changed(torch_dtype="float32"))
    assert SalaConfig.from_hf(changed(eos_token_id=7)).eos_token_ids == (7,)


def test_unknown_fields_are_listed_and_not_fatal() -> None:
    config = SalaConfig.from_hf(changed(zebra=1, apple={"x": 2}))
    assert config.unknown_fields == ("apple", "zebra")
    assert config == SalaConfig.released()


def test_quantization_config_is_kept_as_it_is_and_apart() -> None:
    given = {"quant_method": "gptq", "bits": 4, "anything": [None, {"deep": True}]}
    raw = changed(quantization_config=given)
    config = SalaConfig.from_hf(raw)
    assert config.quantization_config == given
    given["bits"] = 8
    assert config.quantization_config is not None and config.quantization_config["bits"] == 4
    assert config.digest == SalaConfig.released().digest
    hash(config)


def test_digest_tells_functions_apart_and_nothing_else() -> None:
    released = SalaConfig.released()
    assert SalaConfig.from_hf(changed(dtype="float32", transformers_version="5.0")).digest == released.digest
    for change in ({"rope_theta": 10001.0}, {"scale_emb": 13}, {"sparse_topk": 63}, {"lightning_head_dim": 64}):
        assert SalaConfig.from_hf(changed(**change)).digest != released.digest


MISSING = [name for name in RELEASED if name not in {
    "architectures", "attention_bias", "attention_dropout", "initializer_range", "max_position_embeddings",
    "mup_denominator", "pad_token_id", "pretraining_tp", "rope_scaling", "shift_labels", "transformers_version",
    "use_cache",
}]  # fmt: skip


@pytest.mark.parametrize("name", [*MISSING, *(f"sparse_{name}" for name in RELEASED["sparse_config"])])
def test_a_missing_field_is_named(name: str) -> None:
    with pytest.raises(CheckpointError, match=name.removeprefix("sparse_") + ".* is missing"):
        SalaConfig.from_hf(changed(**{name: DROP}))


@pytest.mark.parametrize("name", [name for name in RELEASED if name not in MISSING])
def test_a_field_that_changes_nothing_may_be_missing(name: str) -> None:
    SalaConfig.from_hf(changed(**{name: DROP}))


CONTRADICTIONS: list[tuple[str, Any]] = [
    ("mixer_types", ["minicpm4"] * 31),
    ("mixer_types", ["minicpm4"] * 31 + ["mamba"]),
    ("mixer_types", "minicpm4"),
    ("num_hidden_layers", 31),
    ("num_attention_heads", 33),
    ("num_key_value_heads", 3),
    ("lightning_nkv", 5),
    ("lightning_head_dim", 127),
    ("sparse_kernel_size", 33),
    ("sparse_kernel_stride", 12),
    ("sparse_block_size", 40),
    ("sparse_window_size", 2000),
    ("sparse_topk", 1),
    ("qk_norm", False),
    ("use_output_norm", False),
    ("use_output_gate", False),
    ("attn_use_output_gate", False),
    ("attn_use_rope", True),
    ("lightning_use_rope", False),
    ("lightning_scale", "1/d"),
    ("lightning_scale", 0.088),
    ("rope_scaling", {"type": "yarn", "factor": 4}),
    ("attention_bias", True),
    ("lightning_layerwise_decay", True),
    ("hidden_act", "gelu"),
    ("model_type", "llama"),
    ("dtype", "float8"),
    ("bos_token_id", 73_448),
    ("eos_token_id", [2, 73_448]),
    ("eos_token_id", []),
    ("pad_token_id", -1),
]


@pytest.mark.parametrize(("name", "value"), CONTRADICTIONS, ids=lambda item: str(item)[:24])
def test_a_contradiction_is_named(name: str, value: Any) -> None:
    with pytest.raises(CheckpointError, match=name.removeprefix("sparse_")):
        SalaConfig.from_hf(changed(**{name: value}))


def shown(value: object) -> str:
    return "huge" if value == 10**4999 else repr(value)


WHOLE = ["vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
         "num_key_value_heads", "head_dim", "lightning_nh", "lightning_nkv", "lightning_head_dim", "dim_model_base",
         "bos_token_id", "eos_token_id", "pad_token_id", "max_position_embeddings", "sparse_kernel_size",
         "sparse_kernel_stride", "sparse_block_size", "sparse_init_blocks", "sparse_window_size", "sparse_topk",
         "sparse_dense_len"]  # fmt: skip


@pytest.mark.parametrize("name", WHOLE)
@pytest.mark.parametrize("value", [True, 64.0, "64", None, [[64]], -64, 2**63, 10**4999, math.nan, {}], ids=shown)
def test_whole_numbers_must_be_whole_and_in_range(name: str, value: Any) -> None:
    if value is None and name in ("pad_token_id", "max_position_embeddings"):
        return
    with pytest.raises(CheckpointError, match=name.removeprefix("sparse_")):
        SalaConfig.from_hf(changed(**{name: value}))


@pytest.mark.parametrize("name", ["rms_norm_eps", "rope_theta", "scale_emb", "scale_depth"])
@pytest.mark.parametrize(
    "value", [True, "1", None, 0, -1.0, math.nan, math.inf, 10**400, [1.0]], ids=lambda v: repr(v)[:9]
)
def test_numbers_must_be_finite_and_positive(name: str, value: Any) -> None:
    with pytest.raises(CheckpointError, match=name):
        SalaConfig.from_hf(changed(**{name: value}))


@pytest.mark.parametrize(
    "name", ["tie_word_embeddings", "qk_norm", "attn_use_rope", "attention_bias", "sparse_use_nope"]
)
@pytest.mark.parametrize("value", [0, 1, "true", None, []], ids=repr)
def test_booleans_must_be_booleans(name: str, value: Any) -> None:
    with pytest.raises(CheckpointError, match=name.removeprefix("sparse_")):
        SalaConfig.from_hf(changed(**{name: value}))


@pytest.mark.parametrize("raw", [None, [], "x", 3])
def test_a_config_must_be_an_object(raw: Any) -> None:
    with pytest.raises(CheckpointError, match="object"):
        SalaConfig.from_hf(raw)
    with pytest.raises(CheckpointError, match="sparse_config"):
        SalaConfig.from_hf(changed(sparse_config=raw))


def test_error_lines_stay_short_and_show_no_control_characters() -> None:
    with pytest.raises(CheckpointError) as caught:
        SalaConfig.from_hf(changed(hidden_act="\x1b[2J" + "x" * 10_000))
    assert len(caught.value.message) < 300 and "\x1b" not in caught.value.message


def test_it_is_frozen_and_a_changed_copy_is_checked_again() -> None:
    config = SalaConfig.released()
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.hidden_size = 1  # type: ignore[misc]
    with pytest.raises(CheckpointError, match="mixer_types"):
        dataclasses.replace(config, num_hidden_layers=3)


def test_it_needs_no_torch() -> None:
    code = "import sys, salalocal.model.config; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False, cwd=Path(__file__).parents[2]).returncode == 0
