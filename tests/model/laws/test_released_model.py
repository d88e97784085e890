"""Law 7: the released model's size, layers and tensor names."""

import math

import small_configs
import torch

from salalocal.model.config import SalaConfig
from salalocal.model.sala import SalaModel

SPARSE_LAYERS = {0, 9, 16, 17, 22, 29, 30, 31}


def test_released_config_is_the_released_file() -> None:
    config = SalaConfig.released()
    assert SalaConfig.from_hf(small_configs.RELEASED) == config
    assert config.num_parameters == 9_477_203_968
    assert {n for n, mixer in enumerate(config.mixer_types) if mixer == "minicpm4"} == SPARSE_LAYERS
    assert {mixer for n, mixer in enumerate(config.mixer_types) if n not in SPARSE_LAYERS} == {"lightning-attn"}
    assert SalaConfig.from_hf(config.to_hf()) == config


def test_released_model_has_exactly_the_tensors_of_the_checkpoint() -> None:
    model = SalaModel(SalaConfig.released(), device="meta", dtype=torch.bfloat16)
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    assert shapes == small_configs.tensor_shapes(small_configs.RELEASED)
    assert len(shapes) == 395
    assert sum(math.prod(shape) for shape in shapes.values()) == 9_477_203_968
    assert sum(tensor.nbytes for tensor in model.state_dict().values()) == 18_954_407_936


def test_small_models_have_exactly_the_tensors_of_their_checkpoints() -> None:
    for name, raw in small_configs.CONFIGS.items():
        config = SalaConfig.from_hf(raw)
        shapes = {key: tuple(t.shape) for key, t in SalaModel(config, device="meta").state_dict().items()}
        assert shapes == small_configs.tensor_shapes(raw), name
        assert config.num_parameters == sum(math.prod(shape) for shape in shapes.values()), name


def test_mup_factors_of_the_release() -> None:
    config = SalaConfig.released()
    assert math.isclose(config.residual_scale, 0.24748737341529164, rel_tol=1e-15)
    assert config.logit_divisor == 16
