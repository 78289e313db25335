"""Rows with a label: those that ``nonzero`` finds, however early they are asked for, on a CPU and on a GPU."""

from __future__ import annotations

import pytest
import torch

from sloth_kernels import launch
from sloth_kernels.labelled_rows import LabelledRows
from sloth_kernels.ops.linear_cross_entropy import linear_cross_entropy

DEVICE = torch.device("cpu" if launch.interpreting() else "cuda")
IGNORED = {"some": slice(0, None, 3), "one": slice(4, 5), "all": slice(None), "none": slice(0, 0)}


def make_labels(ignored: slice, ignore_index: int = -100) -> torch.Tensor:
    labels = torch.randint(50, (1000,), generator=torch.Generator().manual_seed(0)).to(DEVICE)
    labels[ignored] = ignore_index
    return labels


@pytest.mark.parametrize("ignore_index", [-100, 7])
@pytest.mark.parametrize("ignored", IGNORED.values(), ids=IGNORED)
def test_rows_are_those_of_nonzero(ignored: slice, ignore_index: int) -> None:
    labels = make_labels(ignored, ignore_index)
    early = LabelledRows(labels, ignore_index)
    if DEVICE.type == "cuda":
        torch.cuda._sleep(20_000_000)  # work that is queued after it
    expected = (labels != ignore_index).nonzero().squeeze(1)
    found = early.indices()
    if len(expected) == len(labels):
        assert found is None
    else:
        assert found is not None
        assert found.dtype == torch.int64
        assert torch.equal(found, expected)


def test_no_labels_at_all() -> None:
    assert LabelledRows(make_labels(slice(None))[:0], -100).indices() is None


@pytest.mark.parametrize("ignored", IGNORED.values(), ids=IGNORED)
def test_rows_made_early_give_the_same_loss(ignored: slice) -> None:
    labels = make_labels(ignored)[:10]
    generator = torch.Generator(DEVICE).manual_seed(0)
    hidden, weight = (torch.randn(n, 16, device=DEVICE, generator=generator).requires_grad_() for n in (10, 50))
    rows = LabelledRows(labels, -100)
    results = []
    for given in (rows, None):
        sums = linear_cross_entropy(hidden, weight, labels, rows=given)
        results.append([*sums, *torch.autograd.grad(sums.loss_sum, [hidden, weight])])
    assert all(torch.equal(early, late) for early, late in zip(*results, strict=True))
    assert results[0][3] == (labels != -100).sum()
