"""Which rows have a label, found without a wait for the device.

How many they are decides the sizes of tensors, so the host has to know. Asked for when the loss is due, the answer
would come after everything queued before it; asked for when the labels are there, it waits on nothing but them.
"""

from __future__ import annotations

import torch


class LabelledRows:
    """The rows of ``labels_T`` (T,) that are not ``ignore_index``; make one as early as the labels are there."""

    def __init__(self, labels_T: torch.Tensor, ignore_index: int) -> None:
        self.labels_T, self.ignore_index = labels_T, ignore_index
        self._order: torch.Tensor | None = None
        if labels_T.is_cuda:
            ignored_T = labels_T == ignore_index
            self._order = torch.argsort(ignored_T.to(torch.uint8), stable=True)
            self._count = torch.empty((), dtype=torch.int64, pin_memory=True)
            self._count.copy_(len(labels_T) - ignored_T.sum(), non_blocking=True)
            self._copied = torch.cuda.current_stream(labels_T.device).record_event()

    def indices(self) -> torch.Tensor | None:
        """Their indices in ascending order; None where all rows have a label."""
        if self._order is None:
            rows_N = (self.labels_T != self.ignore_index).nonzero().squeeze(1)
        else:
            self._copied.synchronize()
            rows_N = self._order[: int(self._count)]
        return None if len(rows_N) == len(self.labels_T) else rows_N
