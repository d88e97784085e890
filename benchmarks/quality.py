"""The quality table: what each way to store and to run a model costs in quality, measured the same way for all.

    python benchmarks/quality.py --work FOLDER                                      # the built-in model, 4K and 16K
    python benchmarks/quality.py --work FOLDER --ctx 4k,16k,64k,256k --samples 5
    python benchmarks/quality.py --work FOLDER --model PATH --ctx 4k,64k --only bf16 --only "int4 GPTQ"
    python benchmarks/quality.py --work FOLDER --device cpu --record benchmarks/results/NAME.json

In: an unquantized model. Out: table.json and table.md in the folder, and every answer in folders beside them. For each
variant: perplexity, KL divergence and top-1 agreement on the shipped evaluation text, the original in bf16 weights as
reference; how many of the blocks that the original picks for its answers the variant picks too; needles by length, one
and four keys; for the original, whether answers depend on the chunk size.

Activations are fp32 for a small model on a CPU and bf16 on a card. Math in int8 and a lightning state in bf16 are
emulated on a CPU (benchmarks/emulation.py). A variant that this machine or version cannot run stands in the table with
the reason. A run that was stopped goes on when the same command is given again; copies are made once.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.emulation import Emulation, emulated
from benchmarks.picked_blocks import Answered, answer, overlap, prompt_ids
from salalocal.checkpoint.hub import find_model
from salalocal.device import pick_device
from salalocal.errors import BackendError, SalaLocalError
from salalocal.evals.asking import Case, Subject
from salalocal.evals.divergence import Reference, compare, read_reference
from salalocal.evals.haystack import Haystack
from salalocal.evals.needle import NeedleRequest, measure_needles, needle_cases
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
PICK_DEPTHS = 3
REFERENCE = "bf16"


@dataclass(frozen=True)
class Variant:
    """A way to store the weights (method, bits, bits of q, k and v of the sparse layers; None for as they are), and a
    way to run them."""

    name: str
    quantize: tuple[str, int, int] | None = None
    math: str | None = None
    kv_cache: str | None = None
    emulation: Emulation | None = None


SHIPPED = ("gptq", 4, 8)
VARIANTS = (
    Variant(REFERENCE),
    Variant("int4 RTN", ("rtn", 4, 4)),
    Variant("int4 GPTQ", ("gptq", 4, 4)),
    Variant("int4 GPTQ, sparse q k v in 8 bits", SHIPPED),
    Variant("NF4", ("nf4", 4, 4)),
    Variant("int8 RTN", ("rtn", 8, 8)),
    Variant("the fourth, bf16 activations", SHIPPED, math="bf16"),
    Variant("the fourth, int8 activations", SHIPPED, math="int8"),
    Variant("the fourth, int8 keys and values", SHIPPED, kv_cache="int8"),
    Variant("bf16, int8 keys and values", kv_cache="int8"),
    Variant("bf16, lightning states in bf16", emulation="state"),
    Variant("bf16, sparse layers read all blocks", emulation="dense"),
    Variant("bf16, sparse layers silent", emulation="silent"),
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
        """How a variant is opened; its copy is made if it is not there yet. On a CPU math is int8 by emulation."""
        return Settings(
            self.model if variant.quantize is None else str(self._copy(variant.quantize)),
            self.device,
            dtype="bfloat16" if variant.math == "bf16" else None,
            chunk_size=chunk_size,
            max_tokens=ANSWER_TOKENS,
            math=variant.math,
            kv_cache=variant.kv_cache,
        )

    def computing(self, variant: Variant) -> AbstractContextManager[None]:
        """How a variant computes while this is open. Raises: BackendError for what this device cannot show."""
        is_card = pick_device(self.device).type == "cuda"
        if is_card and variant.emulation is not None:
            raise BackendError("emulated by modules, for a CPU", "--device cpu")
        return emulated("int8" if variant.math == "int8" and not is_card else variant.emulation)

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
        plan.tell(f"divergence: {variant.name}")
        try:
            if reference is None:
                reference = read_original(plan)
            with plan.computing(variant):
                runtime = opened(plan.settings(variant), max(map(len, reference.sequences)))
                found = compare(reference, runtime.engine)
        except SalaLocalError as error:
            row["cannot"] = error.message
            continue
        row["perplexity"] = found.perplexity_quantized
        row["kl_mean_nats"], row["kl_p99_nats"] = found.kl_mean_nats, found.kl_p99_nats
        row["top1_agreement"], row["tokens"] = found.top1_agreement, found.num_tokens
        row["activations_dtype"] = str(runtime.engine.model.dtype).removeprefix("torch.")


@dataclass
class Overlaps:
    """How the picks of variants compare with the original's, which are looked at once."""

    plan: Plan
    _originals: dict[str, Answered] = field(default_factory=dict)

    def fill(self, variant: Variant, row: dict[str, Any]) -> None:
        """The picks of one variant, if its row lacks them and it picks as the original does."""
        if "overlap" not in row and variant.emulation not in ("dense", "silent"):
            self.plan.tell(f"picked blocks: {variant.name}")
            row["overlap"] = self.of(variant)

    def of(self, variant: Variant) -> dict[str, float]:
        """The mean overlap by length, of lengths at which anything is picked."""
        plan = self.plan
        with torch.inference_mode():
            if not self._originals:
                for case, runtime in self._cases(VARIANTS[0]):
                    self._originals[case.key] = answer(runtime, prompt_ids(runtime, case.make()))
            found: dict[str, list[float]] = {}
            with plan.computing(variant):
                for case, runtime in self._cases(variant):
                    original = self._originals[case.key]
                    if not original.picks:
                        continue
                    picks = answer(runtime, prompt_ids(runtime, case.make()), original.tokens).picks
                    share = overlap(original.picks, picks) if picks else None
                    if share is not None:
                        found.setdefault(str(case.labels["length"]), []).append(share)
        return {length: round(sum(shares) / len(shares), 4) for length, shares in found.items()}

    def _cases(self, variant: Variant) -> Iterator[tuple[Case, Runtime]]:
        subject = Subject.find(self.plan.settings(variant), lambda line: None)
        runtime = subject.open(max(self.plan.lengths) + ANSWER_TOKENS)
        request = NeedleRequest(self.plan.lengths, PICK_DEPTHS, 1)
        for case in needle_cases(request, Haystack.shipped(runtime.codec), runtime.codec):
            yield case, runtime


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
    with plan.computing(variant):
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
    picked = [length for length in lengths if any(str(length) in row.get("overlap", {}) for row in rows.values())]
    heads = [f"same blocks, {short_tokens(length)}" for length in picked] + heads
    yield "| variant | perplexity | KL, nats | top-1 | " + " | ".join(heads) + " |"
    yield "|---|" + "---|" * (3 + len(heads))
    for name, row in rows.items():
        if "cannot" in row:
            yield f"| {name} | not run: {row['cannot']} |" + " |" * (2 + len(heads))
            continue
        figures = [f"{row['perplexity']:.3f}", f"{row['kl_mean_nats']:.4f}", f"{100 * row['top1_agreement']:.1f} %"]
        overlaps = [row.get("overlap", {}).get(str(length)) for length in picked]
        figures += ["-" if share is None else f"{100 * share:.1f} %" for share in overlaps]
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
    parser.add_argument("--only", action="append", help="the name of a variant, may be repeated; else all")
    parser.add_argument("--no-chunks", action="store_true")
    parser.add_argument("--record", type=Path, help="copy of table.json")
    arguments = parser.parse_args()
    started_s = time.monotonic()

    def tell(line: str) -> None:
        print(f"{time.monotonic() - started_s:7.1f} s  {line}", file=sys.stderr, flush=True)

    arguments.work.mkdir(parents=True, exist_ok=True)
    lengths = tuple(sorted(parse_tokens(text) for text in arguments.ctx.split(",")))
    plan = Plan(arguments.work, arguments.model, arguments.device, lengths, arguments.depths, arguments.samples, tell)
    wanted = arguments.only or [variant.name for variant in VARIANTS]
    measure(plan, [variant for variant in VARIANTS if variant.name in wanted], not arguments.no_chunks)
    print((plan.work / "table.md").read_text())
    if arguments.record:
        arguments.record.write_bytes((plan.work / "table.json").read_bytes())


def measure(plan: Plan, variants: list[Variant], has_chunks: bool) -> dict[str, dict[str, Any]]:
    """Measure variants and write table.json and table.md after each; gives back the rows."""
    path = plan.work / "table.json"
    known = json.loads(path.read_text()) if path.exists() else {"rows": {}, "chunks": None}
    done = {name: row for name, row in known["rows"].items() if "cannot" not in row}  # it may be possible by now
    rows: dict[str, dict[str, Any]] = {variant.name: done.get(variant.name, {}) for variant in variants}
    chunks: dict[str, Any] | None = known["chunks"]

    def write() -> None:
        every = {**done, **rows}
        ordered = {name: every[name] for name in [v.name for v in VARIANTS] if name in every} | every
        device = pick_device(plan.device).type
        asked = {"depths": plan.depths, "samples": plan.samples, "lengths": plan.lengths}
        table = {"model": plan.model, "device": device, **asked, "rows": ordered, "chunks": chunks}
        path.write_text(json.dumps(table, indent=1) + "\n")
        whole = {name: row for name, row in ordered.items() if row}
        (plan.work / "table.md").write_text("".join(f"{line}\n" for line in markdown(whole, plan.lengths, chunks)))

    divergences(plan, variants, rows)
    write()
    overlaps = Overlaps(plan)
    for fill in (overlaps.fill, partial(fill_needles, plan)):  # the cheap columns first
        for variant in variants:
            row = rows[variant.name]
            try:
                if "cannot" not in row:
                    fill(variant, row)
            except SalaLocalError as error:
                row["cannot"] = error.message
            write()
    if has_chunks:
        chunks = chunk_differences(replace(plan, samples=1))
        write()
    return rows


def fill_needles(plan: Plan, variant: Variant, row: dict[str, Any]) -> None:
    """The needles of one variant, as far as they are not answered."""
    for keys in KEYS:
        plan.tell(f"needles: {variant.name}, {keys} keys")
        by_length = needles(plan, variant, keys).shares("length").items()
        row[f"needle_{keys}"] = {str(key[0]): share.to_json() for key, share in by_length}


if __name__ == "__main__":
    main()
