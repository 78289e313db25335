"""Repair the embedding rows that pre-training never touched.

A checkpoint's vocabulary holds tokens that its training data never used (Llama 3 base: 287 reserved ones). Their rows
decayed to about 1e-23, not to 0. A chat template that starts to use such a token feeds the first norm a vector
without a length, and gradients overflow. For a matrix W of V rows, of which U have no entry above the threshold:

    W[untrained] = 0;  mean = sum(W) / (V - U);  W[untrained] = mean

The sum runs in float64 and the mean is rounded once, to W's dtype. The plain mean, sum(W) / V, is too short by a factor
of (V - U) / V and is not used. Works on frozen and on trained weights, which are changed in place and never replaced.

Left out: matrices that are quantised, sharded, or not loaded yet; each gets a Finding.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import nn

from sloth_backend.findings import Action, Edits, Finding
from sloth_backend.hookspecs import hookimpl
from sloth_backend.phases import base_model
from sloth_backend.run import Run

CAPABILITY = "embedding_fix"
CHUNK_ELEMENTS = 1 << 23
"""Entries handled at a time: bounds the float64 copy that a reduction may make to 64 MiB."""


@hookimpl
def sloth_fix_embeddings(model: nn.Module, run: Run, edits: Edits) -> list[Finding] | None:
    """Fix the input and the output embeddings, the copies that adapters train included."""
    if not run.config.fix_embeddings:
        return None
    matrices = find_matrices(base_model(model))
    if not matrices:
        return [Finding("skipped", "embeddings", "the model names no input or output embeddings", CAPABILITY)]
    return [fix(matrix, run.config.untrained_threshold, edits) for matrix in matrices]


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
    for module in (_embedding(model, "get_input_embeddings"), _embedding(model, "get_output_embeddings")):
        for owner, row_copies in _owners(module):
            name, weight = f"{names.get(owner, type(owner).__name__)}.weight", owner.weight
            if not isinstance(weight, nn.Parameter):
                continue
            matrix = found.setdefault(id(weight), Matrix([], weight, getattr(owner, "padding_idx", None)))
            matrix.names += [name] if name not in matrix.names else []
            known = {id(values) for _, values in matrix.row_copies}
            matrix.row_copies += [copy for copy in row_copies if id(copy[1]) not in known]
    return list(found.values())


def _embedding(model: nn.Module, getter: str) -> nn.Module | None:
    try:
        return getattr(model, getter)()
    except (AttributeError, NotImplementedError):
        return None


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


def obstacle(weight: torch.Tensor) -> str | None:
    """Why the rows of ``weight`` cannot be read and written here, or None."""
    data = weight.data
    if data.is_meta:
        return "its values are not loaded yet (meta device)"
    if not data.is_floating_point() or data.element_size() < 2:
        return f"it is quantised ({str(data.dtype).removeprefix('torch.')})"
    if type(data) is not torch.Tensor:
        return f"it is a {type(data).__name__}, whose rows are spread over ranks or packed; fix them before sharding"
    if data.dim() != 2 or data.numel() == 0:
        return f"it is sharded or flattened (shape {tuple(data.shape)} here); fix it before sharding"
    return None


@torch.no_grad()
def fix(matrix: Matrix, threshold: float, edits: Edits) -> Finding:
    """Set the untrained rows of one matrix to the mean of the trained ones.

    Args:
        matrix: what to repair, in place.
        threshold: a row is untrained when no entry is larger in magnitude.
        edits: takes the old rows, so that undo can restore them.
    """
    reason = obstacle(matrix.weight)
    if reason:
        return _finding("warned" if matrix.weight.is_meta else "skipped", matrix, f"left alone: {reason}")
    weight = matrix.weight.data
    untrained = untrained_rows(weight, threshold)
    trained = len(weight) - len(untrained)
    # The padding row is zero because nn.Embedding made it so, gets no gradient, and is never a target: it is no
    # fault. It is no trained row either, so it stays out of the divisor.
    rows = untrained if matrix.padding_row is None else untrained[untrained != matrix.padding_row % len(weight)]
    if len(rows) == 0:
        return _finding("skipped", matrix, "no untrained rows")
    if trained == 0:
        return _finding("warned", matrix, f"all {len(weight)} rows are untrained: were the weights loaded? Left alone")
    before = weight[rows]
    weight[rows] = 0
    mean = (column_sum(weight) / trained).to(weight.dtype)
    if not mean.isfinite().all():
        weight[rows] = before
        return _finding("warned", matrix, f"{len(rows)} untrained rows left alone: the trained rows hold inf or NaN")
    _write(matrix.weight, rows, before, mean, edits)
    for numbers, values in matrix.row_copies:
        _fix_copies(numbers, values, rows, threshold, mean, edits)
    return _finding(
        "changed",
        matrix,
        f"{len(rows)} of {len(weight)} rows were untrained (no entry above {threshold:g}); "
        f"set to the mean of the {trained} trained ones",
    )


def untrained_rows(weight: torch.Tensor, threshold: float) -> torch.Tensor:
    """Numbers of the rows of ``weight`` (V, H) without an entry above ``threshold`` in magnitude, ascending, int64."""
    largest = []
    for chunk in _chunks(weight):
        low, high = torch.aminmax(chunk, dim=1)
        largest.append(torch.maximum(-low, high))
    # float32, since the threshold is not representable in float16
    return (torch.cat(largest).float() <= threshold).nonzero().flatten()


def column_sum(weight: torch.Tensor) -> torch.Tensor:
    """The sum (H) of the rows of ``weight`` (V, H), float64 (float32 on Apple's GPUs, which have no float64)."""
    dtype = torch.float32 if weight.device.type == "mps" else torch.float64
    total = torch.zeros(weight.shape[1], dtype=dtype, device=weight.device)
    for chunk in _chunks(weight):
        total += chunk.sum(dim=0, dtype=dtype)
    return total


def _chunks(weight: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return weight.split(max(1, CHUNK_ELEMENTS // weight.shape[1]))


def _fix_copies(
    numbers: list[int], values: nn.Parameter, rows: torch.Tensor, threshold: float, mean: torch.Tensor, edits: Edits
) -> None:
    """Give the mean to an adapter's copies of fixed rows, where they are as untrained as the originals were."""
    fixed = torch.isin(torch.tensor(numbers, device=rows.device), rows)
    small = (values.data.abs().amax(dim=1).float() <= threshold).to(rows.device)
    places = (fixed & small).nonzero().flatten().to(values.device)
    _write(values, places, values.data[places], mean.to(values), edits)


def _write(weight: nn.Parameter, rows: torch.Tensor, before: torch.Tensor, mean: torch.Tensor, edits: Edits) -> None:
    weight.data[rows] = mean

    @torch.no_grad()
    def restore() -> None:
        """Bring back the old rows, except those that training has moved since: that work is the user's."""
        data = weight.data
        if type(data) is not torch.Tensor or data.dim() != 2 or len(data) <= int(rows.max()):
            return
        places = rows.to(data.device)
        still = (data[places] == mean.to(data)).all(dim=1)
        data[places[still]] = before.to(data)[still]

    if len(rows):
        edits.on_undo(restore)


def _finding(action: Action, matrix: Matrix, reason: str) -> Finding:
    return Finding(action, matrix.subject, reason, CAPABILITY)
