"""The rows that hosts train on, as they were before the host cut them where that can be seen."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from sloth_backend.data import Overflow, Rows

if TYPE_CHECKING:
    from sloth_backend.hosts.trainers import Kind

PREPARE = "_prepare_dataset"
"""Method in which TRL tokenises, cuts and packs."""
PREPARE_ARGUMENTS = (
    *("self", "dataset", "processing_class", "args", "packing", "formatting_func"),
    "dataset_name",
)
UNCUT = {"max_length": None, "shuffle_dataset": False, "use_liger_kernel": False}
"""Options of ``SFTConfig`` with which TRL only tokenises."""
TRUNCATING = ("bfd",)
"""TRL's ways of packing that cut a row which is longer than a pack; the others split it."""


@contextmanager
def uncut(trainer: Any) -> Iterator[dict[str, Rows]]:
    """While the trainer is made, take down its data between TRL's tokenising and its cutting; by name.

    TRL leaves rows that are tokenised as they are, so its own method runs twice on this instance: once to tokenise,
    without a bound, and once to do the rest with what that gave. Nothing is tokenised twice. A method of another
    signature runs as it is, and nothing is taken down.
    """
    seen: dict[str, Rows] = {}
    original = getattr(type(trainer), PREPARE, None)
    if original is None or tuple(inspect.signature(original).parameters) != PREPARE_ARGUMENTS:
        yield seen
        return
    setattr(trainer, PREPARE, _in_two_steps(getattr(trainer, PREPARE), seen))
    try:
        yield seen
    finally:
        vars(trainer).pop(PREPARE, None)


def _in_two_steps(original: Callable[..., Any], seen: dict[str, Rows]) -> Callable[..., Any]:
    def prepare(
        dataset: Any, processing_class: Any, args: Any, packing: bool, formatting_func: Any, dataset_name: str
    ) -> Any:
        bare = copy.copy(args)
        vars(bare).update({name: value for name, value in UNCUT.items() if hasattr(args, name)})
        whole = original(dataset, processing_class, bare, False, formatting_func, dataset_name)
        emptied = args.max_length is not None and not packing
        seen[dataset_name] = Rows(dataset_name, whole, args.max_length, _longer(args, packing), drops_emptied=emptied)
        return original(whole, processing_class, args, packing, None, dataset_name)

    return prepare


def _longer(args: Any, packing: bool) -> Overflow:
    if args.max_length is None:
        return "keep"
    if packing:
        return "keep_start" if args.packing_strategy in TRUNCATING else "split"
    return args.truncation_mode


def of_trainer(trainer: Any, kind: Kind, seen: dict[str, Rows]) -> list[Rows]:
    """The data of a trainer that is complete, those in ``seen`` as they were taken down."""
    bound = kind.setting(trainer.args, kind.length) if kind.length and kind.collator_cuts else None
    longer: Overflow = getattr(trainer.args, "truncation_mode", "keep_start") if bound is not None else "keep"
    sets = named(trainer.train_dataset, trainer.eval_dataset)
    return [seen.get(name) or Rows(name, dataset, bound, longer) for name, dataset in sets]


def named(train: Any, evaluation: Any) -> Iterator[tuple[str, Any]]:
    """The data sets of a trainer with their names; those that are not there are left out."""
    sets = evaluation if isinstance(evaluation, dict) else {"eval": evaluation}
    yield from ((name, dataset) for name, dataset in {"train": train, **sets}.items() if dataset is not None)


def of_loaders(arguments: Iterable[Any]) -> list[Rows]:
    """The data sets behind those of ``arguments`` that are torch's DataLoaders; which of them trains is not known."""
    from torch.utils.data import DataLoader

    loaders = [argument for argument in arguments if isinstance(argument, DataLoader)]
    return [Rows(f"dataloader {number}", loader.dataset) for number, loader in enumerate(loaders, 1)]
