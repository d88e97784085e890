"""The address loss: digits are learned from hidden states that hold them, and rows without a number do not count."""

import torch

from training.addresses import AddressProbe, AddressRows


def test_a_probe_learns_numbers_that_are_there(seed: int) -> None:
    torch.manual_seed(seed)
    names = torch.randn(3, 10, 32)
    number = torch.randint(1000, (2, 40))
    digits = [number // 10**i % 10 for i in range(3)]
    hidden = sum(names[i][digit] for i, digit in enumerate(digits))
    rows = AddressRows(torch.arange(40).expand(2, 40), number)
    probe = AddressProbe(32)
    rule = torch.optim.Adam(probe.parameters(), lr=0.1)
    first = probe(hidden, rows)[0].item()
    for _ in range(200):
        rule.zero_grad()
        loss, share = probe(hidden, rows)
        loss.backward()
        rule.step()
    assert loss < 0.3 * first
    assert share > 0.8


def test_rows_without_a_number_do_not_count(seed: int) -> None:
    torch.manual_seed(seed)
    hidden, probe = torch.randn(1, 6, 16), AddressProbe(16)
    some = probe(hidden, AddressRows(torch.tensor([[1, 4]]), torch.tensor([[17, 305]])))
    padded = probe(hidden, AddressRows(torch.tensor([[1, 4, 0, 0]]), torch.tensor([[17, 305, -1, -1]])))
    torch.testing.assert_close(some[0], padded[0])
    nothing = probe(hidden, AddressRows(torch.tensor([[0]]), torch.tensor([[-1]])))
    assert nothing[0] == 0 and nothing[1] == 0
