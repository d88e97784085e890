"""The training forward and the runtime compute the same function: on the shipped weights, and on random small ones."""

import dataclasses

import pytest
import torch

from salalocal.model.config import SalaConfig
from salalocal.model.sala import SalaModel
from training.model import EmbeddedModel, Shape
from training.selection import Geometry
from training.tokenizer import BUILTIN
from training.trainer import restore

TOLERANCE = 1e-3
LAYERS = ("lightning-attn", "minicpm4", "lightning-attn", "minicpm4")


def runtime_logits(trained: EmbeddedModel, ids: torch.Tensor, chunk: int) -> torch.Tensor:
    model = SalaModel(SalaConfig.from_hf(trained.shape.to_hf()), dtype=torch.float32)
    model.load_state_dict(trained.state_dict())
    state = model.new_state()
    hidden = [model(part[None], state) for part in ids.split(chunk)]
    return model.logits(torch.cat(hidden, 1))[0]


@pytest.mark.parametrize("window_size", [128, 192])
def test_random_weights_give_the_same_logits_in_the_sparse_regime(window_size: int) -> None:
    seed = int(torch.randint(2**31, (1,)))
    print(f"seed {seed}")
    torch.manual_seed(seed)
    geometry = Geometry(window_size=window_size, topk=3)
    shape = dataclasses.replace(
        Shape(), vocab_size=97, intermediate_size=64, mixer_types=LAYERS, dense_len=300, geometry=geometry
    )
    trained = EmbeddedModel(shape)
    ids = torch.randint(97, (768,))
    with torch.inference_mode():
        hidden, _ = trained(ids[None])
        expected = trained.logits(hidden)[0]
        found = runtime_logits(trained, ids, 256)
    assert (found - expected).abs().max() < TOLERANCE


@pytest.mark.slow
def test_the_shipped_weights_give_the_same_logits_past_dense_len() -> None:
    trained = EmbeddedModel(Shape())
    restore(trained, BUILTIN)
    generator = torch.Generator().manual_seed(7)
    ids = torch.randint(3, 8184, (4352,), generator=generator)
    with torch.inference_mode():
        hidden, _ = trained(ids[None])
        expected = trained.logits(hidden[:, -300:])[0]
        found = runtime_logits(trained, ids, 1216)[-300:]
    assert (found - expected).abs().max() < TOLERANCE


def test_a_state_cut_hides_the_documents_from_the_linear_layers() -> None:
    shape = dataclasses.replace(Shape(), vocab_size=50, intermediate_size=64, mixer_types=("lightning-attn",) * 2)
    trained = EmbeddedModel(shape)
    ids = torch.randint(50, (2, 256))
    changed = ids.clone()
    changed[:, :100] = torch.randint(50, (2, 100))
    cut = torch.tensor([100, 100])
    with torch.inference_mode():
        same = (trained(ids, cut)[0] - trained(changed, cut)[0])[:, 100:].abs().max()
        other = (trained(ids)[0] - trained(changed)[0])[:, 100:].abs().max()
    assert same < 1e-5 < other
