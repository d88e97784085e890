"""From full attention to the hybrid by HALO's steps, against training the hybrid from nothing on the same tokens.

    python -m training.halo_run --out training/runs/halo                  # 14 minutes of one CPU thread
    python -m training.halo_run --out training/runs/halo --scale 0.01     # the same in miniature, to see that it runs

In: the corpus of `training/data.py`. Out: OUT/seed-N.json with plan, curves and figures. For: training/LOG.md.

    twin        trained from nothing on text and recall
    alignment   a Lightning layer beside every attention layer; all else frozen
    choice      each layer alone is replaced; those with the best scores stay attention
    distil      the hybrid learns the twin's chances
    continue    the hybrid learns from the data, twice as long
    from nothing  the same hybrid with new weights: with the conversion's tokens, and with those of twin and conversion;
                  its last part is the same `continue`
"""

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from training.corpus import Corpus
from training.halo import (
    MICRO,
    Samples,
    Source,
    Task,
    alignment_loss,
    best_layers,
    data_loss,
    distillation_loss,
    hybrid_of,
    lightning_from,
    measured,
    score_of,
    twin_of,
    with_one_replaced,
)
from training.model import EmbeddedModel, Shape
from training.optimizer import Optimizer

FINAL, CHOICE = 1, 2  # seeds of the held-out samples: for the figures, and to choose layers by
STARTED, RESTARTED, LAST = (0.6, 0.1), (0.4, 0.1), (0.1, 0.0)  # learning rates of a part: from, to
WARM_UP, NUM_ROWS = 30, 8


@dataclass(frozen=True)
class Tokens:
    """Tokens of each part."""

    twin: int = 2_600_000
    alignment: int = 250_000
    distil: int = 500_000
    continued: int = 250_000

    @property
    def conversion(self) -> int:
        return self.alignment + self.distil + self.continued

    def scaled(self, factor: float) -> "Tokens":
        return Tokens(*(int(count * factor) for count in asdict(self).values()))


@dataclass(frozen=True)
class Plan:
    """What a run is made of: `length` is that of all parts but the last, which is twice as long; figures are taken on
    `num_measured` times 16 rows.
    """

    seed: int = 1
    shape: Shape = MICRO
    num_kept: int = 2
    length: int = 128
    cut_share: float = 0.5
    num_measured: int = 4
    task: Task = field(default_factory=Task)
    tokens: Tokens = field(default_factory=Tokens)


@dataclass(frozen=True)
class Part:
    """One training: its name, tokens, rates (from, to), length, and the share of recall rows with a state cut."""

    name: str
    tokens: int
    rates: tuple[float, float]
    length: int
    cut_share: float


class Run:
    """Trains part after part, and keeps curves and figures."""

    def __init__(self, out: Path, corpus: Corpus, heldout: Corpus, plan: Plan):
        self.path, self.corpus, self.heldout, self.plan = out / f"seed-{plan.seed}.json", corpus, heldout, plan
        self.record: dict[str, Any] = {"plan": asdict(plan), "curves": {}, "seconds": {}, "figures": {}}
        self.begun = time.time()

    def measured(self, model: EmbeddedModel, seed: int, lengths: tuple[int, ...]) -> dict[str, float]:
        """Figures on held-out samples, always the same for a seed."""
        return measured(model, Source(self.heldout, self.plan.task, seed), lengths, self.plan.num_measured)

    def train(
        self,
        part: Part,
        parameters: nn.Module,
        loss: Callable[[Samples], Tensor],
        watched: EmbeddedModel | None = None,
    ) -> None:
        """Spends the part's tokens on its own samples; `watched` is measured on the way."""
        plan, begun = self.plan, time.time()
        source = Source(self.corpus, plan.task, plan.seed * 1000 + len(self.record["curves"]))
        optimizer = Optimizer(parameters)
        size = max(2, plan.task.num_rows * plan.length // part.length)
        steps = max(2, part.tokens // (size * part.length))
        every = max(1, steps // NUM_ROWS)
        curve = self.record["curves"].setdefault(part.name, [])
        total = 0.0
        for step in range(steps):
            samples = source.batch(size, part.length, part.cut_share)
            with torch.autocast("cpu", torch.bfloat16):
                value = loss(samples)
            value.backward()
            torch.nn.utils.clip_grad_norm_(parameters.parameters(), 1.0)
            first, last = part.rates
            optimizer.step(min(1.0, (step + 1) / WARM_UP) * (first + (last - first) * step / steps))
            parameters.zero_grad(set_to_none=True)
            total += float(value.detach())
            if (step + 1) % every == 0:
                row = {"tokens": (step + 1) * size * part.length, "loss": round(total / every, 4)}
                total = 0.0
                curve.append(row | (self.measured(watched, FINAL, (plan.length,)) if watched else {}))
                self.say(part.name, curve[-1])
        self.record["seconds"][part.name] = round(time.time() - begun)

    def figure(self, name: str, value: object) -> None:
        """Keeps a figure."""
        self.record["figures"][name] = value
        self.say(name, value)

    def say(self, name: str, value: object) -> None:
        """Prints a line and saves the record."""
        print(f"{time.time() - self.begun:6.0f} s  {name}: {value}", flush=True)
        self.path.write_text(json.dumps(self.record, indent=1) + "\n")

    def final(self, name: str, model: EmbeddedModel, tokens: int) -> None:
        """Keeps a model's figures at the training length and at four times that."""
        figures = self.measured(model, FINAL, (self.plan.length, 4 * self.plan.length))
        self.figure(name, {"tokens": tokens} | figures)


def kept_layers(run: Run, twin: EmbeddedModel, aligned: nn.ModuleList) -> list[int]:
    """The layers that stay attention."""
    lengths = (run.plan.length,)
    whole, scores = run.measured(twin, CHOICE, lengths), []
    run.figure("choice: twin", whole)
    for layer in range(len(aligned)):
        found = run.measured(with_one_replaced(twin, aligned, layer, run.plan.shape), CHOICE, lengths)
        scores.append(score_of(whole, found, f"recall_{run.plan.length}"))
        run.figure(f"choice: layer {layer} replaced", found | {"score": round(scores[-1], 3)})
    return best_layers(scores, run.plan.num_kept)


def last_part(plan: Plan, name: str) -> Part:
    """The part on the data, twice as long, that every hybrid ends with."""
    return Part(name, plan.tokens.continued, LAST, 2 * plan.length, plan.cut_share)


def converted(run: Run, twin: EmbeddedModel) -> EmbeddedModel:
    """The hybrid that HALO's steps make of the twin."""
    plan, tokens = run.plan, run.plan.tokens
    twin.requires_grad_(False)
    aligned = nn.ModuleList(lightning_from(block.self_attn, plan.shape) for block in twin.model.layers)
    part = Part("alignment", tokens.alignment, RESTARTED, plan.length, 0.0)
    run.train(part, aligned, lambda samples: alignment_loss(twin, aligned, samples))
    kept = kept_layers(run, twin, aligned)
    run.figure("kept", kept)
    hybrid = hybrid_of(twin, aligned, kept, plan.shape)
    run.final("hybrid after alignment", hybrid, tokens.alignment)
    part = Part("distil", tokens.distil, RESTARTED, plan.length, plan.cut_share)
    run.train(part, hybrid, lambda samples: distillation_loss(hybrid, twin, samples), hybrid)
    run.final("hybrid after distillation", hybrid, tokens.alignment + tokens.distil)
    run.train(last_part(plan, "continue"), hybrid, lambda samples: data_loss(hybrid, samples, samples.cut), hybrid)
    run.final("hybrid converted", hybrid, tokens.conversion)
    return hybrid


def from_nothing(run: Run, shape: Shape, name: str, tokens: int) -> None:
    """Trains a hybrid with new weights on so many tokens."""
    torch.manual_seed(run.plan.seed)
    model = EmbeddedModel(shape)
    part = Part(name, tokens - run.plan.tokens.continued, STARTED, run.plan.length, run.plan.cut_share)
    for each in (part, last_part(run.plan, f"{name}, continue")):
        run.train(each, model, lambda samples: data_loss(model, samples, samples.cut), model)
    run.final(name, model, tokens)


def perform(run: Run) -> None:
    """Twin, conversion, and the hybrid from nothing."""
    plan = run.plan
    torch.manual_seed(plan.seed)
    twin = twin_of(plan.shape)
    part = Part("twin", plan.tokens.twin, STARTED, plan.length, 0.0)
    run.train(part, twin, lambda samples: data_loss(twin, samples, None), twin)
    run.final("twin", twin, plan.tokens.twin)
    hybrid = converted(run, twin)
    run.figure("parameters", {"twin": count(twin), "hybrid": count(hybrid)})
    from_nothing(run, hybrid.shape, "hybrid from nothing, conversion's tokens", plan.tokens.conversion)
    everything = plan.tokens.twin + plan.tokens.conversion
    from_nothing(run, hybrid.shape, "hybrid from nothing, all tokens", everything)


def count(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def main() -> None:
    """Parses the command line, runs, prints and writes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--scale", type=float, default=1.0, help="of the tokens of every part")
    parser.add_argument("--limit-mb", type=float, default=12.0, help="of the corpus's text")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    limit = int(arguments.limit_mb * 1e6)
    plan = replace(Plan(), seed=arguments.seed, tokens=Tokens().scaled(arguments.scale))
    perform(Run(arguments.out, Corpus.load("train", limit), Corpus.load("heldout", limit), plan))


if __name__ == "__main__":
    main()
