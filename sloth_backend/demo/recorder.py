"""A TrainerCallback that draws the progress bar and keeps what the Trainer does not: how long each step took."""

from __future__ import annotations

import time
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments


class Recorder(TrainerCallback):
    """Times each optimizer step and shows the last training and held-out loss beside the bar."""

    def __init__(self, console: Console) -> None:
        self.seconds: list[float] = []
        self._started = 0.0
        self._losses: dict[str, Any] = {"loss": float("nan"), "eval_loss": float("nan")}
        text = TextColumn("loss {task.fields[loss]:.3f}  held out {task.fields[eval_loss]:.3f}")
        columns = ("training", BarColumn(), MofNCompleteColumn(), text, TimeElapsedColumn(), TimeRemainingColumn())
        self._progress = Progress(*columns, console=console)
        self._task = self._progress.add_task("training", **self._losses)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Show the bar."""
        self._progress.update(self._task, total=state.max_steps)
        self._progress.start()

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Start the clock."""
        self._started = _now()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Stop the clock, before anything is logged or evaluated."""
        self.seconds.append(_now() - self._started)
        self._progress.update(self._task, completed=state.global_step)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Show the newest losses."""
        self._losses |= {name: value for name, value in (logs or {}).items() if name in self._losses}
        self._progress.update(self._task, **self._losses)

    def close(self) -> None:
        """Leave the bar as it is, also after a failure."""
        self._progress.stop()


def _now() -> float:
    """Seconds, once the GPU has done what was asked of it."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()
