"""The parts of a conversion: samples that can be answered, layers that start as they should, the choice of layers."""

import dataclasses

import pytest
import torch
from torch import Tensor, nn
from training_cases import small_corpus

from training import halo
from training.halo import IGNORED, Source, Task
from training.model import LIGHTNING, SPARSE, EmbeddedModel, Shape

KINDS = (LIGHTNING, SPARSE, LIGHTNING)
TINY = dataclasses.replace(
    halo.MICRO, hidden_size=32, intermediate_size=48, mixer_types=KINDS, head_dim=8, lightning_head_dim=8
)
TASK = Task(text_rows=2, recall_rows=4, num_pairs=12, num_questions=20)


@pytest.fixture
def source(seed: int) -> Source:
    return Source(small_corpus(), TASK, seed)


@pytest.fixture
def twin(seed: int) -> EmbeddedModel:
    torch.manual_seed(seed)
    return halo.twin_of(TINY)


def aligned_with(twin: EmbeddedModel) -> nn.ModuleList:
    return nn.ModuleList(halo.lightning_from(block.self_attn, TINY) for block in twin.model.layers)


def pairs_before(row: Tensor, boundary: int) -> dict[int, int]:
    """The ids of keys and of their values, by the ids of the pairs."""
    pairs = [number - halo.PAIR for number in row[:boundary].tolist() if halo.PAIR <= number < halo.FILLER[0]]
    return {halo.KEY + pair // halo.NUM_KEYS: halo.VALUE + pair % halo.NUM_KEYS for pair in pairs}


def test_every_question_of_a_recall_row_is_answered_by_one_pair_before_it(source: Source) -> None:
    ids, targets, boundaries = source.recall(torch.tensor([2, 5, 12]), torch.tensor([5, 5, 26]), 128)
    assert boundaries.tolist() == [118, 118, 76]
    assert ids.shape == targets.shape == (3, 128)
    for row, wanted, boundary in zip(ids, targets, boundaries.tolist(), strict=True):
        told = pairs_before(row, boundary)
        questions = range(boundary, 128, 2)
        assert set(told) == {int(row[at]) for at in questions}
        assert all(int(wanted[at]) == told[int(row[at])] == int(row[at + 1]) for at in questions)
        assert (wanted != IGNORED).nonzero()[:, 0].tolist() == list(questions)


def test_text_targets_are_the_next_ids_of_the_corpus(source: Source) -> None:
    ids, targets = source.text(3, 64)
    assert torch.equal(ids[:, 1:], targets[:, :-1])
    assert ids.max() < halo.VOCABULARY
    whole = source.ids.tolist()
    row = ids[0].tolist()
    assert any(whole[at : at + 64] == row for at in range(len(whole) - 63))


def test_a_batch_cuts_the_state_of_recall_rows_only_and_is_the_same_for_a_seed(seed: int) -> None:
    one, two = (Source(small_corpus(), TASK, seed).batch(12, 128, 1.0) for _ in range(2))
    assert one.num_text == 4
    num_targets = (one.targets != IGNORED).sum(1)
    assert one.cut.tolist() == [128] * 4 + (128 - 2 * num_targets[4:]).tolist()
    assert num_targets[4:].min() >= 12 and num_targets[4:].max() <= 20
    assert torch.equal(one.ids, two.ids) and torch.equal(one.targets, two.targets)
    other = Source(small_corpus(), TASK, seed + 1).batch(12, 128, 0.0)
    assert (other.cut == 128).all() and not torch.equal(other.ids, one.ids)


def test_the_twin_knows_order_and_the_attention_of_the_hybrid_does_not(twin: EmbeddedModel, seed: int) -> None:
    """Softmax over the same keys in another order gives the last row the same; with positions it does not."""
    hybrid = halo.hybrid_of(twin, aligned_with(twin), [0, 1, 2], TINY)
    x = torch.randn(1, 9, TINY.hidden_size)
    shuffled = torch.cat([x[:, :8].flip(1), x[:, 8:]], 1)
    for model, is_same in ((twin, False), (hybrid, True)):
        mixer = model.model.layers[0].self_attn
        found, other = (mixer(each, [])[0][0, -1] for each in (x, shuffled))
        assert torch.allclose(found, other, atol=1e-5) == is_same


def test_rotary_positions_are_relative_and_match_the_definition(twin: EmbeddedModel) -> None:
    """A row's attention is softmax of q_i R(j - i) k_j / sqrt(d), in float64."""
    mixer = twin.model.layers[0].self_attn
    x = torch.randn(1, 7, TINY.hidden_size)
    size, heads = mixer.size, mixer.heads
    q = mixer.q_proj(x)[0].view(7, heads, size).double()
    k, v = (
        p(x)[0].view(7, mixer.kv_heads, size).repeat_interleave(2, 1).double() for p in (mixer.k_proj, mixer.v_proj)
    )
    half = size // 2
    turn = torch.polar(torch.ones(half), -(10000.0 ** (-torch.arange(half) / half))).to(torch.complex128)
    complex_q, complex_k = (torch.complex(t[..., :half], t[..., half:]) for t in (q, k))
    expected = torch.zeros(heads, size, dtype=torch.float64)
    for head in range(heads):
        score = [(complex_q[6, head] * (complex_k[j, head] * turn ** (6 - j)).conj()).real.sum() for j in range(7)]
        expected[head] = (torch.stack(score) * size**-0.5).softmax(0) @ v[:, head]
    gate = torch.sigmoid(mixer.o_gate(x)[0, 6]).double()
    wanted = (expected.flatten() * gate) @ mixer.o_proj.weight.double().T
    assert torch.allclose(mixer(x, [])[0][0, 6].double(), wanted, atol=1e-5)


def test_a_lightning_layer_starts_from_the_projections_of_its_attention_layer(twin: EmbeddedModel) -> None:
    mixer = twin.model.layers[1].self_attn
    made = halo.lightning_from(mixer, TINY)
    x = torch.randn(5, TINY.hidden_size)
    assert torch.equal(made.q_proj(x), mixer.q_proj(x))
    assert torch.equal(made.z_proj(x), mixer.o_gate(x))
    assert torch.equal(made.o_proj.weight, mixer.o_proj.weight)
    for ours, theirs in ((made.k_proj, mixer.k_proj), (made.v_proj, mixer.v_proj)):
        heads, groups = ours(x).view(5, 4, 8), theirs(x).view(5, 2, 8)
        assert all(torch.allclose(heads[:, head], groups[:, head // 2], atol=1e-6) for head in range(4))


def test_heads_that_do_not_correspond_are_refused(twin: EmbeddedModel) -> None:
    with pytest.raises(ValueError, match="4 heads of 8"):
        halo.lightning_from(twin.model.layers[0].self_attn, Shape())


def test_the_hybrid_has_the_twins_weights_but_for_the_replaced_layers(twin: EmbeddedModel) -> None:
    aligned = aligned_with(twin)
    hybrid = halo.hybrid_of(twin, aligned, [1], TINY)
    assert hybrid.shape.mixer_types == KINDS
    theirs = twin.state_dict()
    for name, tensor in hybrid.state_dict().items():
        layer = int(name.split(".")[2]) if ".layers." in name else -1
        if "self_attn" in name and layer != 1:
            expected = aligned[layer].state_dict()[name.split("self_attn.")[1]]
        else:
            expected = theirs[name]
        assert torch.equal(tensor, expected) and tensor.data_ptr() != expected.data_ptr(), name


def test_replacing_one_layer_leaves_the_others_as_they_are(twin: EmbeddedModel, source: Source) -> None:
    aligned = aligned_with(twin)
    ids, _ = source.text(1, 128)
    with torch.no_grad():
        mixed = halo.with_one_replaced(twin, aligned, 2, TINY)
        h = twin.model.embed_tokens(ids) * TINY.scale_emb
        for block in twin.model.layers[:2]:
            h = block.mlp_part(block.sparse_part(h, [], False)[0])
        expected = mixed.model.layers[2].lightning_part(h, torch.tensor([128]))
        hidden, _ = mixed(ids)
    assert torch.allclose(hidden, halo.rms_norm(expected, mixed.model.norm.weight, 1e-6), atol=1e-4)
    assert twin.shape.mixer_types == (SPARSE,) * 3


class Recorder(nn.Module):
    """Stands for a Lightning layer: keeps its inputs, gives what an attention layer gives."""

    def __init__(self, mixer: nn.Module):
        super().__init__()
        self.mixer, self.seen = mixer, torch.zeros(0)

    def forward(self, x: Tensor, cut: Tensor) -> Tensor:
        self.seen = x
        return self.mixer(x, [])[0]


def test_alignment_gives_a_layer_the_inputs_that_its_attention_layer_has_in_the_twin(
    twin: EmbeddedModel, source: Source
) -> None:
    samples = source.batch(6, 128, 0.0)
    inputs: list[Tensor] = []
    recorders = nn.ModuleList(Recorder(block.self_attn) for block in twin.model.layers)
    with torch.no_grad():
        assert float(halo.alignment_loss(twin, recorders, samples)) == 0.0
        for block in twin.model.layers:
            block.self_attn.register_forward_pre_hook(lambda _, given: inputs.append(given[0]))
        twin(samples.ids)
    assert len(inputs) == 3
    assert all(torch.allclose(one.seen, other, atol=1e-5) for one, other in zip(recorders, inputs, strict=True))


def test_alignment_moves_only_the_lightning_layers_and_brings_them_closer(twin: EmbeddedModel, source: Source) -> None:
    twin.requires_grad_(False)
    aligned = aligned_with(twin)
    samples = source.batch(6, 128, 0.0)
    optimizer = torch.optim.Adam(aligned.parameters(), 1e-2)
    losses = []
    for _ in range(12):
        loss = halo.alignment_loss(twin, aligned, samples)
        optimizer.zero_grad()
        loss.backward()
        assert all(parameter.grad is not None for parameter in aligned.parameters())
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.7 * losses[0]
    assert all(parameter.grad is None for parameter in twin.parameters())


def test_layers_that_cost_recall_and_little_text_are_kept() -> None:
    whole = {"text_loss": 3.0, "recall_128": 0.9}
    without = [(3.0, 0.9), (3.1, 0.2), (3.02, 0.5), (2.9, 0.95), (3.5, 0.1)]
    scores = [halo.score_of(whole, {"text_loss": t, "recall_128": r}, "recall_128") for t, r in without]
    assert scores == pytest.approx([0, 0.7 / 0.11, 0.4 / 0.03, 0, 0.8 / 0.51])
    assert halo.best_layers(scores, 2) == [1, 2]
    assert halo.best_layers([1.0, 1.0, 1.0], 2) == [0, 1]


def test_the_loss_is_of_text_plus_of_recalled_values(twin: EmbeddedModel, source: Source) -> None:
    samples = source.batch(6, 128, 0.5)
    with torch.no_grad():
        chance = twin.logits(twin(samples.ids)[0]).log_softmax(-1)
        each = -chance.gather(-1, samples.targets.clamp(min=0)[..., None])[..., 0]
        expected = each[:2].mean() + each[2:][samples.targets[2:] != IGNORED].mean()
        assert float(halo.data_loss(twin, samples, None)) == pytest.approx(float(expected), rel=1e-4)


def test_distillation_is_nothing_from_the_twin_to_itself_and_positive_to_the_hybrid(
    twin: EmbeddedModel, source: Source
) -> None:
    samples = source.batch(6, 128, 0.5)
    with torch.no_grad():
        assert float(halo.distillation_loss(twin, twin, samples)) == pytest.approx(0.0, abs=1e-5)
        assert float(halo.distillation_loss(halo.hybrid_of(twin, aligned_with(twin), [1], TINY), twin, samples)) > 1e-3


def test_measuring_is_the_same_for_a_seed_and_finds_a_model_that_knows_the_values(
    twin: EmbeddedModel, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, two = (halo.measured(twin, Source(small_corpus(), TASK, seed), (128, 256)) for _ in range(2))
    assert one == two
    assert set(one) == {"text_loss", "recall_128", "recall_128_cut", "recall_256"}
    assert one["recall_128"] < 0.5 and one["recall_128"] == one["recall_128_cut"]

    def knows(ids: Tensor, cut: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return nn.functional.one_hot(ids.roll(-1, 1), halo.VOCABULARY).float(), torch.zeros(0)

    monkeypatch.setattr(twin, "forward", knows)
    monkeypatch.setattr(twin, "logits", lambda hidden: hidden)
    assert halo.measured(twin, Source(small_corpus(), TASK, seed), (128,))["recall_128"] == 1.0
