"""What the guides show is true: commands parse, links lead somewhere, the table is what `plan` computes."""

import os
import re
import shlex
from collections.abc import Callable
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
PARTS = {
    name: re.compile(rf"(?<=<!-- {name} -->\n).*?(?=<!-- end -->)", re.DOTALL)
    for name in ("longest contexts", "host memory")
}


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


def host_memory() -> str:
    """The table of contexts with keys and values in host memory, from the plan of a card of 8 GB."""
    rows = [
        "| context | of an 8 GB card, int8 cache | of the host | of the card, bf16 cache | of the host |",
        "|---|---|---|---|---|",
    ]
    config = SalaConfig.released()
    stored = StoredWeights(WeightFormat.INT4, weight_bytes(config, WeightFormat.INT4))
    for num_tokens in (2**18, 2**19, 2**20, 2**21):
        cells = [context_text(num_tokens)]
        for cache in (CacheFormat.INT8, CacheFormat.BF16):
            options = PlanOptions(WeightFormat.INT4, cache, stored=stored, is_kv_on_host=True)
            report = make_plan(config, PlanRequest(RELEASED_MODEL, num_tokens, 8 * 2**30, options))
            plan = next(plan for plan in report.plans if plan.num_tokens == num_tokens)
            assert report.fits
            cells += [f"{plan.total_bytes / 2**30:.2f} GiB", f"{plan.host_bytes / 2**30:.2f} GiB"]
        rows.append("| " + " | ".join(cells) + " |")
    return "\n".join(rows) + "\n"


@pytest.mark.parametrize(("name", "computed"), [("longest contexts", longest_contexts), ("host memory", host_memory)])
def test_the_tables_of_memory_are_what_plan_computes(name: str, computed: Callable[[], str]) -> None:
    """SALALOCAL_WRITE_GOLDEN=1 writes them anew."""
    path, table = DOCS / "memory.md", computed()
    text = path.read_text()
    if os.environ.get("SALALOCAL_WRITE_GOLDEN"):
        text = PARTS[name].sub(lambda match: table, text)
        path.write_text(text)
    found = PARTS[name].search(text)
    assert found is not None and found[0] == table
