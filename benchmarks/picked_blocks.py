"""What the sparse layers pick when a model is asked for a needle, by context length: is its block among them, and do a
quantized copy's picks agree with the original's.

    python benchmarks/picked_blocks.py --ctx 8k,16k,32k,64k,128k --samples 8 --out picks.json
    python benchmarks/picked_blocks.py --against builtin --ctx 16k          # overlap with another copy's picks
    python benchmarks/picked_blocks.py --keys 4 --ctx 16k                   # with other needles beside the asked one

The model answers; for each row that writes the answer (the last one of the prompt and each token drawn) every sparse
layer and KV head has a list of picked blocks. Figures per length:

    right    needles whose value is in the answer
    read     needles whose block some head of some layer reads for the answer's first row, and by how many heads; near
             the ends of the prompt blocks are read whatever is chosen (the first ones and the local ones)
    later    the same for any row of the answer: a name may have to be written before its value is looked for
    overlap  mean over rows, layers and heads of |picks of both| / |picks of the original|, without the blocks that are
             always read; both models read the same prompt and the original's answer

The rows of the answer run module by module, where picks can be seen, whatever reads the prompt.
"""

import argparse
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from salalocal.evals.asking import Case, Question, Subject
from salalocal.evals.haystack import Haystack
from salalocal.evals.needle import NeedleRequest, needle_cases
from salalocal.kernels.block_topk import BlockGeometry
from salalocal.model.mixers.sparse import SparseState, block_geometry
from salalocal.model.state import ModelState
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

MAX_ANSWER_TOKENS = 64


@dataclass(frozen=True)
class Answered:
    """Tokens of an answer, without the one that ends it, and what was picked for the rows that write them."""

    tokens: list[int]
    picks: Picks


def answer(runtime: Runtime, prompt: list[int], given: list[int] | None = None) -> Answered:
    """What is picked while a model answers a prompt, or writes a given answer. Gradients must be off."""
    engine = runtime.engine
    state = engine.new_state(len(prompt) + MAX_ANSWER_TOKENS)
    engine.prefill(prompt[:-1], state)
    tokens: list[int] = []
    picks: Picks = {}
    row = prompt[-1]
    while len(tokens) < MAX_ANSWER_TOKENS:
        hidden = engine.model(torch.tensor([[row]], device=engine.device), state)
        picks |= newest_picks(state, len(tokens), block_geometry(runtime.config.sparse))
        row = int(engine.model.logits(hidden[0, -1]).argmax()) if given is None else [*given, -1][len(tokens)]
        if row < 0 or row in runtime.stop_ids:
            break
        tokens.append(row)
    return Answered(tokens, picks)


def newest_picks(state: ModelState, row: int, geometry: BlockGeometry) -> Picks:
    """What the newest token picked, under the number of its row; nothing where it read everything."""
    first_local = (state.num_tokens - 1) // geometry.block_size - geometry.local_blocks
    layers = [layer for layer in state.layers if isinstance(layer, SparseState)]
    found: Picks = {}
    for number, layer in enumerate(layers):
        for head, picked in enumerate([] if layer.picked is None else layer.picked.blocks[0, 0].tolist()):
            blocks = frozenset(block for block in picked if block >= 0)
            chosen = frozenset(block for block in blocks if geometry.init_blocks <= block < first_local)
            found[row, number, head] = Picked(blocks, chosen)
    return found


def overlap(first: Picks, second: Picks) -> float | None:
    """How many of the blocks chosen by one model another one chooses too; None if there was nothing to choose."""
    pairs = [(picked.chosen, second[key].chosen) for key, picked in first.items() if picked.chosen]
    return sum(len(one & other) / len(one) for one, other in pairs) / len(pairs) if pairs else None


def prompt_ids(runtime: Runtime, question: Question) -> list[int]:
    """The tokens of a question with its documents."""
    return [token for segment in runtime.codec.template.render(question.conversation) for token in segment.ids]


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
    """One needle: what is answered, who reads its block, and how far the second model's picks agree."""
    question = case.make()
    first = runtimes[0]
    prompt = prompt_ids(first, question)
    found = answer(first, prompt)
    if not found.picks:
        raise ValueError(f"{len(prompt):,} tokens are read densely: nothing is picked")
    others = [answer(runtime, prompt, found.tokens).picks for runtime in runtimes[1:]]
    block = needle_block(first, question, first.config.sparse.block_size)
    reading = {key for key, picked in found.picks.items() if block in picked.all}
    heads = {key[1:] for key in found.picks}
    text = first.tokenizer.decode(found.tokens)
    return {
        "length": case.labels["length"],
        "depth": case.labels["depth"],
        "right": question.mark(text).is_right,
        "answer": text,
        "heads_reading": sum(row == 0 for row, _, _ in reading),
        "heads_choosing": sum(block in found.picks[key].chosen for key in reading if key[0] == 0),
        "heads_reading_later": len({key[1:] for key in reading}),
        "layers_reading": sorted({layer for row, layer, _ in reading if row == 0}),
        "layers_reading_later": sorted({layer for _, layer, _ in reading}),
        "heads": len(heads),
        "overlap": overlap(found.picks, others[0] if others else found.picks),
    }


def table(rows: list[dict[str, Any]]) -> Iterator[str]:
    """A line for each length."""
    for length in sorted({row["length"] for row in rows}):
        chosen = [row for row in rows if row["length"] == length]
        num, heads = len(chosen), chosen[0]["heads"]
        read, later = (sum(row[name] > 0 for row in chosen) for name in ("heads_reading", "heads_reading_later"))
        overlaps = [row["overlap"] for row in chosen if row["overlap"] is not None]
        shared = f"{sum(overlaps) / len(overlaps):.3f}" if overlaps else "-"
        yield (
            f"{length:>9,}: {sum(row['right'] for row in chosen)} of {num} right; needle's block read at first for "
            f"{read}, by {sum(row['heads_reading'] for row in chosen) / num:.1f} of {heads} heads, later for {later}; "
            f"overlap {shared}"
        )


def main() -> None:
    """Parses the command line, measures, prints a table, writes JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="builtin:bf16")
    parser.add_argument("--against", help="another copy with the same tokenizer, to compare picks with")
    parser.add_argument("--device")
    parser.add_argument("--ctx", default="8k,16k")
    parser.add_argument(
        "--samples", type=int, default=4, help="needles of each length, at even depths between the ends"
    )
    parser.add_argument("--keys", type=int, default=1, help="needles planted; one of them is asked for")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    lengths = tuple(sorted(parse_tokens(text) for text in arguments.ctx.split(",")))
    names = [arguments.model, *([arguments.against] if arguments.against else [])]
    subjects = [Subject.find(Settings(name, arguments.device), lambda line: None) for name in names]
    runtimes = [subject.open(max(lengths) + MAX_ANSWER_TOKENS) for subject in subjects]
    codec = runtimes[0].codec
    request = NeedleRequest(lengths, depths=arguments.samples + 2, samples=1, keys=arguments.keys)
    rows = []
    for case in needle_cases(request, Haystack.shipped(codec), codec):
        if case.labels["depth"] in (0, 100):  # what stands at the ends is read whatever is chosen
            continue
        rows.append(measured(runtimes, case))
        print(case.label, rows[-1], file=sys.stderr, flush=True)
    print("\n".join(table(rows)))
    if arguments.out:
        arguments.out.write_text(json.dumps({"models": names, "keys": arguments.keys, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    torch.set_grad_enabled(False)
    main()
