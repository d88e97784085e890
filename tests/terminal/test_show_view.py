"""A model in full, on a wide and on a narrow screen, and as JSON."""

import dataclasses
import json
from pathlib import Path

import checkpoint_cases
import pytest

from salalocal.checkpoint.folder import ModelFolder
from salalocal.engine.budget import plan_memory
from salalocal.session.catalog import ModelEntry
from salalocal.session.showing import ModelReport, SchemeTotal
from salalocal.terminal.show_view import show_json, show_lines

CONFIG = checkpoint_cases.small_config()
QUALITY = {
    "perplexity_original": 14.667, "perplexity_quantized": 14.915, "kl_mean_nats": 0.0234, "kl_p99_nats": 0.165,
    "top1_agreement": 0.913, "num_tokens": 32_765,
}  # fmt: skip
REPORT = ModelReport(
    ModelEntry("acme/tiny", "hub", ModelFolder(Path("/hub/x")), 10**6, 0, CONFIG, "int4", "gptq", 10**6, None),
    CONFIG,
    "0" * 40,
    (
        SchemeTotal("int4, groups of 128", 28, 2**20, ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj")),
        SchemeTotal("bfloat16", 9, 2**19, ("embed_tokens", "norm")),
    ),
    "apache-2.0",
    {"quality": QUALITY},
    "cuda:0",
    12 * 2**30,
    tuple(plan_memory(CONFIG, tokens) for tokens in (2**16, 2**20)),
    3_000_000,
)


@pytest.mark.parametrize("width", [40, 80])
def test_a_model_in_full(width: int) -> None:
    lines = list(show_lines(REPORT, width))
    assert lines[0] == "model        acme/tiny" and "layers       2 sparse, 2 lightning" in lines
    assert "licence      apache-2.0" in lines and "   28    1.0 MiB  int4, groups of 128" in lines
    assert "top-1 agreement 91.3 % of 32,765 tokens" in lines
    assert lines[-1] == "longest context that fits: 2.8m" and any("  fits" in line for line in lines)
    kinds = lines[lines.index("   28    1.0 MiB  int4, groups of 128") + 1 :]
    assert kinds[0].startswith("       q_proj, k_proj") and len(kinds[0]) <= width


def test_what_is_not_known_is_said_or_left_out() -> None:
    bare = dataclasses.replace(REPORT, licence=None, card=None, commit=None)
    shown = "\n".join(show_lines(bare, 80))
    assert "licence      not stated in the folder" in shown and "perplexity" not in shown and "commit" not in shown
    assert "perplexity" not in "\n".join(show_lines(dataclasses.replace(REPORT, card={"quality": None}), 80))


def test_the_same_as_json() -> None:
    document = json.loads(json.dumps(show_json(REPORT)))
    assert document["commit"] == "0" * 40 and document["schemes"][0]["num_tensors"] == 28
    assert document["card"]["quality"] == QUALITY and document["longest_context_tokens"] == 3_000_000
    assert document["plans"][1]["total_bytes"] == REPORT.plans[1].total_bytes
