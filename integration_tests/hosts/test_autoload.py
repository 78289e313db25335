"""The switch is there without an import of ours, whatever was imported first, and costs nothing where it is off."""

from __future__ import annotations

import importlib
import inspect
import json
import os
import subprocess
import sys
import types
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from integration_tests.child import ROOT, lines, run, without_optional
from sloth_backend import autoload

FAKE_HOST = {
    "fakehost/__init__.py": """
        def __getattr__(name):
            if name != "Trainer":
                raise AttributeError(name)
            from fakehost import trainer
            return trainer.Trainer
    """,
    "fakehost/trainer.py": """
        import fakelib
        EARLY = 1
        from fakehost import peer
        class Trainer:
            \"\"\"A host's class.\"\"\"
    """,
    "fakehost/peer.py": """
        import sys
        EARLY = sys.modules["fakehost.trainer"].EARLY
    """,
    "fakelib.py": """
        from sloth_backend import autoload
        autoload.install()
    """,
    "fakepatch.py": """
        calls = []
        def patch(module):
            calls.append(module.__name__)
            module.Trainer.patched = True
        def fail(module):
            raise LookupError("the host has moved")
    """,
}


@pytest.fixture
def host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], None]]:
    """A package whose ``fakehost.trainer`` is in HOSTS; call it with the name of the patch function."""
    for name, text in FAKE_HOST.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(inspect.cleandoc(text))
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(sys, "meta_path", [f for f in sys.meta_path if not isinstance(f, autoload.HostFinder)])
    for name in ("_patched", "_errors", "_watched"):
        monkeypatch.setattr(autoload, name, {})
    yield lambda function: monkeypatch.setattr(autoload, "HOSTS", {"fakehost.trainer": f"fakepatch:{function}"})
    for name in [name for name in sys.modules if name.startswith("fake")]:
        del sys.modules[name]


def assert_patched_once() -> types.ModuleType:
    module = sys.modules["fakehost.trainer"]
    assert module.Trainer.patched
    assert importlib.import_module("fakepatch").calls == ["fakehost.trainer"]
    assert autoload.status() == (True, ("fakehost.trainer",), {})
    return module


def test_a_host_imported_after_install_is_patched(host: Any) -> None:
    host("patch")
    autoload.install()
    importlib.import_module("fakehost.trainer")
    assert_patched_once()


def test_a_host_imported_before_install_is_patched(host: Any) -> None:
    host("patch")
    sys.modules["fakelib"] = types.ModuleType("fakelib")  # this host does not import what installs
    importlib.import_module("fakehost.trainer")
    assert not hasattr(sys.modules["fakehost.trainer"].Trainer, "patched")
    autoload.install()
    assert_patched_once()


@pytest.mark.parametrize("statement", ["from fakehost import Trainer", "from fakehost.trainer import Trainer"])
def test_a_host_whose_body_triggers_install_is_patched_once_it_is_complete(host: Any, statement: str) -> None:
    host("patch")
    names: dict[str, Any] = {}
    exec(statement, names)
    assert names["Trainer"].patched
    assert sys.modules["fakehost.peer"].EARLY == 1
    assert type(assert_patched_once()) is types.ModuleType


def test_the_source_of_a_patched_host_is_found(host: Any) -> None:
    host("patch")
    autoload.install()
    module = importlib.import_module("fakehost.trainer")
    assert "import fakelib" in inspect.getsource(module)
    assert "A host's class" in inspect.getsource(module.Trainer)
    assert type(module.__loader__).__name__ == type(module.__spec__.loader).__name__ == "SourceFileLoader"


def test_the_loader_answers_like_the_host_s_own_before_the_import(host: Any) -> None:
    host("patch")
    autoload.install()
    spec = importlib.util.find_spec("fakehost.trainer")
    assert spec is not None
    assert "import fakelib" in spec.loader.get_source("fakehost.trainer")


def test_install_twice_is_harmless(host: Any) -> None:
    host("patch")
    autoload.install()
    autoload.install()
    importlib.import_module("fakehost.trainer")
    autoload.install()
    assert_patched_once()
    assert sum(isinstance(finder, autoload.HostFinder) for finder in sys.meta_path) == 1


def test_a_reloaded_host_is_patched_again(host: Any) -> None:
    host("patch")
    autoload.install()
    module = importlib.import_module("fakehost.trainer")
    assert importlib.reload(module).Trainer.patched


def test_a_host_that_is_not_installed_stays_missing(host: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(autoload, "HOSTS", {"fakehost.nowhere": "fakepatch:patch"})
    autoload.install()
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module("fakehost.nowhere")


@pytest.mark.parametrize("action", ["default", "error"])
def test_a_failing_patch_warns_and_does_not_break_the_import(host: Any, action: str) -> None:
    host("fail")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter(action)  # pyright: ignore[reportArgumentType]
        names: dict[str, Any] = {}
        exec("from fakehost import Trainer", names)
    assert not hasattr(names["Trainer"], "patched")
    assert isinstance(autoload.status().errors["fakehost.trainer"], LookupError)
    assert action == "error" or "the host has moved" in str(caught[0].message)


def test_a_failing_install_is_kept_and_not_raised(host: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    host("patch")
    monkeypatch.setattr(sys, "meta_path", tuple(sys.meta_path))
    with pytest.warns(RuntimeWarning, match="will not work here"):
        autoload.install()
    assert isinstance(autoload.status().errors["install"], AttributeError)
    assert not autoload.status().installed


CHECK = """
    import inspect, sys, types
    from trl import SFTConfig, SFTTrainer
    module = sys.modules["trl.trainer.sft_trainer"]
    assert "backend" in inspect.signature(SFTTrainer).parameters
    assert "backend" in inspect.signature(SFTConfig).parameters
    assert type(module) is type(sys.modules["trl.trainer.sft_config"]) is types.ModuleType
    assert "class SFTTrainer(" in inspect.getsource(module)
    assert inspect.getsource(SFTTrainer.__init__).lstrip().startswith("def __init__")
    from sloth_backend import autoload
    assert autoload.status().errors == {}, autoload.status()
"""
LIGHT = """
    import sys
    heavy = {"sloth_backend.phases", "sloth_backend.config", "sloth_kernels", "pluggy"} & sys.modules.keys()
    assert not heavy, heavy
"""


@pytest.mark.parametrize("first", ["from trl import SFTTrainer", "from trl import SFTConfig"])
def test_trl_has_the_switch_although_it_is_imported_first(first: str, lean: dict[str, str]) -> None:
    """TRL's module then imports torch, so it is half-built when the hook is installed."""
    run(lines(first, CHECK, LIGHT), lean)


def test_torch_can_be_imported_where_the_hook_cannot_be_installed(lean: dict[str, str]) -> None:
    script = """
        import sys
        class Broken(list):
            def insert(self, *args):
                raise OSError("no")
        sys.meta_path = Broken(sys.meta_path)
        import torch
        from sloth_backend import autoload
        print(torch.ones(2).sum().item(), autoload.status().errors)
    """
    assert run(script, lean).stdout == "2.0 {'install': OSError('no')}\n"


BARE = """
    import sys
    class Missing:
        def find_spec(self, name, path=None, target=None):
            if name.partition(".")[0] in sys.argv[1].split(","):
                raise ModuleNotFoundError(f"No module named {name!r}", name=name)
    sys.meta_path.insert(0, Missing())
"""
DEPENDENCIES = "pluggy,pydantic,pydantic_core,rich,typer,triton,transformers,accelerate,peft,trl,sentencepiece"


def test_torch_can_be_imported_where_no_dependency_is(lean: dict[str, str]) -> None:
    """As in the isolated environments in which packages are built, where the path alone may lead here."""
    script = """
        import warnings
        warnings.simplefilter("error")
        import torch
        from sloth_backend import autoload
        print(torch.ones(2).sum().item(), autoload.status())
    """
    output = run(lines(BARE, script), {**lean, "SLOTH_BACKEND": "1"}, DEPENDENCIES).stdout
    assert output == "2.0 Status(installed=True, patched=(), errors={})\n"


def test_hosts_can_be_imported_where_our_own_dependencies_are_missing(lean: dict[str, str]) -> None:
    """The error is that of whoever asks for the backend, at the time that they do."""
    script = """
        import accelerate
        from transformers import Trainer, TrainingArguments
        from sloth_backend import autoload
        print(autoload.status().errors)
        try:
            accelerate.Accelerator(cpu=True).prepare(1)
            Trainer(backend="sloth")
        except ModuleNotFoundError as error:
            print(error.name)
    """
    output = run(lines(BARE, script), {**lean, "SLOTH_BACKEND": "1"}, "pluggy").stdout
    assert output == "{}\npluggy\n"


def test_the_hook_costs_less_than_two_milliseconds(lean: dict[str, str], tmp_path: Path) -> None:
    """What ``import torch`` pays for it, from compiled files as pip installs them: the best of many."""
    script = """
        import importlib, sys, time
        import torch
        sys.dont_write_bytecode, sys.pycache_prefix = False, sys.argv[1]
        took = []
        for _ in range(20):
            for name in [name for name in sys.modules if name.startswith("sloth_")]:
                del sys.modules[name]
            sys.meta_path[:] = [finder for finder in sys.meta_path if type(finder).__name__ != "HostFinder"]
            start = time.perf_counter()
            importlib.import_module("sloth_backend.autoload").install()
            took.append(time.perf_counter() - start)
        print(min(took))
    """
    assert float(run(script, lean, tmp_path).stdout) < 2e-3


SURVEY = """
    import hashlib, inspect, json, os, sys, tempfile, types
    import peft, torch, transformers
    import trl.trainer.sft_trainer as sft
    from integration_tests import tiny

    def describe(value):
        value = getattr(value, "__func__", value)
        if isinstance(value, types.FunctionType):
            codes = [f.__code__ for f in (value, inspect.unwrap(value))]
            digest = hashlib.sha1(repr([(code.co_code, code.co_names) for code in codes]).encode()).hexdigest()
            return f"{value.__qualname__} {digest}"
        if isinstance(value, (bool, int, float, str, type(None))):
            return repr(value)
        if isinstance(value, (dict, list, tuple, set, frozenset)):
            return f"{type(value).__name__} {sorted(map(str, value))}"
        return getattr(value, "__qualname__", None) or type(value).__qualname__

    owners = {
        "SFTTrainer": sft.SFTTrainer, "SFTConfig": sft.SFTConfig, "trl.sft_trainer": sft, "peft": peft,
        "Trainer": transformers.Trainer, "TrainingArguments": transformers.TrainingArguments,
        "PreTrainedModel": transformers.PreTrainedModel, "Llama": transformers.LlamaForCausalLM,
        "Module": torch.nn.Module, "Linear": torch.nn.Linear, "lora.Linear": peft.tuners.lora.Linear,
        "modeling_llama": sys.modules["transformers.models.llama.modeling_llama"],
    }
    ignored = {"__builtins__", "__cached__", "_abc_impl"}
    survey = {
        owner: {name: describe(value) for name, value in vars(thing).items() if name not in ignored}
        for owner, thing in owners.items()
    }

    folder = sys.argv[1]
    saved = os.path.join(folder, "training_args.bin")
    tokenizer = tiny.make_tokenizer()
    options = dict(use_cpu=True, bf16=False, report_to="none", logging_steps=1, max_steps=3, save_strategy="no")
    args = sft.SFTConfig(folder, per_device_train_batch_size=2, learning_rate=1e-2, disable_tqdm=True, **options)
    trainer = sft.SFTTrainer(
        tiny.make_model(tokenizer), args, train_dataset=tiny.make_dataset(), processing_class=tokenizer
    )
    trainer.train()
    timeless = lambda log: {k: v for k, v in log.items() if "second" not in k and "runtime" not in k}
    logs = list(map(timeless, trainer.state.log_history))
    if os.path.exists(saved):
        backend = vars(torch.load(saved, weights_only=False))["backend"]
    else:
        backend = {"kernels": False}
        torch.save(sft.SFTConfig(folder, backend=backend, **options), saved)
    print("\\n" + json.dumps({"survey": survey, "logs": logs, "backend": backend}))
"""

OURS = {
    ("Trainer", "__init__"),
    ("SFTTrainer", "__init__"),
    *(("SFTConfig", name) for name in ("__init__", "__repr__", "__eq__", "__dataclass_fields__")),
    ("SFTConfig", "_VALID_DICT_FIELDS"),
    *(("TrainingArguments", name) for name in ("__init__", "__eq__", "__annotations__", "__dataclass_fields__")),
    *(("TrainingArguments", name) for name in ("__post_init__", "_VALID_DICT_FIELDS", "backend")),
}
"""All that differs in a process with the package installed: the trainers' keyword and the configurations' field."""


FIRST_TRANSFORMERS = "from transformers import TrainingArguments"
IMPORTED_BY_HAND = """
    import inspect, sys
    assert not any(name.startswith("sloth") for name in sys.modules)
    assert "backend" not in inspect.signature(sys.modules["trl.trainer.sft_trainer"].SFTTrainer).parameters
    import sloth_backend
"""


def test_without_the_switch_nothing_changes(lean: dict[str, str], tmp_path: Path) -> None:
    """Classes, modules and the numbers of a training run; and a config saved with the field loads without it.

    The first child imports transformers before TRL. The second has opted out of torch's autoload, until it imports
    the package by hand.
    """
    scripts = {"1": lines(FIRST_TRANSFORMERS, SURVEY, LIGHT, CHECK), "0": lines(SURVEY, IMPORTED_BY_HAND, CHECK)}
    outputs = (
        run(script, {**lean, "TORCH_DEVICE_BACKEND_AUTOLOAD": flag}, tmp_path).stdout.splitlines()[-1]
        for flag, script in scripts.items()
    )
    with_us, without = map(json.loads, outputs)
    assert with_us["survey"].keys() == without["survey"].keys()
    differing = {
        (owner, name)
        for owner, theirs in without["survey"].items()
        for name in theirs.keys() | with_us["survey"][owner].keys()
        if theirs.get(name) != with_us["survey"][owner].get(name)
    }
    assert differing == OURS
    assert len(without["logs"]) == 4
    assert with_us["logs"] == without["logs"]
    assert without["backend"] == {"kernels": False}


def test_the_wheel_carries_the_switch(tmp_path: Path) -> None:
    """Installed by pip, with no path to this repository."""
    pytest.importorskip("hatchling")
    target = tmp_path / "site"
    pip = [sys.executable, "-m", "pip", "install", "--no-deps", "--no-build-isolation", "--target", target, ROOT]
    subprocess.run(list(map(str, pip)), check=True, capture_output=True)
    script = """
        from trl import SFTTrainer
        import inspect, sloth_backend
        print("backend" in inspect.signature(SFTTrainer).parameters, sloth_backend.__file__)
    """
    (tmp_path / "lean").mkdir()
    output = run(script, without_optional({**os.environ, "PYTHONPATH": str(target)}, tmp_path / "lean")).stdout
    assert output.split() == ["True", str(target / "sloth_backend" / "__init__.py")]


def test_beside_a_library_that_writes_the_classes_anew_they_stay_as_they_are(lean: dict[str, str]) -> None:
    """It copies the source of ``__init__``, which has no switch, and calls the copy with what the signature has."""
    script = """
        import sys, types
        sys.modules["unsloth"] = types.ModuleType("unsloth")
        import inspect
        from trl import SFTTrainer
        from sloth_backend import autoload
        assert "backend" not in inspect.signature(SFTTrainer).parameters
        assert autoload.status().installed and not autoload.status().errors
        """
    run(script, lean)
