"""``sloth doctor``: what this machine and these versions can do, what is active, and why anything is not."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import re
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal

from sloth_backend.findings import summarize

if TYPE_CHECKING:
    import torch
    from rich.console import Console

    from sloth_backend.manager import SlothManager
    from sloth_kernels.op import Op

State = Literal["ok", "inactive", "problem"]
Range = tuple[tuple[int, int], tuple[int, int] | None]

PYTHON: Range = ((3, 11), None)
REQUIRED: dict[str, Range] = {
    "torch": ((2, 11), (2, 15)),
    "transformers": ((5, 16), (5, 23)),
    "accelerate": ((1, 13), (1, 15)),
    "peft": ((0, 20), None),
}
OPTIONAL: dict[str, Range] = {
    "triton": ((3, 6), None),
    "trl": ((1, 9), (1, 16)),
    "axolotl": ((0, 19), (0, 21)),
    "bitsandbytes": ((0, 50), None),
}
"""Distribution -> the first and the last minor version that is supported; None leaves the end open."""

AUTOLOAD_SWITCH = "TORCH_DEVICE_BACKEND_AUTOLOAD"
STYLE = {"ok": "green", "inactive": "yellow", "problem": "bold red"}


@dataclass(frozen=True)
class Line:
    """One thing that was looked at: ``detail`` is what was found, or why it is not active."""

    name: str
    state: State
    detail: str


@dataclass(frozen=True)
class Diagnosis:
    """Section name -> its lines. The backend is usable unless one of them is a problem."""

    sections: dict[str, list[Line]]

    @property
    def usable(self) -> bool:
        """Whether training with the backend can work here."""
        return all(line.state != "problem" for lines in self.sections.values() for line in lines)

    def to_dict(self) -> dict[str, Any]:
        """Plain data: ``usable`` and, for each section, a list of ``name``, ``state``, ``detail``."""
        return {
            "usable": self.usable,
            "sections": {name: [asdict(line) for line in lines] for name, lines in self.sections.items()},
        }


def examine() -> Diagnosis:
    """Look at everything; what needs a package that is missing is left out, and the missing package is a problem."""
    sections = {"versions": list(_versions())}
    if not Diagnosis(sections).usable:
        return Diagnosis(sections)
    sections["device"] = list(_device())
    sections["hosts"] = list(_hosts())
    try:
        from sloth_backend.manager import get_manager

        manager = get_manager()
    except Exception as error:
        return Diagnosis(sections | {"plugins": [Line("plugins", "problem", str(error))]})
    sections["plugins"] = list(_plugins(manager))
    sections["ops"] = [_op(op, plugin) for op, plugin in _owners(manager, "sloth_ops")]
    sections["roles"] = [
        Line(role.name, "ok", f"runs on {role.op}, from {plugin}") for role, plugin in _owners(manager, "sloth_roles")
    ]
    sections["trial"] = list(_trial())
    return Diagnosis(sections)


def render(diagnosis: Diagnosis, console: Console) -> None:
    """The diagnosis as a table for people."""
    from rich.table import Table
    from rich.text import Text

    for section, lines in diagnosis.sections.items():
        table = Table(title=section, title_justify="left", title_style="bold", show_header=False, box=None)
        table.add_column(width=27, no_wrap=True)
        table.add_column(width=9)
        table.add_column(overflow="fold")
        for line in lines:
            table.add_row(f"  {line.name}", Text(line.state, STYLE[line.state]), Text(line.detail))
        console.print(table, "")
    verdict = "[green]usable[/]" if diagnosis.usable else "[bold red]not usable as it is: see the problems above[/]"
    console.print(f"sloth_backend is {verdict}")


def _versions() -> Iterator[Line]:
    """Python and the packages, each held against the range that is supported."""
    yield _version("python", platform.python_version(), PYTHON, required=True)
    for required, ranges in ((True, REQUIRED), (False, OPTIONAL)):
        for name, supported in ranges.items():
            try:
                yield _version(name, importlib.metadata.version(name), supported, required)
            except importlib.metadata.PackageNotFoundError:
                state: State = "problem" if required else "inactive"
                yield Line(name, state, f"not installed; supported: {_words(supported)}")


def _version(name: str, version: str, supported: Range, required: bool) -> Line:
    first, last = supported
    words = _words(supported)
    found = tuple(int(part) for part in re.findall(r"\d+", version)[:2])
    if found < first:
        return Line(name, "problem" if required else "inactive", f"{version} is too old; supported: {words}")
    newer = last is not None and found > last
    note = f"newer than what is tested ({words})" if newer else f"supported: {words}"
    return Line(name, "ok", f"{version}; {note}")


def _words(supported: Range) -> str:
    first, last = (".".join(map(str, end)) if end else None for end in supported)
    return f"{first} to {last}" if last else f"{first} or newer"


def _device() -> Iterator[Line]:
    """The accelerator, and whether Triton can run on it."""
    import torch

    from sloth_kernels.launch import interpreting

    if torch.cuda.is_available():
        found = torch.cuda.get_device_properties(0)
        detail = f"{found.name}, {found.total_memory / 2**30:.0f} GiB, compute capability {found.major}.{found.minor}"
        yield Line("CUDA", "ok", f"{detail}, CUDA {torch.version.cuda}, {torch.cuda.device_count()} visible")
    else:
        build = f"built for CUDA {torch.version.cuda}" if torch.version.cuda else "built without CUDA"
        yield Line("CUDA", "inactive", f"no CUDA device; torch is {build}. Ops run on their torch reference")
    if interpreting():
        yield Line("Triton interpreter", "ok", "TRITON_INTERPRET=1: kernels run in Python, slowly, for testing")


def _hosts() -> Iterator[Line]:
    """Which hosts understand the switch."""
    yield Line("own loop", "ok", "sloth_backend.optimize(model)")
    yield _trl()
    for host in ("axolotl", "accelerate"):
        yield Line(host, "inactive", "has no switch yet; sloth_backend.optimize(model) works in a loop of one's own")


def _trl() -> Line:
    if importlib.util.find_spec("trl") is None:
        return Line("trl", "inactive", "not installed; pip install 'sloth-backend[trl]'")
    from sloth_backend import autoload

    try:
        from trl import SFTTrainer
    except Exception as error:
        return Line("trl", "inactive", f"cannot be imported: {error!r}")
    status = autoload.status()
    for module, error in status.errors.items():
        return Line("trl", "problem", f"the switch does not fit this version ({module}): {error!r}")
    fallback = "; put `import sloth_backend` before `import trl` in the script"
    if os.environ.get(AUTOLOAD_SWITCH, "1") == "0":
        return Line("trl", "inactive", f"{AUTOLOAD_SWITCH}=0 keeps PyTorch from loading the switch{fallback}")
    points = importlib.metadata.entry_points(group="torch.backends")
    if not any(point.value.startswith("sloth_backend.") for point in points):
        return Line("trl", "inactive", f"sloth-backend is not installed as a package (pip install){fallback}")
    return Line("trl", "ok", f'{SFTTrainer.__name__}(..., backend="sloth")')


def _plugins(manager: SlothManager) -> Iterator[Line]:
    """The plugins in calling order with the hooks they answer, then those that are kept out."""
    for name in manager.names():
        callers = manager.pm.get_hookcallers(manager.pm.get_plugin(name)) or []
        yield Line(name, "ok", ", ".join(caller.name for caller in callers) or "answers no hook")
    for name in sorted(manager.disabled):
        yield Line(name, "inactive", "SLOTH_DISABLE names it")


def _owners(manager: SlothManager, hook: str) -> Iterator[tuple[Any, str]]:
    """Each item that plugins return from a collecting hook without arguments, with its plugin; first of a name wins."""
    seen: set[str] = set()
    for impl in reversed(getattr(manager.pm.hook, hook).get_hookimpls()):
        for item in impl.function() or ():
            if item.name not in seen:
                seen.add(item.name)
                yield item, impl.plugin_name


def _op(op: Op, plugin: str) -> Line:
    """Run the op's first case here and hold it against its reference."""
    import torch

    from sloth_kernels.launch import runs_triton

    device, dtype = _where()
    kernels = runs_triton(torch.empty(1, device=device, dtype=dtype))
    how = _how(op, dtype) if kernels else "torch reference, for want of a CUDA device"
    try:
        distance = _distance(op, dtype, device)
    except Exception as error:
        return Line(op.name, "problem", f"{how}, from {plugin}: fails with {error!r}")
    fits = distance <= 4 * op.tolerance[dtype]
    verdict = "agrees with its reference" if fits else f"is off its reference by {distance:.1e} of the largest value"
    return Line(op.name, "ok" if fits else "problem", f"{how}, from {plugin}: {verdict}")


def _how(op: Op, dtype: torch.dtype) -> str:
    """What runs the op where kernels can run."""
    engine = "Triton" if op.launches else "torch and the kernels of other ops"
    return f"{engine}, {dtype}".replace("torch.", "")


def _where() -> tuple[torch.device, torch.dtype]:
    """The device and dtype that training would use here."""
    import torch

    if not torch.cuda.is_available():
        return torch.device("cpu"), torch.float32
    return torch.device("cuda"), torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16


def _distance(op: Op, dtype: torch.dtype, device: torch.device) -> float:
    """The largest difference between op and reference on the op's first case, relative to the largest value."""
    import torch

    args, kwargs = op.cases()[0].make(dtype, device)

    def values(function: Callable[..., Any]) -> torch.Tensor:
        result = function(*args, **kwargs)
        tensors = result if isinstance(result, tuple) else (result,)
        return torch.cat([t.detach().double().flatten() for t in tensors])

    ours, reference = values(op.fn), values(op.reference)
    return ((ours - reference).abs().max() / reference.abs().max().clamp_min(1e-30)).item()


def _trial() -> Iterator[Line]:
    """Switch the backend on for a tiny Llama that checkpoints, and pass on what it says."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from sloth_backend import optimize, report

    device, dtype = _where()
    config = LlamaConfig(
        vocab_size=256, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4
    )
    try:
        model: Any = LlamaForCausalLM(config)
        model.to(device=device, dtype=dtype).train()
        model.gradient_checkpointing_enable()
        findings = report(optimize(model, config={"print_report": False})).findings
    except Exception as error:
        yield Line("tiny Llama", "problem", str(error))
        return
    for finding, count in summarize(findings):
        name, times = finding.capability or finding.plugin, f"{count} x " if count > 1 else ""
        yield Line(name, "ok" if finding.action == "changed" else "inactive", f"{times}{finding.reason}")
