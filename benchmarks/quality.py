"""The quality table: what each way to store and to run a model costs in quality, measured the same way for all.

    python benchmarks/quality.py --work FOLDER                                      # the built-in model, 4K and 16K
    python benchmarks/quality.py --work FOLDER --ctx 4k,16k,64k,256k --samples 5
    python benchmarks/quality.py --work FOLDER --model PATH --ctx 4k,64k --only bf16,gptq

In: an unquantized model. Out: table.json and table.md in the folder, and every answer in folders beside them. For each
variant: perplexity, KL divergence and top-1 agreement on the shipped evaluation text, the original in bf16 weights as
reference; needles by length, one and four keys; for the original, whether answers depend on the chunk size.
A variant that this machine or version cannot run stands in the table with the reason. A run that was stopped goes on
when the same command is given again; copies are made once.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import nn

from salalocal.checkpoint.hub import find_model
from salalocal.errors import SalaLocalError
from salalocal.evals.divergence import Reference, compare, read_reference
from salalocal.evals.needle import NeedleRequest, measure_needles
from salalocal.evals.questionnaire import Place, Report, Watch
from salalocal.quant.recipe import QuantizeOptions, parse_group_size
from salalocal.session.plan import short_tokens
from salalocal.session.quantizing import QuantizeRequest, quantize_model
from salalocal.session.runtime import LoadOptions, Runtime, open_runtime
from salalocal.session.start import Sources
from salalocal.session.texts import EVALUATION, cut_sequences, shipped_text
from salalocal.settings import Settings, parse_tokens

CHUNKS = (512, 2048, 16_384)
KEYS = (1, 4)
SEQUENCE_TOKENS, TEXT_TOKENS = 16_384, 32_768
ANSWER_TOKENS = 128
REFERENCE = "bf16"


@dataclass(frozen=True)
class Variant:
    """A way to store the weights (method, bits, bits of q, k and v of the sparse layers; None for as they are), and a
    way to run them."""

    name: str
    quantize: tuple[str, int, int] | None = None
    math: str | None = None
    kv_cache: str | None = None


VARIANTS = (
    Variant(REFERENCE),
    Variant("int4 RTN", ("rtn", 4, 4)),
    Variant("int4 GPTQ", ("gptq", 4, 4)),
    Variant("int4 GPTQ, sparse q k v in 8 bits", ("gptq", 4, 8)),
    Variant("NF4", ("nf4", 4, 4)),
    Variant("int8 RTN", ("rtn", 8, 8)),
    Variant("int4 GPTQ, bf16 activations", ("gptq", 4, 4), math="bf16"),
    Variant("int4 GPTQ, int8 activations", ("gptq", 4, 4), math="int8"),
    Variant("bf16, int8 keys and values", kv_cache="int8"),
    Variant("int4 GPTQ, int8 keys and values", ("gptq", 4, 4), kv_cache="int8"),
)


@dataclass(frozen=True)
class Plan:
    """What is measured, and where it is kept. Units: lengths in tokens."""

    work: Path
    model: str
    device: str | None
    lengths: tuple[int, ...]
    depths: int
    samples: int
    tell: Callable[[str], None]
    group_size: str | None = None

    def settings(self, variant: Variant, chunk_size: int | None = None) -> Settings:
        """How a variant is opened; its copy is made if it is not there yet."""
        model = self.model if variant.quantize is None else str(self._copy(variant.quantize))
        return Settings(
            model,
            self.device,
            chunk_size=chunk_size,
            max_tokens=ANSWER_TOKENS,
            math=variant.math,
            kv_cache=variant.kv_cache,
        )

    def _copy(self, how: tuple[str, int, int]) -> Path:
        method, bits, sensitive = how
        folder = self.work / f"copy-{method}-{bits}-{sensitive}"
        if not folder.exists():
            options = QuantizeOptions(method, bits, parse_group_size(self.group_size, method), sensitive)
            request = QuantizeRequest(options, folder, Sources(), 128 * 1024)
            self.tell(f"making {folder.name}")
            quantize_model(
                Settings(self.model, self.device), request, lambda step: None, self.tell, lambda *models: None
            )
        return folder


def opened(settings: Settings, num_tokens: int) -> Runtime:
    """A runtime for texts of so many tokens."""
    return open_runtime(find_model(settings.model), settings.model, LoadOptions.of(settings, num_tokens))


def divergences(plan: Plan, variants: list[Variant], rows: dict[str, dict[str, Any]]) -> None:
    """Perplexity, KL and agreement of each variant that has none yet; the reference is read once, if at all."""
    reference: Reference | None = None
    for variant in variants:
        row = rows[variant.name]
        if "perplexity" in row or "cannot" in row:
            continue
        try:
            if reference is None:
                reference = read_original(plan)
            runtime = opened(plan.settings(variant), max(map(len, reference.sequences)))
            found = compare(reference, runtime.engine)
        except SalaLocalError as error:
            row["cannot"] = error.message
            continue
        row["perplexity"] = found.perplexity_quantized
        row["kl_mean_nats"], row["kl_p99_nats"] = found.kl_mean_nats, found.kl_p99_nats
        row["top1_agreement"], row["tokens"] = found.top1_agreement, found.num_tokens
        row["weights_dtype"] = str(runtime.engine.model.dtype).removeprefix("torch.")


def read_original(plan: Plan) -> Reference:
    """What the unquantized model says of the shipped evaluation text."""
    settings = plan.settings(VARIANTS[0])
    runtime = opened(settings, SEQUENCE_TOKENS)
    text = shipped_text(EVALUATION, runtime.codec)
    reference = read_reference(runtime.engine, cut_sequences(text, SEQUENCE_TOKENS, TEXT_TOKENS))
    runtime.engine.model.model.layers = nn.ModuleList()  # what is compared needs its head alone
    return reference


def needles(plan: Plan, variant: Variant, keys: int, chunk_size: int | None = None) -> Report:
    """The needles of one variant; answered ones are not asked again."""
    request = NeedleRequest(plan.lengths, plan.depths, plan.samples, keys)
    name = "-".join(variant.name.replace(",", "").split()) + f"-{keys}" + (f"-chunk{chunk_size}" if chunk_size else "")
    watch = Watch(lambda progress: None, plan.tell)
    return measure_needles(plan.settings(variant, chunk_size), request, Sources(), Place(plan.work / name), watch)


def chunk_differences(plan: Plan) -> dict[str, Any]:
    """How many needle answers of the reference change with the chunk size that prompts are read in."""
    answers = [
        {record["key"]: record["answer"] for record in needles(plan, VARIANTS[0], 1, chunk).records} for chunk in CHUNKS
    ]
    differ = sum(len({each[key] for each in answers}) > 1 for key in answers[0])
    return {"chunks": list(CHUNKS), "questions": len(answers[0]), "differ": differ}


def markdown(rows: dict[str, dict[str, Any]], lengths: tuple[int, ...], chunks: dict[str, Any] | None) -> Iterator[str]:
    """The table."""
    heads = [f"{keys} key{'s' if keys > 1 else ''}, {short_tokens(length)}" for keys in KEYS for length in lengths]
    yield "| variant | perplexity | KL, nats | top-1 | " + " | ".join(heads) + " |"
    yield "|---|" + "---|" * (3 + len(heads))
    for name, row in rows.items():
        if "cannot" in row:
            yield f"| {name} | not run: {row['cannot']} |" + " |" * (2 + len(heads))
            continue
        figures = [f"{row['perplexity']:.3f}", f"{row['kl_mean_nats']:.4f}", f"{100 * row['top1_agreement']:.1f} %"]
        for keys in KEYS:
            shares = row.get(f"needle_{keys}", {})
            figures += [_cell(shares.get(str(length))) for length in lengths]
        yield f"| {name} | " + " | ".join(figures) + " |"
    if chunks is not None:
        yield ""
        read = ", ".join(f"{chunk:,}" for chunk in chunks["chunks"])
        yield f"Read in chunks of {read}: {chunks['differ']} of {chunks['questions']} answers differ."


def _cell(share: dict[str, Any] | None) -> str:
    if share is None:
        return "-"
    return f"{share['right']}/{share['asked']} ({100 * share['low']:.0f} to {100 * share['high']:.0f} %)"


def main() -> None:
    """Parses the command line, measures, writes after every step."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--model", default="builtin:bf16")
    parser.add_argument("--device")
    parser.add_argument("--ctx", default="4k,16k")
    parser.add_argument("--depths", type=int, default=11)
    parser.add_argument("--samples", type=int, default=2)
    parser.add_argument("--only", help="names of variants, separated by commas; else all")
    parser.add_argument("--no-chunks", action="store_true")
    arguments = parser.parse_args()
    started_s = time.monotonic()

    def tell(line: str) -> None:
        print(f"{time.monotonic() - started_s:7.1f} s  {line}", file=sys.stderr, flush=True)

    arguments.work.mkdir(parents=True, exist_ok=True)
    lengths = tuple(sorted(parse_tokens(text) for text in arguments.ctx.split(",")))
    plan = Plan(arguments.work, arguments.model, arguments.device, lengths, arguments.depths, arguments.samples, tell)
    wanted = arguments.only.split(",") if arguments.only else [variant.name for variant in VARIANTS]
    measure(plan, [variant for variant in VARIANTS if variant.name in wanted], not arguments.no_chunks)


def measure(plan: Plan, variants: list[Variant], has_chunks: bool) -> dict[str, dict[str, Any]]:
    """Measure variants and write table.json and table.md after each; gives back the rows."""
    path = plan.work / "table.json"
    known = json.loads(path.read_text())["rows"] if path.exists() else {}
    known = {name: row for name, row in known.items() if "cannot" not in row}  # it may be possible by now
    rows: dict[str, dict[str, Any]] = {variant.name: known.get(variant.name, {}) for variant in variants}
    chunks: dict[str, Any] | None = None

    def write() -> None:
        table = {"model": plan.model, "lengths": plan.lengths, "rows": rows, "chunks": chunks}
        path.write_text(json.dumps(table, indent=1) + "\n")
        done = {name: row for name, row in rows.items() if row}
        (plan.work / "table.md").write_text("".join(f"{line}\n" for line in markdown(done, plan.lengths, chunks)))

    divergences(plan, variants, rows)
    write()
    for variant in variants:
        for keys in KEYS:
            if "cannot" in rows[variant.name]:
                continue
            plan.tell(f"needles: {variant.name}, {keys} keys")
            try:
                report = needles(plan, variant, keys)
            except SalaLocalError as error:
                rows[variant.name]["cannot"] = error.message
                continue
            by_length = report.shares("length").items()
            rows[variant.name][f"needle_{keys}"] = {str(key[0]): share.to_json() for key, share in by_length}
            write()
    if has_chunks:
        chunks = chunk_differences(replace(plan, samples=1))
        write()
    return rows


if __name__ == "__main__":
    main()
