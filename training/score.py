"""Exact-match scoring by teacher forcing: greedy decoding gives the right answer iff every right id is the most likely
one.

In: a model and samples. Out: right and asked counts by kind. For: training/train.py and training/evaluate.py.
"""

from collections import defaultdict

import numpy as np
import torch
import torch.nn.functional as F

from training.model import EmbeddedModel
from training.transcript import ANSWER, Sample

Counts = dict[str, tuple[int, int]]


def answer_spans(sample: Sample) -> list[tuple[int, int]]:
    """Target positions [first, last) of each answer, with its end token."""
    is_answer = np.concatenate([[0], (sample.marks == ANSWER).astype(np.int8), [0]])
    edges = np.flatnonzero(np.diff(is_answer))
    return list(zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True))


@torch.no_grad()
def score(
    model: EmbeddedModel,
    samples: list[Sample],
    device: torch.device,
    is_zeroed: bool = False,
    dtype: torch.dtype = torch.bfloat16,
) -> Counts:
    """Right and asked answers by kind, plus "all"; `dtype` is the one of the products on a GPU."""
    counts: dict[str, list[int]] = defaultdict(lambda: [0, 0])
    for sample in samples:
        spans = answer_spans(sample)
        last = max(stop for _, stop in spans)
        length = min(len(sample.ids) - 1, (last + 127) // 128 * 128)
        ids = torch.from_numpy(sample.ids[:length].astype(np.int64))[None].to(device)
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda" and dtype == torch.bfloat16):
            hidden, _ = model(ids, is_zeroed=is_zeroed)
            rows = torch.tensor([i - 1 for first, stop in spans for i in range(first, stop)], device=device)
            best = model.logits(hidden[0, rows]).argmax(-1).cpu().numpy()
        right = best == np.concatenate([sample.ids[first:stop] for first, stop in spans])
        at = 0
        for turn, (first, stop) in zip(sample.turns, spans, strict=True):
            is_right = bool(right[at : at + stop - first].all())
            at += stop - first
            for name in (turn.kind, "all"):
                counts[name][0] += is_right
                counts[name][1] += 1
    return {name: (right, asked) for name, (right, asked) in counts.items()}


@torch.no_grad()
def text_loss(model: EmbeddedModel, samples: list[Sample], device: torch.device) -> float:
    """Mean cross entropy of the ids of the documents, in nats."""
    total, num_ids = 0.0, 0
    for sample in samples:
        length = sample.boundary // 128 * 128
        ids = torch.from_numpy(sample.ids[: length + 1].astype(np.int64)).to(device)
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            hidden, _ = model(ids[None, :-1])
            logits = model.logits(hidden[0])
        total += float(F.cross_entropy(logits.float(), ids[1:], reduction="sum"))
        num_ids += length
    return total / max(1, num_ids)


def shares(counts: Counts) -> str:
    """One line: kind right/asked."""
    return "  ".join(f"{name} {right}/{asked}" for name, (right, asked) in sorted(counts.items()))
