"""The address loss: rows that have to know a document's number are asked for its digits.

In: hidden states [B, T, D] and rows with numbers. Out: cross entropy of the digits, and the share of rows that know all
of them. For: training/model.py, training/train.py.

"Which file defines X" takes three steps: a row of a document looks at its header, the answer looks at that row, and the
path is copied from the header, which the answer has to tell from all other headers. All that goes over two narrow
values is a name for the header. Left alone, training does not find one (version 0 chose among the headers by chance);
its number is one that both ends can know, and the probes here, which are thrown away afterwards, ask both ends for it.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

NUM_DIGITS = 3
MAX_NUMBER = 10**NUM_DIGITS - 1


@dataclass(frozen=True)
class AddressRows:
    """Rows [B, R] of sequences and the document numbers they have to know, -1 where there is none."""

    index: Tensor
    number: Tensor


class AddressProbe(nn.Module):
    """Reads the three digits of a document's number from hidden states."""

    def __init__(self, hidden_size: int, eps: float = 1e-6):
        super().__init__()
        self.digits = nn.Linear(hidden_size, NUM_DIGITS * 10, bias=False)
        self.eps = eps

    def forward(self, hidden: Tensor, rows: AddressRows) -> tuple[Tensor, Tensor]:
        """Mean loss of a row's digits, and the share of rows whose digits are all right."""
        picked = hidden.gather(1, rows.index[:, :, None].expand(-1, -1, hidden.shape[2])).float()
        picked = picked * torch.rsqrt(picked.square().mean(-1, keepdim=True) + self.eps)
        scores = self.digits(picked).float().unflatten(-1, (NUM_DIGITS, 10))
        powers = 10 ** torch.arange(NUM_DIGITS, device=hidden.device)
        wanted = rows.number.clamp(min=0)[..., None] // powers % 10
        each = F.cross_entropy(scores.flatten(0, 2), wanted.flatten(), reduction="none").view(wanted.shape).mean(-1)
        real = (rows.number >= 0).float()
        total = real.sum().clamp(min=1.0)
        right = (scores.argmax(-1) == wanted).all(-1).float()
        return (each * real).sum() / total, (right * real).sum() / total
