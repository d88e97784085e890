"""The synthetic checkpoint: seeded bytes, heavy tails, outlier channels, and a model that stays in range."""

from pathlib import Path

import pytest
import torch

from benchmarks.synthetic_checkpoint import (
    LOGIT_STD,
    random_tensor,
    random_tensors,
    released_config,
    small_config,
    write_synthetic,
)
from salalocal.checkpoint.checkpoint import Checkpoint
from salalocal.checkpoint.names import expected_tensors
from salalocal.engine.load import load_model
from salalocal.model.config import SalaConfig

CPU = torch.device("cpu")


def test_the_same_seed_gives_the_same_bytes(tmp_path: Path, seed: int) -> None:
    contents = []
    for name, used in (("a", seed), ("b", seed), ("c", seed + 1)):
        write_synthetic(tmp_path / name, small_config(), used, CPU)
        contents.append((tmp_path / name / "model.safetensors").read_bytes())
    assert contents[0] == contents[1] != contents[2]
    Checkpoint.open(tmp_path / "a").validate()


def test_layers_in_front_do_not_depend_on_their_number(seed: int) -> None:
    few, many = (dict(random_tensors(small_config(layers), seed, CPU)) for layers in (2, 4))
    assert set(few) < set(many) and all(torch.equal(few[name], many[name]) for name in few)


def test_the_released_shape_is_the_default() -> None:
    assert released_config() == SalaConfig.released()
    assert released_config(3).mixer_types == SalaConfig.released().mixer_types[:3]


def test_tails_are_heavy_and_some_channels_stand_out(seed: int) -> None:
    config, name = released_config(1), "model.layers.0.self_attn.k_proj.weight"
    weight = random_tensor(config, name, expected_tensors(config)[name], seed, CPU).float()
    rms = weight.square().mean(0).sqrt()
    usual = rms.median()
    outliers = rms > 5 * usual
    assert int(outliers.sum()) == 4 and (rms[outliers] < 30 * usual).all()
    rest = weight[:, ~outliers].flatten() / usual
    assert 4 < rest.pow(4).mean() < 40  # 3 for a normal distribution, 6 for this one
    assert 0.5 < usual * 4096**0.5 < 1.5


@pytest.mark.parametrize("layers", [2, 8])
def test_the_model_stays_in_range(layers: int, tmp_path: Path, seed: int) -> None:
    write_synthetic(tmp_path, small_config(layers), seed, CPU)
    model = load_model(Checkpoint.open(tmp_path), CPU, torch.float32)
    ids = torch.randint(512, (1, 400), generator=torch.Generator().manual_seed(seed))
    sizes = []
    for block in model.model.layers:
        block.register_forward_hook(lambda module, inputs, after: sizes.append(float(after.square().mean().sqrt())))
    with torch.inference_mode():
        logits = model.logits(model(ids, model.new_state()))
    assert len(sizes) == layers and 0.5 < min(sizes) <= max(sizes) < 10
    assert 0.5 * LOGIT_STD < float(logits.std()) < 2 * LOGIT_STD
    chance = logits.softmax(-1).amax(-1)
    assert 0.005 < float(chance.mean()) < 0.5
