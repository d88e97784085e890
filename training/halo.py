"""The parts of a conversion from full attention to the hybrid, after HALO: samples, twin, Lightning layers, choice.

In: the corpus as ids, a shape, a twin. Out: batches, models and their losses. For: training/halo_run.py.

    twin          full attention with RoPE in every layer, otherwise the hybrid's sizes
    lightning     a Lightning layer that starts from an attention layer's projections
    alignment     it learns that layer's outputs from that layer's inputs: relative squared error
    score         of a layer: recall lost / (nats of text lost + 0.01) where it alone is replaced; the best stay
    distillation  KL(twin || hybrid) of the next id

The attention of the hybrid has no positions. At these lengths it is dense: no block is left out below `dense_len`.

Source: Chen et al., "Hybrid Linear Attention Done Right", arXiv 2601.22156; for the choice of layers their repository
thunlp/hybrid-linear-attention. Otherwise than there: the choice is made by recall samples and the loss of text; its
score is taken against the twin, with a floor of 0.01 nats, where HALO takes it against the best variant; attention
logits are not scaled by position; and in a share of the recall samples no Lightning state passes from the pairs to the
questions (training/README.md).
"""

from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from training.corpus import Corpus
from training.model import (
    LIGHTNING,
    SPARSE,
    EmbeddedModel,
    LightningMixer,
    Shape,
    SparseMixer,
    Watched,
    rms_norm,
    rotary,
)
from training.selection import sparse_attention

VOCABULARY = 2048  # pieces are in the order of their merges, so these are the commonest; the last stands for all others
NUM_KEYS = 16  # and values
KEY, VALUE, PAIR, FILLER = 300, 400, 500, (800, 2000)  # ids of the recall samples: of the first one; from, below
IGNORED = -100
FLOOR = 0.01
MICRO = Shape(
    vocab_size=VOCABULARY,
    hidden_size=64,
    intermediate_size=160,
    mixer_types=(LIGHTNING, LIGHTNING, SPARSE, LIGHTNING, LIGHTNING, SPARSE),
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=32,
    lightning_heads=4,
    lightning_head_dim=32,
    dense_len=1 << 30,
)


@dataclass(frozen=True)
class Task:
    """Rows of text and of recall in a batch; pairs and questions in a row of recall, at most."""

    text_rows: int = 4
    recall_rows: int = 12
    num_pairs: int = 12
    num_questions: int = 32

    @property
    def num_rows(self) -> int:
        return self.text_rows + self.recall_rows


@dataclass(frozen=True)
class Samples:
    """A batch: ids and targets [B, T], targets that count nowhere are IGNORED; the first `num_text` rows are text, the
    others recall; rows at or after `cut` [B] see no Lightning state from before it.
    """

    ids: Tensor
    targets: Tensor
    cut: Tensor
    num_text: int


class Source:
    """Endless batches of text and recall from one seed."""

    def __init__(self, corpus: Corpus, task: Task, seed: int):
        ids = np.concatenate([file.ids for name in corpus.names for file in corpus.packages[name]])
        self.ids = np.minimum(ids, VOCABULARY - 1)
        self.task = task
        self.rng = np.random.default_rng(seed)

    def text(self, count: int, length: int) -> tuple[Tensor, Tensor]:
        """Windows of the corpus: ids and targets [count, length]."""
        starts = self.rng.integers(0, len(self.ids) - length - 1, count)
        rows = torch.from_numpy(np.stack([self.ids[at : at + length + 1] for at in starts]).astype(np.int64))
        return rows[:, :-1], rows[:, 1:]

    def recall(self, pairs: Tensor, questions: Tensor, length: int) -> tuple[Tensor, Tensor, Tensor]:
        """Rows with so many pairs among filler, an id for each, then, from a boundary on, so many keys, each with its
        value: all in random order, and again from the start. Values may be equal, so that none follows from those
        already told. The id of a pair is PAIR + NUM_KEYS * key + value: one step of attention finds it by its key.

        Result: ids and targets [rows, length], which are the values, at their keys behind the boundary; boundaries
        [rows].
        """
        ids = self.rng.integers(*FILLER, (len(pairs), length))
        targets = np.full((len(pairs), length), IGNORED)
        boundaries = length - 2 * questions
        for row, (count, asked, boundary) in enumerate(torch.stack([pairs, questions, boundaries], 1).tolist()):
            keys = self.rng.choice(NUM_KEYS, count, replace=False)
            values = self.rng.integers(0, NUM_KEYS, count)
            ids[row, self.rng.choice(boundary, count, replace=False)] = PAIR + NUM_KEYS * keys + values
            order = np.concatenate([self.rng.permutation(count) for _ in range(-(-asked // count))])[:asked]
            ids[row, boundary::2], ids[row, boundary + 1 :: 2] = KEY + keys[order], VALUE + values[order]
            targets[row, boundary::2] = VALUE + values[order]
        return torch.from_numpy(ids), torch.from_numpy(targets), boundaries

    def batch(self, rows: int, length: int, cut_share: float) -> Samples:
        """So many rows, of both kinds by the task's proportion; `cut_share` of the recall rows have a state cut."""
        num_text = rows * self.task.text_rows // self.task.num_rows
        num_recall = rows - num_text
        text_ids, text_targets = self.text(num_text, length)
        pairs = torch.from_numpy(self.rng.integers(2, self.task.num_pairs + 1, num_recall))
        questions = torch.from_numpy(self.rng.integers(self.task.num_pairs, self.task.num_questions + 1, num_recall))
        ids, targets, boundary = self.recall(pairs, questions, length)
        is_cut = torch.from_numpy(self.rng.random(num_recall) < cut_share)
        cut = torch.cat([torch.full((num_text,), length), boundary.where(is_cut, length)])
        return Samples(torch.cat([text_ids, ids]), torch.cat([text_targets, targets]), cut, num_text)


class RotaryMixer(SparseMixer):
    """Full attention with positions: a layer of the twin, with the sparse layer's parameters."""

    def __init__(self, shape: Shape):
        super().__init__(shape)
        self.theta = shape.rope_theta

    def forward(self, x: Tensor, watched: Watched, is_zeroed: bool = False) -> tuple[Tensor, list[Tensor]]:
        batch, length, _ = x.shape
        q = rotary(self.q_proj(x).view(batch, length, self.heads, self.size), self.theta).transpose(1, 2)
        k = rotary(self.k_proj(x).view(batch, length, self.kv_heads, self.size), self.theta).transpose(1, 2)
        v = self.v_proj(x).view(batch, length, self.kv_heads, self.size).transpose(1, 2)
        out = sparse_attention(q, k, v, self.dense_len, self.geometry)
        out = out.transpose(1, 2).reshape(batch, length, -1) * torch.sigmoid(self.o_gate(x))
        return self.o_proj(out) * (0.0 if is_zeroed else 1.0), []


def twin_of(shape: Shape) -> EmbeddedModel:
    """A new model of these sizes with full attention in every layer."""
    twin_shape = replace(shape, mixer_types=(SPARSE,) * len(shape.mixer_types))
    model = EmbeddedModel(twin_shape)
    for block in model.model.layers:
        mixer = RotaryMixer(twin_shape)
        mixer.load_state_dict(block.self_attn.state_dict())
        block.self_attn = mixer
    return model


def lightning_from(mixer: SparseMixer, shape: Shape) -> LightningMixer:
    """A Lightning layer with an attention layer's projections, keys and values repeated to all heads.

    Raises: ValueError where the heads of the two do not correspond.
    """
    if (shape.lightning_heads, shape.lightning_head_dim) != (mixer.heads, mixer.size):
        raise ValueError(f"{mixer.heads} heads of {mixer.size} cannot start {shape.lightning_heads} Lightning heads")
    made = LightningMixer(shape)
    shared = mixer.heads // mixer.kv_heads

    def repeated(weight: Tensor) -> Tensor:
        return weight.view(mixer.kv_heads, mixer.size, -1).repeat_interleave(shared, 0).flatten(0, 1)

    with torch.no_grad():
        made.q_proj.weight.copy_(mixer.q_proj.weight)
        made.k_proj.weight.copy_(repeated(mixer.k_proj.weight))
        made.v_proj.weight.copy_(repeated(mixer.v_proj.weight))
        made.z_proj.weight.copy_(mixer.o_gate.weight)
        made.o_proj.weight.copy_(mixer.o_proj.weight)
    return made


def hybrid_of(twin: EmbeddedModel, aligned: nn.ModuleList, kept: list[int], shape: Shape) -> EmbeddedModel:
    """A copy of the twin with attention, now without positions, in the `kept` layers and Lightning layers elsewhere."""
    kinds = tuple(SPARSE if layer in kept else LIGHTNING for layer in range(len(aligned)))
    hybrid = EmbeddedModel(replace(shape, mixer_types=kinds))
    state = twin.state_dict()
    for layer, mixer in enumerate(aligned):
        if layer not in kept:
            prefix = f"model.layers.{layer}.self_attn."
            state = {name: tensor for name, tensor in state.items() if not name.startswith(prefix)}
            state |= {prefix + name: tensor for name, tensor in mixer.state_dict().items()}
    hybrid.load_state_dict(state)
    return hybrid


def with_one_replaced(twin: EmbeddedModel, aligned: nn.ModuleList, layer: int, shape: Shape) -> EmbeddedModel:
    """The twin with its Lightning layer in one place; the others are the twin's own, with their positions."""
    others = [at for at in range(len(aligned)) if at != layer]
    model = hybrid_of(twin, aligned, others, shape)
    for at in others:
        model.model.layers[at].self_attn = twin.model.layers[at].self_attn
    return model


def logits_that_count(model: EmbeddedModel, samples: Samples, cut: Tensor | None) -> tuple[Tensor, Tensor]:
    """Logits where a target counts, of text [N, V] and of recall [M, V]."""
    hidden, _ = model(samples.ids, cut)
    counts, n = samples.targets != IGNORED, samples.num_text
    return model.logits(hidden[:n][counts[:n]]).float(), model.logits(hidden[n:][counts[n:]]).float()


def data_loss(model: EmbeddedModel, samples: Samples, cut: Tensor | None) -> Tensor:
    """Cross entropy of text plus that of recalled values."""
    counts, n = samples.targets != IGNORED, samples.num_text
    text, recall = logits_that_count(model, samples, cut)
    return F.cross_entropy(text, samples.targets[:n][counts[:n]]) + F.cross_entropy(
        recall, samples.targets[n:][counts[n:]]
    )


def distillation_loss(model: EmbeddedModel, twin: EmbeddedModel, samples: Samples) -> Tensor:
    """KL divergence from the twin's chances to the hybrid's, which has the cut: of text plus of recalled values."""
    with torch.no_grad():
        wanted = logits_that_count(twin, samples, None)
    found = logits_that_count(model, samples, samples.cut)
    text, recall = (
        F.kl_div(mine.log_softmax(-1), theirs.log_softmax(-1), log_target=True, reduction="batchmean")
        for mine, theirs in zip(found, wanted, strict=True)
    )
    return text + recall


def alignment_loss(twin: EmbeddedModel, aligned: nn.ModuleList, samples: Samples) -> Tensor:
    """Squared error of every Lightning layer's outputs against its attention layer's, by their mean square, summed."""
    cut = torch.full((len(samples.ids),), samples.ids.shape[1])
    with torch.no_grad():
        h = twin.model.embed_tokens(samples.ids) * twin.shape.scale_emb
    total = torch.zeros(())
    for block, mixer in zip(twin.model.layers, aligned, strict=True):
        with torch.no_grad():
            x = rms_norm(h, block.input_layernorm.weight, block.eps)
            wanted, _ = block.self_attn(x, [])
            h = block.mlp_part(h + wanted * block.branch_scale)
        found = mixer(x, cut)
        total = total + (found - wanted).float().square().mean() / wanted.float().square().mean()
    return total


def score_of(whole: dict[str, float], without: dict[str, float], recall: str) -> float:
    """How much a layer is worth keeping: recall lost without it for each nat of text lost."""
    lost = max(0.0, whole[recall] - without[recall])
    return lost / (max(0.0, without["text_loss"] - whole["text_loss"]) + FLOOR)


def best_layers(scores: list[float], count: int) -> list[int]:
    """The layers with the highest scores, in order; of equals the earlier."""
    return sorted(sorted(range(len(scores)), key=lambda layer: (-scores[layer], layer))[:count])


@torch.no_grad()
def measured(model: EmbeddedModel, source: Source, lengths: tuple[int, ...], num_parts: int = 4) -> dict[str, float]:
    """Text loss in nats a token at the first length; by length, the share of values recalled where every key is asked
    for once, all rows with the most pairs; at the first length also with a state cut at the boundary, which is what
    attention alone carries. All of it on `num_parts` times 16 rows.
    """
    figures = {"text_loss": 0.0}
    for _ in range(num_parts):
        ids, targets = source.text(16, lengths[0])
        loss = F.cross_entropy(model.logits(model(ids)[0]).flatten(0, 1), targets.flatten())
        figures["text_loss"] += float(loss) / num_parts
    for length in lengths:
        pairs = torch.full((16 * num_parts,), source.task.num_pairs)
        ids, targets, boundary = source.recall(pairs, pairs, length)
        asked = targets[0] != IGNORED
        whole = torch.full_like(boundary, length)
        cuts = {f"recall_{length}": whole} | ({f"recall_{length}_cut": boundary} if length == lengths[0] else {})
        for name, cut in cuts.items():
            parts = [model(*part)[0][:, asked] for part in zip(ids.split(16), cut.split(16), strict=True)]
            best = torch.cat([model.logits(part).argmax(-1) for part in parts])
            figures[name] = float((best == targets[:, asked]).float().mean())
    return {name: round(value, 4) for name, value in figures.items()}
