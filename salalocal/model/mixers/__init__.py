"""The token mixers: a name of `mixer_types` in, the class that makes such a layer out; for `sala`."""

from typing import Protocol

import torch
from torch import Tensor

from salalocal.model.config import LIGHTNING, SPARSE, SalaConfig
from salalocal.model.layers import LinearFactory
from salalocal.model.mixers.lightning import LightningMixer
from salalocal.model.mixers.sparse import SparseMixer
from salalocal.model.state import LayerState, StateSpec


class Mixer(Protocol):
    """A module that mixes tokens over time; every implementation is an `nn.Module`."""

    def new_state(self, spec: StateSpec) -> LayerState:
        """An empty state for this layer."""
        ...

    def __call__(self, x: Tensor, state: LayerState) -> Tensor:
        """Take the next T tokens of every sequence and update the state in place.

        Shapes: x [B, T, hidden] -> [B, T, hidden]. The first of them stands at position `state.num_tokens`.
        """
        ...


class MixerClass(Protocol):
    """How a mixer is made; `name` is its full name in the checkpoint, `linear` makes its projections."""

    def __call__(
        self,
        config: SalaConfig,
        name: str,
        linear: LinearFactory,
        device: torch.device | str | None,
        dtype: torch.dtype,
    ) -> Mixer: ...


MIXERS: dict[str, MixerClass] = {SPARSE: SparseMixer, LIGHTNING: LightningMixer}
