"""What the sparse layers pick when a model is asked for a needle, by context length: is its block among them, and do a
quantized copy's picks agree with the original's.

    python benchmarks/picked_blocks.py --ctx 4k,16k,64k --samples 8 --out picks.json
    python benchmarks/picked_blocks.py --against builtin --ctx 16k          # overlap with another copy's picks

For the rows that write the answer (the last one of the prompt and each token drawn) every sparse layer and KV head has
a list of picked blocks. Two figures per length:

    read     needles whose block some head of some layer reads for the answer's first row, and by how many heads; near
             the ends of the prompt blocks are read whatever is chosen (the first ones and the local ones)
    overlap  mean over rows, layers and heads of |picks of both| / |picks of the original|, without those blocks; both
             models read the same prompt and the same answer

The rows of the answer run module by module, where picks can be seen, whatever reads the prompt.
"""

import argparse
import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from salalocal.evals.asking import Case, Question, Subject
from salalocal.evals.haystack import Haystack
from salalocal.evals.needle import NeedleRequest, needle_cases
from salalocal.kernels.block_topk import BlockGeometry
from salalocal.model.config import SPARSE
from salalocal.model.mixers import sparse
from salalocal.prompt.template import document_text
from salalocal.session.runtime import Runtime
from salalocal.settings import Settings, parse_tokens


@dataclass(frozen=True)
class Picked:
    """Blocks that one head reads, and those of them that it chose: not the ones that are always read."""

    all: frozenset[int]
    chosen: frozenset[int]


Picks = dict[tuple[int, int, int], Picked]
"""By row of the answer, sparse layer, KV head."""


@dataclass
class Recorder:
    """Notes what `block_topk` gives for the last row of each call, while it is on."""

    calls: list[tuple[Tensor, int, BlockGeometry]]

    def of_answer(self, num_layers: int) -> Picks:
        """The picks, row by row; calls come in the order of layers."""
        found: Picks = {}
        for number, (rows, position, geometry) in enumerate(self.calls):
            current = position // geometry.block_size
            first_local = current - geometry.local_blocks
            for head, picked in enumerate(rows.tolist()):
                blocks = frozenset(block for block in picked if block >= 0)
                chosen = frozenset(block for block in blocks if geometry.init_blocks <= block < first_local)
                found[number // num_layers, number % num_layers, head] = Picked(blocks, chosen)
        return found


@contextmanager
def recording() -> Iterator[Recorder]:
    """Watch the block choice of the sparse layers."""
    recorder, original = Recorder([]), sparse.block_topk

    def watched(q: Tensor, k1: Tensor, k2: Tensor, first: int, num_tokens: int, *rest: Any) -> Tensor:
        blocks: Tensor = original(q, k1, k2, first, num_tokens, *rest)
        recorder.calls.append((blocks[0, -1].cpu(), num_tokens - 1, rest[0]))
        return blocks

    sparse.block_topk = watched  # type: ignore[attr-defined]
    try:
        yield recorder
    finally:
        sparse.block_topk = original  # type: ignore[attr-defined]


def picks(runtime: Runtime, prompt: list[int], answer: list[int]) -> Picks:
    """What is picked for the rows that write a given answer. Gradients must be off."""
    engine = runtime.engine
    state = engine.new_state(len(prompt) + len(answer))
    engine.prefill(prompt[:-1], state)
    with recording() as recorder:
        for token in (prompt[-1], *answer[:-1]):
            engine.model(torch.tensor([[token]], device=engine.device), state)
    return recorder.of_answer(runtime.config.mixer_types.count(SPARSE))


def needle_block(runtime: Runtime, question: Question, block_size: int) -> int:
    """The block in which the needle's value stands."""
    pack, (value,) = question.conversation.pack, question.expected
    if pack is None:
        raise ValueError("a needle needs documents")
    before = runtime.codec.template.render(question.conversation)
    ids = 0
    for segment in before:
        if segment.kind == "document":
            break
        ids += len(segment.ids)
    for number, document in enumerate(pack, 1):
        text = document_text(number, document)
        if value in text:
            place = ids + len(runtime.tokenizer.encode(text[: text.index(value)]))
            return place // block_size
        ids += len(runtime.tokenizer.encode(text))
    raise ValueError("the needle is in no document")


def measured(runtimes: list[Runtime], case: Case) -> dict[str, Any]:
    """One needle: whether its block was picked, and how far the second model's picks agree."""
    question = case.make()
    first = runtimes[0]
    prompt = [token for segment in first.codec.template.render(question.conversation) for token in segment.ids]
    answer = first.tokenizer.encode(question.expected[0])
    each = [picks(runtime, prompt, answer) for runtime in runtimes]
    if not each[0]:
        raise ValueError(f"{len(prompt):,} tokens are read densely: nothing is picked")
    block = needle_block(first, question, first.config.sparse.block_size)
    at_first = [picked for (row, _, _), picked in each[0].items() if row == 0]
    pairs = [(picked.chosen, each[-1][key].chosen) for key, picked in each[0].items() if picked.chosen]
    overlaps = [len(one & other) / len(one) for one, other in pairs]
    return {
        "length": case.labels["length"],
        "depth": case.labels["depth"],
        "heads_reading": sum(block in picked.all for picked in at_first),
        "heads_choosing": sum(block in picked.chosen for picked in at_first),
        "heads": len(at_first),
        "overlap": sum(overlaps) / max(1, len(overlaps)),
    }


def table(rows: list[dict[str, Any]]) -> Iterator[str]:
    """A line for each length."""
    for length in sorted({row["length"] for row in rows}):
        chosen = [row for row in rows if row["length"] == length]
        read = sum(row["heads_reading"] > 0 for row in chosen)
        overlap = sum(row["overlap"] for row in chosen) / len(chosen)
        heads = sum(row["heads_reading"] for row in chosen) / len(chosen)
        yield (
            f"{length:>9,}: needle's block read for {read} of {len(chosen)}, by {heads:.1f} of {chosen[0]['heads']} "
            f"heads; overlap {overlap:.3f}"
        )


def main() -> None:
    """Parses the command line, measures, prints a table, writes JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="builtin:bf16")
    parser.add_argument("--against", help="another copy with the same tokenizer, to compare picks with")
    parser.add_argument("--device")
    parser.add_argument("--ctx", default="8k,16k")
    parser.add_argument("--samples", type=int, default=4, help="needles of each length, at evenly spaced depths")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    lengths = tuple(sorted(parse_tokens(text) for text in arguments.ctx.split(",")))
    names = [arguments.model, *([arguments.against] if arguments.against else [])]
    subjects = [Subject.find(Settings(name, arguments.device), lambda line: None) for name in names]
    runtimes = [subject.open(max(lengths)) for subject in subjects]
    codec = runtimes[0].codec
    request = NeedleRequest(lengths, depths=arguments.samples, samples=1)
    rows = []
    for case in needle_cases(request, Haystack.shipped(codec), codec):
        rows.append(measured(runtimes, case))
        print(case.label, rows[-1], file=sys.stderr, flush=True)
    print("\n".join(table(rows)))
    if arguments.out:
        arguments.out.write_text(json.dumps({"models": names, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    torch.set_grad_enabled(False)
    main()
