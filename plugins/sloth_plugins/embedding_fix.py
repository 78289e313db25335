"""Repair the embedding rows that pre-training never touched.

A checkpoint's vocabulary holds tokens that its training data never used (Llama 3 base: 287 reserved ones). Their rows
decayed to about 1e-23, not to 0. A chat template that starts to use such a token feeds the first norm a vector
without a length, and gradients overflow. For a matrix W of V rows, of which U have no entry above the threshold:

    W[untrained] = 0;  mean = sum(W) / (V - U);  W[untrained] = mean

The sum runs in float64 and the mean is rounded once, to W's dtype. The plain mean, sum(W) / V, is too short by a factor
of (V - U) / V and is not used. Works on frozen and on trained weights, which are changed in place and never replaced.

``embedding_storage`` knows how rows are stored. Left out, each with a Finding: matrices that are not loaded yet, that
are flattened (FSDP1, ZeRO-3), or that are quantised so that rows cannot be told apart (double quantisation).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from sloth_backend.findings import Action, Edits, Finding
from sloth_backend.hookspecs import hookimpl
from sloth_backend.phases import base_model
from sloth_backend.run import Run, find_embedding
from sloth_plugins.embedding_storage import Plain, store_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CAPABILITY = "embedding_fix"
SHOWN = 4
"""Tokens that are named in a report."""


@hookimpl
def sloth_fix_embeddings(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase | None, run: Run, edits: Edits
) -> list[Finding] | None:
    """Fix the input and the output embeddings, the copies that adapters train included."""
    if not run.config.fix_embeddings:
        return None
    matrices = find_matrices(base_model(model))
    if not matrices:
        return [Finding("skipped", "embeddings", "the model names no input or output embeddings", CAPABILITY)]
    return [fix(matrix, run.config.untrained_threshold, edits, tokenizer) for matrix in matrices]


@dataclass
class Matrix:
    """One embedding matrix.

    Attributes:
        names: dotted names of the parameter; more than one where input and output embeddings are tied.
        weight: the parameter, (V, H).
        padding_row: the row that ``nn.Embedding`` keeps at zero, or None.
        row_copies: ``(row numbers, their values)`` that an adapter puts in place of W's own rows; values are (n, H).
    """

    names: list[str]
    weight: nn.Parameter
    padding_row: int | None = None
    row_copies: list[tuple[list[int], nn.Parameter]] = field(default_factory=list)

    @property
    def subject(self) -> str:
        """``model.embed_tokens.weight = lm_head.weight`` for tied ones."""
        return " = ".join(self.names)


def find_matrices(model: nn.Module) -> list[Matrix]:
    """The embedding matrices of a causal language model, tied ones once."""
    names = {module: name for name, module in model.named_modules()}
    found: dict[int, Matrix] = {}
    for module in (find_embedding(model, "input"), find_embedding(model, "output")):
        for owner, row_copies in _owners(module):
            name, weight = f"{names.get(owner, type(owner).__name__)}.weight", owner.weight
            if not isinstance(weight, nn.Parameter):
                continue
            matrix = found.setdefault(id(weight), Matrix([], weight, getattr(owner, "padding_idx", None)))
            matrix.names += [name] if name not in matrix.names else []
            known = {id(values) for _, values in matrix.row_copies}
            matrix.row_copies += [copy for copy in row_copies if id(copy[1]) not in known]
    return list(found.values())


def _owners(module: nn.Module | None) -> Iterator[tuple[nn.Module, list[tuple[list[int], nn.Parameter]]]]:
    """The modules inside adapter wrappers that hold a whole matrix, each with the single rows that stand in for it."""
    children = dict(module.named_children()) if module is not None else {}
    if "modules_to_save" in children:
        yield from _owners(children.get("original_module"))
        for copy in children["modules_to_save"].children():
            yield from _owners(copy)
    elif "token_adapter" in children:
        yield from _owners(children["token_adapter"])
    elif "base_layer" in children:
        row_copies = _row_copies(module)
        yield from ((owner, row_copies) for owner, _ in _owners(children["base_layer"]))
    elif module is not None and hasattr(module, "weight"):
        yield module, []


def _row_copies(layer: nn.Module | None) -> list[tuple[list[int], nn.Parameter]]:
    """The rows that PEFT's ``trainable_token_indices`` trains: full values, written over the base's in forward."""
    rows = getattr(layer, "token_indices", {})
    return [(list(rows[name]), values) for name, values in getattr(layer, "trainable_tokens_delta", {}).items()]


@torch.no_grad()
def fix(matrix: Matrix, threshold: float, edits: Edits, tokenizer: Any = None) -> Finding:
    """Set the untrained rows of one matrix to the mean of the trained ones.

    Args:
        matrix: what to repair, in place.
        threshold: a row is untrained when no entry is larger in magnitude.
        edits: takes the old rows, so that undo can restore them.
        tokenizer: tells which of the rows a text can reach, or None.
    """
    store = store_of(matrix.weight)
    if isinstance(store, str):
        return _finding("warned" if matrix.weight.is_meta else "skipped", matrix, f"left alone: {store}")
    untrained = _untrained(store, threshold)
    trained = len(store) - len(untrained)
    # The padding row is zero because nn.Embedding made it so, gets no gradient, and is never a target: it is no
    # fault. It is no trained row either, so it stays out of the divisor.
    rows = untrained if matrix.padding_row is None else untrained[untrained != matrix.padding_row % len(store)]
    if len(rows) == 0:
        return _finding("skipped", matrix, "no untrained rows")
    if trained == 0:
        return _finding("warned", matrix, f"all {len(store)} rows are untrained: were the weights loaded? Left alone")
    before = store.read(rows)
    store.write(rows, 0.0)
    mean = store.total() / trained
    if not store.finite(mean):
        store.restore(rows, before, store.read(rows))
        return _finding("warned", matrix, f"{len(rows)} untrained rows left alone: the trained rows hold inf or NaN")
    store.write(rows, mean)
    after = store.read(rows)
    edits.on_undo(lambda: _restore(store, rows, before, after))
    for numbers, values in matrix.row_copies:
        _fix_copies(numbers, values, rows, threshold, mean, edits)
    return _finding(
        "changed",
        matrix,
        f"{len(rows)} of {len(store)} rows were untrained (no entry above {threshold:g}); "
        f"set to the mean of the {trained} trained ones{reach(rows.tolist(), tokenizer)}",
    )


def obstacle(weight: nn.Parameter) -> str | None:
    """Why single rows of ``weight`` cannot be read and written as a plain tensor's, or None."""
    store = store_of(weight)
    if isinstance(store, str):
        return store
    return None if type(store) is Plain else f"it is quantised or sharded ({type(weight.data).__name__})"


def untrained_rows(weight: torch.Tensor, threshold: float) -> torch.Tensor:
    """Numbers of the rows of ``weight`` (V, H) without an entry above ``threshold`` in magnitude, ascending, int64."""
    return _untrained(Plain(nn.Parameter(weight, requires_grad=False)), threshold)


def _untrained(store: Plain, threshold: float) -> torch.Tensor:
    return (store.largest() <= threshold).nonzero().flatten()


def reach(rows: list[int], tokenizer: Any) -> str:
    """Which of the rows a text can reach, as the end of a sentence: those of tokens, and of them the template's."""
    if tokenizer is None or not hasattr(tokenizer, "get_vocab"):
        return ""
    wanted = set(rows)
    tokens = sorted(token for token, number in tokenizer.get_vocab().items() if number in wanted)
    if not tokens:
        return "; no text reaches them: none is a token of the tokenizer"
    templates = str(getattr(tokenizer, "chat_template", None) or "")
    roles = {token for token in getattr(tokenizer, "special_tokens_map", {}).values() if isinstance(token, str)}
    used = [token for token in tokens if token in roles or token in templates]
    if not used:
        return f"; {len(tokens)} of them are tokens that a text can hold, none is used by the chat template"
    shown = ", ".join(map(repr, used[:SHOWN])) + ("..." if len(used) > SHOWN else "")
    return f"; {len(tokens)} of them are tokens that a text can hold, and every chat would: {shown}"


def _fix_copies(
    numbers: list[int], values: nn.Parameter, rows: torch.Tensor, threshold: float, mean: torch.Tensor, edits: Edits
) -> None:
    """Give the mean to an adapter's copies of fixed rows, where they are as untrained as the originals were."""
    fixed = torch.isin(torch.tensor(numbers, device=rows.device), rows)
    small = (values.data.abs().amax(dim=1).float() <= threshold).to(rows.device)
    places, store = (fixed & small).nonzero().flatten().to(values.device), Plain(values)
    if len(places):
        before = store.read(places)
        store.write(places, mean.to(values.device))
        after = store.read(places)
        edits.on_undo(lambda: _restore(store, places, before, after))


@torch.no_grad()
def _restore(store: Plain, rows: torch.Tensor, before: Any, after: Any) -> None:
    store.restore(rows, before, after)


def _finding(action: Action, matrix: Matrix, reason: str) -> Finding:
    return Finding(action, matrix.subject, reason, CAPABILITY)
