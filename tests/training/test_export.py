"""Weights between those that training began with and those it gave."""

import dataclasses
from pathlib import Path

import torch

from training.export import move_towards
from training.model import LIGHTNING, SPARSE, EmbeddedModel, Shape
from training.trainer import save

SHAPE = dataclasses.replace(Shape(), vocab_size=64, intermediate_size=32, mixer_types=(LIGHTNING, SPARSE))


def test_weights_move_the_given_share_of_the_way(tmp_path: Path, seed: int) -> None:
    torch.manual_seed(seed)
    before, after = EmbeddedModel(SHAPE), EmbeddedModel(SHAPE)
    save(before, tmp_path)
    new, old = ({name: weight.clone() for name, weight in m.state_dict().items()} for m in (after, before))
    move_towards(after, tmp_path, 0.25)
    for name, weight in after.state_dict().items():
        assert torch.allclose(weight, 0.75 * new[name] + 0.25 * old[name], atol=1e-6)
