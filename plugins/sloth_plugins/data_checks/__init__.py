"""Data checks: faults of tokenised rows that cost a run without a word, counted before the first step.

Rows that are longer than the host lets them be, answers that its cut takes away, rows without a trained token, ids that
the embedding has no row for, rows beyond the positions that the model knows. What would make training meaningless, or
end it in an assertion of the device, is an error with its remedy; all else is said once, in the report.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch import nn

from sloth_backend.config import SlothConfigError
from sloth_backend.data import Rows
from sloth_backend.findings import Finding
from sloth_backend.hookspecs import hookimpl
from sloth_backend.run import Run
from sloth_plugins.data_checks.columns import Unreadable, open_source
from sloth_plugins.data_checks.counts import Counts, texts_of
from sloth_plugins.data_checks.facts import ModelFacts, facts_of
from sloth_plugins.data_checks.verdicts import finding, findings, problems

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@hookimpl
def sloth_check_data(
    data: Sequence[Rows], model: nn.Module, tokenizer: PreTrainedTokenizerBase | None, run: Run
) -> list[Finding] | None:
    """Look at each data set; what would be meaningless in any of them is raised together."""
    if not run.config.check_data:
        return None
    facts, found, wrong = facts_of(model, tokenizer), [], []
    for rows in data:
        said, errors = look_at(rows, facts)
        found += said
        wrong += errors
    if wrong:
        raise SlothConfigError(wrong)
    return found


def look_at(rows: Rows, facts: ModelFacts) -> tuple[list[Finding], list[str]]:
    """The findings and the problems of one data set."""
    try:
        source = open_source(rows.dataset)
        texts = texts_of(source.columns)
        if not facts.shifted_labels:
            texts = tuple(text._replace(labels=None) for text in texts)
        if source.total != 0 and not texts:
            raise Unreadable("it has no column of token ids: its rows are tokenised when they are used")
    except Unreadable as error:
        return [finding("skipped", rows, f"not looked at: {error}")], []
    counts = Counts()
    for piece in source.pieces:
        for text in texts:
            counts.add(piece, text, rows, facts.embedding_rows)
    return findings(rows, source, counts, facts), problems(rows, source, counts, facts)
