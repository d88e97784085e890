"""Steps, schedule and everything that has to be saved so that a run goes on as if it had not been interrupted.

In: a model, a phase, batches. Out: log.jsonl, weights-K.pt and state.pt in a folder. For: training/train.py.
"""

import copy
import json
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from salalocal.checkpoint.checkpoint import Checkpoint
from salalocal.checkpoint.folder import ModelFolder
from salalocal.checkpoint.names import CONFIG_FILE
from training.addresses import AddressProbe
from training.batches import KINDS, Batch
from training.model import EmbeddedModel
from training.optimizer import Optimizer
from training.stages import Phase
from training.transcript import ANSWER
from training.variants import ORIGINAL

NUM_PARTS = 4
STATE_FILE = "state.pt"
PROBE_RATE = 3e-3
WARM_STEPS = 100
SAVE_EVERY_S = 100.0
NOTE_EVERY_S = 8.0
SPARE_S = 3.0  # a run that is spread ends so long before its deadline

Parts = dict[str, Tensor]


def losses_of(
    model: EmbeddedModel, batch: Batch, phase: Phase, probes: nn.ModuleList | None = None
) -> tuple[Tensor, Parts]:
    """Total loss of a batch and its parts; the loss of each kind of answer, with how many ids it had, under "=KIND"."""
    hidden, extra = model(batch.ids, batch.cut, batch.hints, probes=probes)
    rows = batch.rows
    each = F.cross_entropy(
        model.logits(hidden.flatten(0, 1)[rows]).float(), batch.targets.flatten()[rows], reduction="none"
    )
    is_answer = (batch.marks.flatten()[rows] == ANSWER).float()
    text = (each * (1.0 - is_answer)).sum() / (1.0 - is_answer).sum().clamp(min=1.0)
    answer = (each * is_answer).sum() / is_answer.sum().clamp(min=1.0)
    total = answer + phase.text_weight * text
    total = total + phase.selection_weight * extra[:, 0].sum() + phase.pointer_weight * extra[:, 1].sum()
    total = total + phase.address_weight * extra[:, 3].sum()
    parts = {"answer": answer, "text": text}
    for order, name in enumerate(("header", "hop", "copy")):
        parts |= {f"select_{name}": extra[order, 0], f"{name}": extra[order, 2]}
    if probes is not None:
        parts |= {"knows_own": extra[0, 4], "knows_asked": extra[-1, 4]}
    parts = {name: torch.stack([value.detach(), torch.ones_like(value)]) for name, value in parts.items()}
    kinds = batch.kinds.flatten()[rows]
    sums = torch.zeros(2, len(KINDS), device=each.device)
    sums[0].index_add_(0, kinds, each.detach() * is_answer)
    sums[1].index_add_(0, kinds, is_answer)
    return total, parts | {f"={name}": sums[:, number] for number, name in enumerate(KINDS)}


def save(model: EmbeddedModel, folder: Path) -> None:
    """The weights in parts of similar size, written beside and renamed."""
    parts: list[dict[str, Tensor]] = [{} for _ in range(NUM_PARTS)]
    sizes = [0] * NUM_PARTS
    for name, tensor in sorted(model.state_dict().items(), key=lambda item: -item[1].numel()):
        smallest = sizes.index(min(sizes))
        parts[smallest][name] = tensor
        sizes[smallest] += tensor.numel()
    for number, part in enumerate(parts):
        write(part, folder / f"weights-{number}.pt")


def write(content: object, target: Path) -> None:
    """A file that is either the old one or the new one."""
    torch.save(content, target.with_suffix(".tmp"))
    target.with_suffix(".tmp").replace(target)


def restore(model: EmbeddedModel, folder: Path) -> None:
    """Loads what `save` wrote, or an exported folder, of which the form in bf16 if it has several."""
    state: dict[str, Tensor] = {}
    if (folder / CONFIG_FILE).exists():
        variants = ModelFolder(folder).variants
        checkpoint = Checkpoint.open(ModelFolder(folder, ORIGINAL if ORIGINAL in variants else None))
        state.update((name, checkpoint.tensor(name)) for name in checkpoint.tensor_names)
    for part in sorted(folder.glob("weights-*.pt")):
        state.update(torch.load(part, map_location="cpu", weights_only=True))
    model.load_state_dict(state)


def has_state(folder: Path) -> bool:
    """Whether a run was begun there."""
    return (folder / STATE_FILE).exists()


@dataclass
class Place:
    """Where a run is: in which phase, how many of its batches are seen, and which share of the whole run is done."""

    phase: int = 0
    batch: int = 0
    done: float = 0.0


class Trainer:
    """Runs phases on one device and writes the log; `total_s` are the seconds of all phases, `deadline` is a time."""

    def __init__(
        self, model: EmbeddedModel, device: torch.device, out: Path, total_s: float, deadline: float | None = None
    ):
        self.model, self.device, self.out, self.deadline = model, device, out, deadline
        self.pace = 1.0 / total_s
        self.is_spread = False
        self.optimizer = Optimizer(model)
        size = model.shape.hidden_size
        self.probes = nn.ModuleList([AddressProbe(size), AddressProbe(size)]).to(device)
        self.probe_optimizer = torch.optim.AdamW(self.probes.parameters(), lr=PROBE_RATE, weight_decay=0.0)
        self.average: EmbeddedModel | None = None
        self.log = (out / "log.jsonl").open("a")
        self.start = time.time()
        self.steps = 0
        self.place = Place()
        self.left_out: set[int] = set()

    # -- what is kept ------------------------------------------------------------------------------------------

    def note(self, **values: object) -> None:
        row = {"s": round(time.time() - self.start, 1), "step": self.steps, **values}
        self.log.write(json.dumps(row) + "\n")
        self.log.flush()
        print(json.dumps(row), flush=True)

    def save(self) -> None:
        """The weights that are worth most so far, and the state to go on from."""
        save(self.model if self.average is None else self.average, self.out)
        state: dict[str, Any] = {"place": asdict(self.place), "steps": self.steps, "model": self.model.state_dict()}
        state["average"] = None if self.average is None else self.average.state_dict()
        state["momenta"], state["other"] = self.optimizer.momenta, self.optimizer.other.state_dict()
        state["probes"], state["probe_rule"] = self.probes.state_dict(), self.probe_optimizer.state_dict()
        write(state, self.out / STATE_FILE)

    def load_state(self) -> None:
        """Goes on from what `save` wrote."""
        state = torch.load(self.out / STATE_FILE, map_location=self.device, weights_only=True)
        self.place, self.steps = Place(**state["place"]), state["steps"]
        self.model.load_state_dict(state["model"])
        if state["average"] is not None:
            self.average = copy.deepcopy(self.model)
            self.average.load_state_dict(state["average"])
        for kept, saved in zip(self.optimizer.momenta, state["momenta"], strict=True):
            kept.copy_(saved)
        self.optimizer.other.load_state_dict(state["other"])
        self.probes.load_state_dict(state["probes"])
        self.probe_optimizer.load_state_dict(state["probe_rule"])

    # -- running -----------------------------------------------------------------------------------------------

    def is_late(self) -> bool:
        """Whether this command has to end now."""
        return self.deadline is not None and time.time() >= self.deadline and self.place.done < 1.0

    def spread(self) -> None:
        """Lets what is left of the run end at the deadline."""
        if self.is_spread and self.deadline is not None:
            self.pace = (1.0 - self.place.done) / max(1.0, self.deadline - SPARE_S - time.time())

    def run(self, phase: Phase, ends: tuple[float, float], batches: Iterator[Batch]) -> None:
        """A phase between two shares of the whole run; the first step of each length, which compiles, takes no time."""
        begins, stops = ends
        self.spread()
        seen, sums, waited, lengths = 0, {}, 0.0, set()
        noted = saved = last = time.time()
        while self.place.done < stops and not self.is_late():
            asked = time.time()
            batch = next(batches)
            self.place.batch += 1
            length = batch.ids.shape[1]
            if length in self.left_out:
                continue
            batch = batch.to(self.device)
            waited += time.time() - asked
            share = max(0.0, (self.place.done - begins) / (stops - begins))
            factor = min(1.0, (self.steps + 1) / WARM_STEPS) * (phase.rate[0] + (phase.rate[1] - phase.rate[0]) * share)
            for name, value in self.attempt(phase, batch, factor).items():
                sums[name] = sums.get(name, 0.0) + value
            seen += batch.ids.numel()
            is_new = length not in lengths
            lengths.add(length)
            if is_new or (self.steps % 20 == 0 and time.time() - noted > NOTE_EVERY_S):
                elapsed, wait = time.time() - noted, round(waited / (time.time() - noted), 2)
                means = {name: round(float(a / b), 4) for name, (a, b) in sums.items() if b > 0}
                speed = round(seen / elapsed / 1000, 2)
                self.note(length=length, rate=round(factor, 4), ktok_s=speed, wait=wait, **self.progress(), **means)
                sums, seen, waited, noted = {}, 0, 0.0, time.time()
            now = time.time()
            if is_new:
                self.spread()
            else:
                self.place.done += (now - last) * self.pace
            last = now
            if now - saved > SAVE_EVERY_S:
                self.save()
                self.spread()
                last = saved = time.time()
        self.save()

    def progress(self) -> dict[str, float]:
        """What part of the run is done, and the device's memory at its highest."""
        found = {"done": round(self.place.done, 4)}
        if self.device.type == "cuda":
            found["peak_gb"] = round(torch.cuda.max_memory_allocated() / 1e9, 1)
        return found

    def attempt(self, phase: Phase, batch: Batch, factor: float) -> Parts:
        """A step; where a length does not fit the device it is left out from then on, and the log says so."""
        try:
            return self.step(phase, batch, factor)
        except torch.OutOfMemoryError:
            self.left_out.add(batch.ids.shape[1])
            self.note(left_out_for_memory=batch.ids.shape[1])
        self.model.zero_grad(set_to_none=True)
        torch.cuda.empty_cache()
        return {}

    def step(self, phase: Phase, batch: Batch, factor: float) -> Parts:
        """One step at a learning-rate factor; what `losses_of` found."""
        probes = self.probes if phase.address_weight else None
        with torch.autocast(self.device.type, torch.bfloat16):
            total, parts = losses_of(self.model, batch, phase, probes)
        total.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0, foreach=True)
        self.optimizer.step(factor)
        self.model.zero_grad(set_to_none=True)
        if probes is not None:
            self.probe_optimizer.step()
            self.probe_optimizer.zero_grad(set_to_none=True)
        self.steps += 1
        if phase.average:
            self.follow(phase.average)
        return parts

    @torch.no_grad()
    def follow(self, decay: float) -> None:
        """Moves the average of the weights towards them."""
        if self.average is None:
            self.average = copy.deepcopy(self.model)
        decay = min(decay, self.steps / (self.steps + 10))
        for kept, new in zip(self.average.parameters(), self.model.parameters(), strict=True):
            kept.lerp_(new, 1.0 - decay)
