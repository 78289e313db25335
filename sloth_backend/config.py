"""SlothConfig: the one dataclass of options; every switch (keyword, mapping, environment) ends in it."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Mapping
from typing import Any, Literal

import pydantic
from pydantic.dataclasses import dataclass

from sloth_kernels.registry import OP_NAMES

BACKEND_NAME = "sloth"


class SlothConfigError(ValueError):
    """The switch cannot be honoured as asked. ``problems`` lists every reason, each with its remedy.

    Raised before anything is changed, so that one run shows all that has to be mended.
    """

    def __init__(self, problems: list[str]) -> None:
        self.problems = list(problems)
        lines = "\n".join(f"  {n}. {problem}" for n, problem in enumerate(self.problems, 1))
        count = "1 problem" if len(self.problems) == 1 else f"{len(self.problems)} problems"
        super().__init__(f"sloth_backend found {count}; nothing was changed.\n{lines}")


@dataclass(frozen=True, config=pydantic.ConfigDict(extra="forbid", strict=False))
class SlothConfig:
    """What the backend may do. The defaults switch everything on that keeps the numbers those of the host.

    Attributes:
        kernels: the ops that may replace a model's own computation: ``True`` for all, ``False`` for none, or names.
        checkpointing: where a checkpointed layer's input waits for its backward: ``"offload"`` in pinned host memory
            (CUDA only), ``"host"`` as the host framework does it. Layers are only checkpointed if the host asks.
            Layers that follow the memory plan do not checkpoint.
        offload_keep_last: how many of the last layers keep their input on the device, since it is needed at once.
        memory: what the memory plan aims at: ``"auto"`` the fastest plan under the budget, ``"least"`` the least
            memory, of several plans the fastest, ``"fastest"`` speed, whether it fits or not.
        vram_budget_gb: GiB of the device that this process may use, the driver's own included; None for what is free.
        accumulation: how the micro-batches of an accumulation step are passed: ``"auto"`` together, without padding,
            where that leaves the host's numbers what they are; ``"fused"`` also where dropout then draws other random
            numbers; ``"host"`` one by one, as the host has them.
        deterministic: take kernels whose sums come in one order in every run, for the whole process; some are slower.
        heal_tokenizer: mend the tokenizer's faults before the host tokenises.
        fix_embeddings: set embedding rows that pre-training never touched to the mean of the trained rows.
        untrained_threshold: a row is untrained when none of its entries is larger than this in magnitude.
        embedding_learning_rate: the rate at which input and output embeddings learn that train; None for that of all
            other parameters.
        check_data: look at the tokenised rows before the first step: how many are cut, train nothing or hold ids that
            the model does not have.
        print_report: print what was and what was not changed when training is set up (main process only).
    """

    kernels: bool | tuple[str, ...] = True
    checkpointing: Literal["offload", "host"] = "offload"
    offload_keep_last: int = pydantic.Field(default=1, ge=0)
    memory: Literal["auto", "least", "fastest"] = "auto"
    vram_budget_gb: float | None = pydantic.Field(default=None, gt=0, allow_inf_nan=False)
    accumulation: Literal["auto", "fused", "host"] = "auto"
    deterministic: bool = False
    heal_tokenizer: bool = True
    fix_embeddings: bool = True
    untrained_threshold: float = pydantic.Field(default=1e-16, ge=0)
    embedding_learning_rate: float | None = pydantic.Field(default=None, gt=0, allow_inf_nan=False)
    check_data: bool = True
    print_report: bool = True

    @pydantic.field_validator("kernels")
    @classmethod
    def _known_ops(cls, value: bool | tuple[str, ...]) -> bool | tuple[str, ...]:
        unknown = [] if isinstance(value, bool) else [name for name in value if name not in OP_NAMES]
        if unknown:
            raise ValueError(f"unknown op {', '.join(map(repr, unknown))}; the ops are: {', '.join(OP_NAMES)}")
        return value

    @classmethod
    def parse(cls, value: object) -> SlothConfig | None:
        """The config that a switch's value stands for; None where it is off (``None``, ``False``, ``""``).

        Args:
            value: ``"sloth"``, ``True``, a mapping of options, or a SlothConfig.

        Raises:
            SlothConfigError: the backend or an option is unknown, or a value does not fit; all of them are named.
        """
        if value is None or value is False or value == "":
            return None
        if isinstance(value, cls):
            return value
        if value is True or value == BACKEND_NAME:
            return cls()
        if isinstance(value, Mapping):
            return cls.from_mapping(value)
        raise SlothConfigError(
            [f"unknown backend {value!r}: expected {BACKEND_NAME!r}, a mapping of options or a SlothConfig"]
        )

    @classmethod
    def from_mapping(cls, options: Mapping[str, Any]) -> SlothConfig:
        """Validate a mapping of options; see ``parse``."""
        try:
            return cls(**dict(options))
        except pydantic.ValidationError as error:
            raise SlothConfigError([_explain(item) for item in error.errors()]) from None

    def allows(self, op: str) -> bool:
        """Whether ``op`` may replace a model's own computation."""
        return self.kernels if isinstance(self.kernels, bool) else op in self.kernels


OPTION_NAMES = tuple(field.name for field in dataclasses.fields(SlothConfig))


def _explain(item: Any) -> str:
    """One pydantic error as a sentence: what was given, what is expected, what to write instead."""
    name = str(item["loc"][0]) if item["loc"] else "config"
    if item["type"] == "unexpected_keyword_argument":
        close = difflib.get_close_matches(name, OPTION_NAMES, n=1)
        hint = f"; did you mean {close[0]!r}?" if close else "."
        return f"unknown option {name!r}{hint} The options are: {', '.join(OPTION_NAMES)}"
    return f"option {name!r} got {item['input']!r}: {item['msg']}"
