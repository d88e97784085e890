"""What the guides show is true: commands parse, links lead somewhere, the table is what `plan` computes."""

import os
import re
import shlex
from pathlib import Path

import pytest
import typer

from salalocal.cli import app
from salalocal.engine.budget import CacheFormat, PlanOptions, StoredWeights, WeightFormat, weight_bytes
from salalocal.model.config import SalaConfig
from salalocal.session.plan import RELEASED_MODEL, PlanRequest, make_plan
from salalocal.terminal.model_views import context_text

DOCS = Path(__file__).parents[1] / "docs"
GUIDES = ("first-hour.md", "memory.md", "quantizing.md", "moving.md")
CARDS = (8, 12, 16, 24, 32, 48, 80)
TABLE = re.compile(r"(?<=<!-- longest contexts -->\n).*?(?=<!-- end -->)", re.DOTALL)


def shown_commands(guide: str) -> list[list[str]]:
    """Every `salalocal ...` of a guide, in a block or in a line of text, as words."""
    text = (DOCS / guide).read_text()
    blocks = "\n".join(re.findall(r"```sh\n(.*?)```", text, re.DOTALL)).splitlines()
    inline = re.findall(r"`(salalocal [a-z][^`]*)`", re.sub(r"```.*?```", "", text, flags=re.DOTALL))
    return [shlex.split(line, comments=True) for line in [*blocks, *inline] if line.startswith("salalocal ")]


def option_names(words: list[str]) -> tuple[list[str], set[str]]:
    """The commands of a line, and every option that the last of them knows."""
    command = typer.main.get_command(app)
    path = []
    for word in words[1:]:
        found = getattr(command, "commands", {}).get(word)
        if found is None:
            break
        command = found
        path.append(word)
    return path, {name for parameter in command.params for name in (*parameter.opts, *parameter.secondary_opts)}


@pytest.mark.parametrize("guide", GUIDES)
def test_every_command_of_a_guide_exists(guide: str) -> None:
    commands = shown_commands(guide)
    assert commands
    for words in commands:
        path, known = option_names(words)
        is_root = words[1].startswith("-")
        assert path or is_root, words
        for word in words[1:]:
            assert not word.startswith("-") or word in known, f"{' '.join(words)}: no {word}"


@pytest.mark.parametrize("guide", GUIDES)
def test_every_link_of_a_guide_leads_somewhere(guide: str) -> None:
    for target in re.findall(r"\]\(([^)#:]+)\)", (DOCS / guide).read_text()):
        assert (DOCS / target).exists(), target


def longest_contexts() -> str:
    """The table of docs/memory.md, from the same function as `salalocal plan --gpu-memory`."""
    columns = [(weights, cache) for weights in (WeightFormat.INT4, WeightFormat.BF16) for cache in CacheFormat]
    columns = [(weights, cache) for weights, cache in columns if cache is not CacheFormat.FP32]
    rows = [
        "| card | " + " | ".join(f"{weights.value} weights, {cache.value} cache" for weights, cache in columns) + " |",
        "|---|" + "---|" * len(columns),
    ]
    config = SalaConfig.released()
    stored = {weights: StoredWeights(weights, weight_bytes(config, weights)) for weights, _ in columns}  # counted once
    options = [PlanOptions(weights, cache, stored=stored[weights]) for weights, cache in columns]
    for gib in CARDS:
        plans = [make_plan(config, PlanRequest(RELEASED_MODEL, None, gib * 2**30, wanted)) for wanted in options]
        rows.append(f"| {gib} GB | " + " | ".join(context_text(plan.longest_tokens) for plan in plans) + " |")
    return "\n".join(rows) + "\n"


def test_the_table_of_contexts_is_what_plan_computes() -> None:
    """SALALOCAL_WRITE_GOLDEN=1 writes it anew."""
    path, table = DOCS / "memory.md", longest_contexts()
    text = path.read_text()
    if os.environ.get("SALALOCAL_WRITE_GOLDEN"):
        text = TABLE.sub(lambda match: table, text)
        path.write_text(text)
    found = TABLE.search(text)
    assert found is not None and found[0] == table
