"""Does a program compute what its layer does? The model itself is asked, on a few tokens, before it is changed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from sloth_kernels.program import OUTPUT, Program
from sloth_plugins.layer_programs.head import parameter_of
from sloth_plugins.layer_programs.layouts import effect_free

ROWS, LENGTH = 2, 7
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}
"""Largest difference of what a layer adds to its input, relative to it, both as Frobenius norms: what roundings leave.
The parts (norms, rotation, activation) have been matched to the bit; what is left to see here is how they are wired,
and a wrong wire shows as a difference of the size of the result."""

PARTS = ("CB", "SCB")
"""Of bitsandbytes' 8-bit weights: the integers, and the scale of each row."""


@dataclass(frozen=True)
class Seen:
    """One call of a layer, as the model made it."""

    hidden: torch.Tensor
    kwargs: Mapping[str, Any]
    output: Any
    real: torch.Tensor
    """(B, S) bool: the tokens that are no padding; what comes of the others is nobody's business."""


def observe(model: nn.Module, layers: Sequence[nn.Module]) -> dict[nn.Module, list[Seen]] | str:
    """Every layer's calls in two forward passes of a few tokens, the second with padding; a reason if that fails."""
    seen: dict[nn.Module, list[Seen]] = {layer: [] for layer in layers}

    masks: list[torch.Tensor] = []

    def note(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        if len(args) == 1 or (not args and "hidden_states" in kwargs):
            hidden = args[0] if args else kwargs["hidden_states"]
            seen[layer].append(
                Seen(hidden, {k: v for k, v in kwargs.items() if k != "hidden_states"}, output, masks[-1])
            )

    hooks = [layer.register_forward_hook(note, with_kwargs=True) for layer in layers]
    try:
        with evaluating(model):
            _run_decoder(model, masks)
    except Exception as error:
        return f"the model does not run on {LENGTH} tokens: {type(error).__name__}: {error}"
    finally:
        for hook in hooks:
            hook.remove()
    return seen


def _run_decoder(model: Any, masks: list[torch.Tensor]) -> None:
    """Two passes; what is real of each goes to ``masks`` before it starts."""
    decoder = model.get_decoder() if hasattr(model, "get_decoder") else model.model
    weight = parameter_of(model.get_input_embeddings())  # PEFT's wrappers have no num_embeddings
    ids = (torch.arange(ROWS * LENGTH, device=weight.device).view(ROWS, LENGTH) * 7919 + 11) % weight.shape[0]
    padded = torch.ones_like(ids)
    padded[0, :3] = 0
    for mask in (None, padded):
        masks.append((torch.ones_like(ids) if mask is None else mask).bool())
        decoder(input_ids=ids, attention_mask=mask, use_cache=False)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients, and every module as it was afterwards.

    For bitsandbytes' 4-bit linears training is no other mode but for one thing: where they evaluate on a CPU with
    products of bfloat16, they pack their weights anew, with rounded scales, for good. So they stay in it.

    Raises:
        RuntimeError: the model cannot be asked: a kernel would read memory of another device.
    """
    _check_devices(model)
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    for module, _ in modes:
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.training = True
    try:
        with torch.no_grad(), _never_called([module for module, _ in modes]):
            yield
    finally:
        for module, mode in modes:
            module.training = mode


def _check_devices(model: nn.Module) -> None:
    """``model.cpu()`` moves weights of 8 bits alone; their scales, and the copy that products read, stay behind."""
    for name, module in model.named_modules():
        weight = module._parameters.get("weight")
        parts = [getattr(owner, part, None) for owner in (weight, getattr(module, "state", None)) for part in PARTS]
        left = {part.device for part in parts if isinstance(part, torch.Tensor)} - {getattr(weight, "device", None)}
        if left:
            raise RuntimeError(
                f"{name} has its weight on {weight.device}, what belongs to it on {left.pop()}: "  # type: ignore[union-attr]
                "load the model on the device that it is to train on"
            )


@contextmanager
def _never_called(modules: Sequence[Any]) -> Iterator[None]:
    """Linears of bitsandbytes afterwards are as if nobody had called them.

    At their first call those of 8 bits take the scales out of the weight, where a later ``model.to(device)`` would not
    find them: kernels would read them on the device that the model was on. And biases are cast, for good.
    """
    linears = [module for module in modules if type(module).__module__.startswith("bitsandbytes.")]
    biases = [(linear, linear.bias.data) for linear in linears if getattr(linear, "bias", None) is not None]
    quantised = [linear for linear in linears if getattr(linear.weight, "CB", None) is not None]
    scales = [(linear, linear.weight.data, linear.weight.CB, linear.weight.SCB) for linear in quantised]
    try:
        yield
    finally:
        for linear, data in biases:
            linear.bias.data = data
        for linear, data, CB, SCB in scales:
            linear.weight.data, linear.weight.CB, linear.weight.SCB = data, CB, SCB
            linear.state.CB = linear.state.SCB = None


def constants_of(kwargs: Mapping[str, Any]) -> dict[str, Any] | None:
    """A program's constants from a layer's arguments; None where they ask for more than a program does."""
    mask, angles = kwargs.get("attention_mask"), kwargs.get("position_embeddings")
    if not effect_free(kwargs) or not (mask is None or isinstance(mask, torch.Tensor)):
        return None
    if angles is None:
        return {"cos": None, "sin": None, "mask": mask}
    if not isinstance(angles, tuple) or len(angles) != 2:
        return None
    return {"cos": angles[0], "sin": angles[1], "mask": mask}


def disagreement(program: Program, layer: nn.Module, seen: Sequence[Seen]) -> str:
    """Why ``program`` does not stand for ``layer``, which was ``seen``; the empty string if it does."""
    if not seen:
        return "the model did not call it with one positional argument"
    for call in seen:
        constants = constants_of(call.kwargs)
        if constants is None:
            return f"the model calls it with arguments that programs do not know: {', '.join(call.kwargs)}"
        if not isinstance(call.output, torch.Tensor):
            return f"it returns a {type(call.output).__name__}, not one tensor"
        reason = _difference(lambda x, c=constants: program.trace(x, c)[OUTPUT], layer, call)
        if reason:
            return reason
    return ""


def tolerance(module: nn.Module, dtype: torch.dtype) -> float:
    """That of the coarsest dtype that ``module``, whose results are of ``dtype``, computes in.

    Linears over 4-bit weights have one of their own, whatever their input's, and so do adapters.
    """
    used = {dtype}
    for part in module.modules():
        if getattr(part, "quant_state", None) is None:
            used |= {p.dtype for p in part.parameters(recurse=False)}
        else:
            used.add(getattr(part, "compute_dtype", None) or dtype)
    return max(TOLERANCE.get(found, 0.0) for found in used)


def _difference(run: Callable[[torch.Tensor], torch.Tensor], layer: nn.Module, call: Seen) -> str:
    try:
        with torch.no_grad():
            mine = run(call.hidden)
    except Exception as error:
        return f"the program fails: {type(error).__name__}: {error}"
    if call.output.dtype not in TOLERANCE:
        return f"its hidden states are {call.output.dtype}"
    if mine.dtype != call.output.dtype or mine.shape != call.output.shape:
        return f"the program gives {mine.dtype} {tuple(mine.shape)}, not {call.output.dtype} {tuple(call.output.shape)}"
    theirs, hidden, mine = (t.double()[call.real] for t in (call.output, call.hidden, mine))
    rounding = torch.finfo(call.output.dtype).eps * theirs.norm()
    allowed = tolerance(layer, call.output.dtype) * (theirs - hidden).norm() + rounding
    off = (mine - theirs).norm()
    return "" if off <= allowed else f"the program's result is {off:.1e} off, more than the {allowed:.1e} of roundings"
