"""Counts in words: what goes into the report, and what is an error."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from sloth_backend.data import Rows
from sloth_backend.findings import Action, Finding
from sloth_plugins.data_checks.columns import Source
from sloth_plugins.data_checks.counts import Counts
from sloth_plugins.data_checks.facts import ModelFacts

CAPABILITY = "data_checks"
ENOUGH = 10_000
"""Rows of a sample that speak for all."""
CUT_SHARE, BLOCK_SHARE = 0.01, 0.5
"""Rows of exactly the greatest length were probably cut to it from the first share on; from the second, they are blocks
that someone filled."""
FATE = {
    "keep_start": "they are cut at their end",
    "keep_end": "they are cut at their start",
    "drop": "they are dropped",
    "split": "they are split into several rows",
    "keep": "they are left as they are",
}


def finding(action: Action, rows: Rows, reason: str) -> Finding:
    """A finding about one data set."""
    return Finding(action, f"data: {rows.name}", reason, CAPABILITY)


def problems(rows: Rows, source: Source, counts: Counts, facts: ModelFacts) -> list[str]:
    """What makes the run meaningless, or ends it, each with its remedy."""
    found = [*_ids_beyond(rows, counts, facts), *_positions_beyond(rows, counts, facts)]
    if rows.trains and _speaks_for_all(source) and counts.known and _without_any(counts) == counts.known:
        found.append(_nothing_trains(rows, counts))
    return found


def _speaks_for_all(source: Source) -> bool:
    return source.looked_at == source.total or source.looked_at >= ENOUGH


def _without_any(counts: Counts) -> int:
    return counts.untrained + counts.emptied


def _nothing_trains(rows: Rows, counts: Counts) -> str:
    if counts.emptied:
        return (
            f"no row of the {rows.name} data has a trained token left: a row may have {rows.max_length:,} tokens, "
            f"which takes all of them from {_rows(counts.emptied)}: raise the length (the longest row has "
            f"{_longest(counts):,}), or shorten the prompts"
        )
    return (
        f"no row of the {rows.name} data has a trained token: all labels are -100, so there is nothing to learn; look "
        "at the masks (completion_only_loss, assistant_only_loss, train_on_inputs, the chat template's generation "
        "markers) that made them"
    )


def _ids_beyond(rows: Rows, counts: Counts, facts: ModelFacts) -> Iterator[str]:
    what, examples, number = "ids", counts.beyond, counts.beyond_rows
    if not number:
        what, examples, number = "labels", counts.labels_beyond, counts.labels_beyond_rows
    if number:
        shown = ", ".join(_shown(one, facts) for one in sorted(examples))
        yield (
            f"{_rows(number)} of the {rows.name} data with {what} that the embedding of {facts.embedding_rows:,} rows "
            f"does not have, such as {shown}: {_remedy(max(examples), facts)}"
        )


def _shown(number: int, facts: ModelFacts) -> str:
    token = facts.tokenizer.convert_ids_to_tokens(number) if facts.tokenizer is not None and number >= 0 else None
    return f"{number} ({token!r})" if token else str(number)


def _remedy(highest: int, facts: ModelFacts) -> str:
    if facts.tokenizer is not None and 0 <= highest < len(facts.tokenizer):
        return f"call model.resize_token_embeddings({len(facts.tokenizer)}) before training"
    return "tokenise them with the tokenizer of this model"


def _positions_beyond(rows: Rows, counts: Counts, facts: ModelFacts) -> Iterator[str]:
    number = _beyond_context(rows, counts, facts)
    if number and facts.learned_positions:
        yield (
            f"{_rows(number)} of the {rows.name} data with more tokens than the model has positions, "
            f"{facts.context:,}: cut or split them to that length"
        )


def _beyond_context(rows: Rows, counts: Counts, facts: ModelFacts) -> int:
    """Rows that are longer than the context when the host has done with them."""
    if facts.context is None or not counts.lengths:
        return 0
    lengths = np.concatenate(counts.lengths)
    if rows.max_length is not None and rows.longer != "keep":
        lengths = lengths[lengths <= rows.max_length] if rows.longer == "drop" else np.minimum(lengths, rows.max_length)
    return int((lengths > facts.context).sum())


def findings(rows: Rows, source: Source, counts: Counts, facts: ModelFacts) -> list[Finding]:
    """What is worth knowing of one data set; a set without faults says how much was looked at."""
    if not counts.lengths:
        return [finding("warned", rows, "it has no rows")]
    said = [finding("warned", rows, reason) for reason in _warnings(rows, counts, facts)]
    summary = f"looked at {_looked_at(source)}: {_tokens(counts):,} tokens, the longest {_longest(counts):,}"
    return [*said, finding("skipped", rows, summary if said else f"{summary}; no faults")]


def _looked_at(source: Source) -> str:
    if source.total is None:
        return f"the first {_rows(source.looked_at)} of a stream"
    if source.looked_at < source.total:
        return f"{source.looked_at:,} of {_rows(source.total)}, evenly spaced"
    return f"all {_rows(source.total)}"


def _warnings(rows: Rows, counts: Counts, facts: ModelFacts) -> Iterator[str]:
    if counts.longer and rows.max_length is not None:
        yield _longer(rows, counts)
    if counts.masked and counts.emptied and rows.longer != "drop":
        fate = "they are dropped" if rows.drops_emptied else "they train nothing"
        yield f"{_texts(counts.emptied)} whose answer, all trained tokens, lies beyond that cut: {fate}"
    if counts.masked and counts.shortened:
        yield f"{_texts(counts.shortened)} whose answer is cut in two there: a part of its trained tokens is lost"
    if counts.untrained:
        share = f"{counts.untrained / counts.known:.1%}"
        yield f"{_texts(counts.untrained)} ({share}) without a trained token: all their labels are -100"
    number = _beyond_context(rows, counts, facts)
    if number and not facts.learned_positions:
        yield (
            f"{_texts(number)} with more tokens than the {facts.context:,} positions that the model was made for "
            "(max_position_embeddings)"
        )
    if counts.uneven:
        yield f"{_texts(counts.uneven)} with more or fewer labels than input_ids, for a collator to mend"
    if not counts.longer and (cut := _probably_cut(counts, facts)):
        yield (
            f"{_texts(cut)} of exactly {_longest(counts):,} tokens, the most of all, without eos at their end: they "
            "were probably cut before"
        )


def _longer(rows: Rows, counts: Counts) -> str:
    lost = ""
    if rows.longer not in ("keep", "split"):
        lost = f", {counts.lost:,} tokens ({counts.lost / _tokens(counts):.1%}) are lost"
    longest = f"the longest {_longest(counts):,}"
    return f"{_texts(counts.longer)} of more than {rows.max_length:,} tokens ({longest}): {FATE[rows.longer]}{lost}"


def _tokens(counts: Counts) -> int:
    return int(sum(lengths.sum() for lengths in counts.lengths))


def _probably_cut(counts: Counts, facts: ModelFacts) -> int:
    """Texts of the greatest length that do not end: some, not so many that they are blocks of one long stream."""
    lengths, last = np.concatenate(counts.lengths), np.concatenate(counts.last)
    at_most = lengths == lengths.max()
    if not facts.ends or at_most.mean() > BLOCK_SHARE or at_most.sum() < max(2, CUT_SHARE * len(lengths)):
        return 0
    return int((at_most & ~np.isin(last, list(facts.ends))).sum())


def _longest(counts: Counts) -> int:
    return max(int(lengths.max(initial=0)) for lengths in counts.lengths)


def _rows(number: int) -> str:
    return "1 row" if number == 1 else f"{number:,} rows"


def _texts(number: int) -> str:
    """Chosen and rejected answers of one row are two texts."""
    return "1 text" if number == 1 else f"{number:,} texts"
