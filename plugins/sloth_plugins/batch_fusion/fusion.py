"""The micro-batches of an accumulation step as few passes, inside the loop of ``transformers.Trainer``.

The loop takes all micro-batches of a step from ``get_batch_samples`` and hands each to ``training_step``. It still
gets the host's own list, so that its steps, counts, callbacks and checkpoints are the host's; but one item of the list
stands for all passes, and the others cost nothing. It is the first, so that the device works while the host sees to
the others; with data parallelism it is the last, at which processes exchange gradients. Between passes the host waits
for nothing. The loss of a pass is the sum over its tokens divided by ``num_items_in_batch``, which the host counts for
the whole step, so that the passes add up to the gradient that the micro-batches add up to; where the host takes means
of micro-batches instead, ``means`` does the same.
"""

from __future__ import annotations

import functools
import logging
import types
import weakref
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext, suppress
from typing import Any

import torch

from sloth_backend import ranks
from sloth_backend.findings import Edits
from sloth_plugins.batch_fusion.ahead import Ahead
from sloth_plugins.batch_fusion.bookkeeping import settle, unhurried
from sloth_plugins.batch_fusion.budget import Budget
from sloth_plugins.batch_fusion.known_loss import KnownLoss
from sloth_plugins.batch_fusion.laid import Laid, Pass
from sloth_plugins.batch_fusion.later import Copy
from sloth_plugins.batch_fusion.means import Means
from sloth_plugins.batch_fusion.overrides import count_as_host
from sloth_plugins.batch_fusion.rows import Rows, UnfitError, rows_of

log = logging.getLogger(__name__)

LOOP = ("get_batch_samples", "training_step", "compute_loss", "get_train_dataloader")
"""The trainer's methods that are replaced, and that it may not have written anew."""


class Fusion:
    """What one trainer's steps are made of.

    Args:
        trainer: whose methods are replaced; it is not kept alive.
        budget: how large a pass may be.
        longest: documents of more tokens are left to the host; None for no limit.
        apart: no pass is of two micro-batches.
    """

    def __init__(self, trainer: Any, budget: Budget, longest: int | None, apart: bool = False) -> None:
        self.trainer = weakref.ref(trainer)
        self.budget, self.longest, self.apart = budget, longest, apart
        self.means = None if trainer.model_accepts_loss_kwargs else Means()
        """The loss, where the host takes a mean of each micro-batch."""
        self.work: list[tuple[Any, list[Pass]]] = []
        """Micro-batches of the step, each with the passes that it stands for."""
        self.ahead: Ahead | None = None
        self.laid: Laid | None = None
        """The micro-batches that are expected next."""
        self.on_host = False
        """Whether batches are in host memory."""
        self.losses: list[Copy] = []
        """Those of the passes of the step that runs, on their way to the host."""
        self.told: set[str] = set()

    def install(self, model: Any, edits: Edits) -> None:
        """Replace the trainer's methods, and the loss function of ``model`` where means are taken."""
        trainer = self.trainer()
        if self.means is not None:
            self.means.install(model, edits)
        for name in LOOP:
            ours, original = getattr(self, name), getattr(type(trainer), name)
            setattr(trainer, name, types.MethodType(_around(ours, original), trainer))
        # The model remembers its edits; it must not keep the trainer and its optimizer alive.
        edits.on_undo(functools.partial(_restore, self.trainer))

    def get_train_dataloader(self, original: Callable[..., Any], trainer: Any) -> Any:
        """The host's loader; its batches stay in host memory, where rows are cheap to take apart."""
        loader = original(trainer)
        if getattr(loader, "device", None) is not None and hasattr(loader, "synchronized_generator"):
            loader.device = None
            self.on_host = True
        return loader

    def get_batch_samples(
        self, original: Callable[..., Any], trainer: Any, epoch_iterator: Any, num_batches: int, device: torch.device
    ) -> Any:
        """The host's micro-batches, with the passes that will be made of them noted."""
        if self.ahead is None or self.ahead.iterator is not epoch_iterator:
            self.ahead = Ahead(epoch_iterator)
        batches, count = self._counted(original, trainer, num_batches, device)
        self.work, self.losses = [], []
        if batches and (count is not None or self.means is not None):
            laid = self._laid(batches, device)
            way = self._way(laid, trainer.args.gradient_accumulation_steps)
            if way is not None:
                self.work = [(batch, []) for batch in batches]
                carrier = self.work[-1 if trainer.accelerator.use_distributed else 0]
                carrier[1].extend(laid.sent(way, device))
        self.laid = None
        return batches, count

    def _counted(
        self, original: Callable[..., Any], trainer: Any, num_batches: int, device: torch.device
    ) -> tuple[list[Any], Any]:
        """The host's micro-batches and count of tokens; several processes add theirs up, on their devices."""
        counted_here = self.on_host and not trainer.accelerator.use_distributed
        batches, count = original(trainer, self.ahead, num_batches, torch.device("cpu") if counted_here else device)
        if isinstance(count, torch.Tensor) and count.device != torch.device(device):
            # A copy from the host's memory would wait for the optimizer; a number travels with the launch.
            count = torch.full_like(count, int(count), device=device)
        return batches, count

    def _way(self, laid: Laid, most: int) -> list[Rows] | None:
        """What the micro-batches of a step pass as; None where each passes as it is.

        All processes of a run take equally many passes, since layers that are sharded, and hosts that gather counts
        at each pass, wait for one another. As many as there are micro-batches is what every process can.
        """
        if self.apart or not (laid.parts or ranks.several()):
            return laid.parts or None
        if not ranks.several():
            return self.budget.best(list(laid.ways.values()), laid.largest)
        count = len(laid.batches)
        ways = {n: way for n, way in laid.ways.items() if len(way) == n and n < count}
        return self.budget.best_together(ways, laid.parts, count, most, laid.largest)

    def _laid(self, batches: Sequence[Mapping[str, Any]], device: torch.device) -> Laid:
        """``batches`` as they were laid ahead, or else laid now."""
        if self.laid is not None and self.laid.is_of(batches):
            return self.laid
        try:
            return Laid.of(batches, self._parts(batches), device)
        except UnfitError as reason:
            self._tell(f"a micro-batch is passed as it is: {reason}")
            return Laid(batches)

    def _parts(self, batches: Sequence[Mapping[str, Any]]) -> list[Rows]:
        """Each micro-batch as rows.

        Raises:
            UnfitError: one of them cannot be taken apart.
        """
        parts = [rows_of(batch) for batch in batches]
        lengths = [length for part in parts for length in part.lengths]
        if not sum(lengths):
            raise UnfitError("it has no tokens")
        if self.longest is not None and max(lengths) > self.longest:
            raise UnfitError(f"a row is longer than the {self.longest:,} tokens that the model's attention sees")
        if self.means is not None and not all(part.shares[0].trained for part in parts):
            raise UnfitError("it trains no token, and has no mean")
        if ranks.several() and not all(part.tokens for part in parts):
            raise UnfitError("it has no tokens, and passes with those of other processes")
        return parts

    def training_step(
        self, original: Callable[..., Any], trainer: Any, model: Any, inputs: Any, num_items_in_batch: Any = None
    ) -> torch.Tensor:
        """The host's step on each pass that ``inputs`` stands for, and the sum of their losses."""
        passes = next((made for batch, made in self.work if batch is inputs), None)
        if passes is None:
            return original(trainer, model, inputs, num_items_in_batch)
        if not passes:
            return KnownLoss(torch.zeros((), device=trainer.args.device), ())
        step = functools.partial(self._pass, original, trainer, model, num_items_in_batch)
        losses = []
        with self.budget.transient():
            for one in passes[:-1]:
                with trainer.accelerator.no_sync(model):
                    losses.append(step(one))
            losses.append(step(passes[-1]))
        count_as_host(trainer, [batch["labels"] for batch, _ in self.work], [one.rows.labels for one in passes])
        self._fetch_ahead(trainer)
        settle(trainer)
        loss = losses[0] if len(losses) == 1 else torch.stack(losses).sum()
        return KnownLoss(loss, self.losses) if len(self.losses) == len(losses) else loss

    def _pass(
        self, original: Callable[..., Any], trainer: Any, model: Any, num_items_in_batch: Any, one: Pass
    ) -> torch.Tensor:
        with nullcontext() if self.means is None else self.means.of(one.rows.shares):
            return original(trainer, model, one.inputs, num_items_in_batch)

    def compute_loss(self, original: Callable[..., Any], trainer: Any, model: Any, *args: Any, **kwargs: Any) -> Any:
        """The host's loss; in training it is sent home, and the host's questions wait for nothing, before backward."""
        training = self.work and torch.is_grad_enabled()
        with unhurried(trainer, model) if training else nullcontext():
            result = original(trainer, model, *args, **kwargs)
        loss = result[0] if isinstance(result, tuple) else result
        if self.work and loss.is_cuda and loss.requires_grad:
            self.losses.append(Copy.of(loss))
        return result

    def _fetch_ahead(self, trainer: Any) -> None:
        """The next step's batches, where there will be one and nobody saves how far the loader has come; laid too.

        What they pass as is left to the step itself: until then, the memory that there is for it may change.
        """
        stateful = getattr(trainer.accelerator.dataloader_config, "use_stateful_dataloader", False)
        if self.ahead is not None and not stateful and trainer.state.global_step + 1 < trainer.state.max_steps:
            loaders = trainer.accelerator.gradient_state
            self.ahead.fetch(trainer.args.gradient_accumulation_steps, lambda: loaders.end_of_dataloader)
            self._lay_ahead(self.ahead.fetched, trainer.args.device)

    def _lay_ahead(self, batches: Sequence[Mapping[str, Any]], device: torch.device) -> None:
        # Those on the device would be waited for. What fails does so again in its own step, where it is told.
        if self.on_host and batches:
            with suppress(Exception):
                self.laid = Laid.of(batches, self._parts(batches), device)

    def _tell(self, reason: str) -> None:
        if reason not in self.told:
            self.told.add(reason)
            log.warning("%s", reason)


def _around(ours: Callable[..., Any], original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        return ours(original, self, *args, **kwargs)

    return method


def _restore(trainer: weakref.ref[Any]) -> None:
    for name in LOOP if trainer() is not None else ():
        vars(trainer()).pop(name, None)
