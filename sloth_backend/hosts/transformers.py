"""transformers: ``Trainer(..., backend="sloth")`` and ``TrainingArguments(backend="sloth")``.

``autoload`` calls ``patch_config`` and ``patch_trainer`` with transformers' modules once they are imported. The field
is inherited by the configurations of all trainers that derive from this one; a trainer that ``hosts.trl`` does not
know by name is switched on by it, inside ``Trainer.__init__``.
"""

from __future__ import annotations

from types import ModuleType

from sloth_backend.hosts.switch import add_field
from sloth_backend.hosts.trainers import Kind, switch_on

TRAINERS = {"transformers.trainer": "Trainer", "transformers.trainer_seq2seq": "Seq2SeqTrainer"}
"""Module -> the trainer in it."""


def patch_config(module: ModuleType) -> None:
    """Give ``TrainingArguments``, and what is derived from it, the field ``backend``."""
    add_field(module.TrainingArguments)


def patch_trainer(module: ModuleType) -> None:
    """Let the trainer of ``module`` take the keyword ``backend``."""
    name = TRAINERS[module.__name__]
    switch_on(getattr(module, name), Kind("transformers", name, "transformers.training_args:TrainingArguments"))
