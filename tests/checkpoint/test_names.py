"""The tensors of a model are those of the released checkpoint."""

import math

from checkpoint_cases import small_config

from salalocal.checkpoint.names import HEAD, expected_tensors, ignored_tensors
from salalocal.model.config import SalaConfig


def test_released_model_has_395_tensors_of_the_published_sizes() -> None:
    tensors = expected_tensors(SalaConfig.released())
    assert len(tensors) == 395
    assert sum(math.prod(shape) for shape in tensors.values()) == 9_477_203_968
    assert tensors["model.layers.9.self_attn.k_proj.weight"] == (256, 4096)
    assert tensors["model.layers.10.self_attn.k_proj.weight"] == (4096, 4096)
    assert tensors["model.layers.31.mlp.down_proj.weight"] == (4096, 16384)
    assert tensors["model.layers.1.self_attn.o_norm.weight"] == (4096,)
    assert "model.layers.0.self_attn.o_gate.weight" in tensors
    assert "model.layers.0.self_attn.z_proj.weight" not in tensors
    assert "model.layers.1.self_attn.o_gate.weight" not in tensors
    assert "model.layers.0.self_attn.q_norm.weight" not in tensors


def test_small_model_counts_as_its_config_says() -> None:
    for tied in (False, True):
        config = small_config(tie_word_embeddings=tied)
        tensors = expected_tensors(config)
        assert sum(math.prod(shape) for shape in tensors.values()) == config.num_parameters
        assert (HEAD in tensors) is not tied


def test_rotary_tables_and_a_tied_head_may_stand_in_a_checkpoint() -> None:
    rotary, head = "model.layers.1.self_attn.rotary_emb.inv_freq", (96, 48)
    names = (rotary, HEAD, "model.other.weight", "model.rotary_embedding.weight")
    assert ignored_tensors(small_config(tie_word_embeddings=True), names) == {rotary: None, HEAD: head}
    assert ignored_tensors(small_config(), names) == {rotary: None}
