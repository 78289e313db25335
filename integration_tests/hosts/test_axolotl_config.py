"""The keys in Axolotl's configuration: what switches the backend on, what is set, what is refused."""

from __future__ import annotations

import json
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("axolotl")

import yaml
from axolotl.integrations.base import PluginManager
from pydantic import ValidationError

from integration_tests.docs.snippets import snippet
from integration_tests.hosts import axolotl_runs
from integration_tests.hosts.axolotl_runs import options
from integration_tests.hosts.recorder import Recorder
from sloth_backend import SlothConfig, autoload
from sloth_backend.hosts import axolotl_config
from sloth_backend.hosts.axolotl_config import OWN_LORA_KERNELS, PLUGIN, is_asked, options_of

SNIPPETS = [
    snippet("docs/hosts-axolotl.md", "use_unsloth:"),
    snippet("docs/hosts-axolotl.md", "use_sloth:"),
    snippet("docs/hosts-axolotl.md", "plugins:"),
]
LIGER, CCE = "axolotl.integrations.liger.LigerPlugin", "axolotl.integrations.cut_cross_entropy.CutCrossEntropyPlugin"


@pytest.fixture(autouse=True)
def _plugins_of_others_go() -> Iterator[None]:
    """Axolotl keeps plugins for the life of the process, those of a file that was refused too."""
    yield
    plugins = PluginManager.get_instance().plugins
    for name in (LIGER, CCE):
        plugins.pop(name, None)


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ({}, False),
        ({"use_sloth": False}, False),
        ({"use_sloth": None}, False),
        ({"sloth": False}, False),
        ({"plugins": [LIGER]}, False),
        ({"use_sloth": True}, True),
        ({"use_unsloth": True}, True),
        ({"sloth": {}}, True),
        ({"sloth": {"kernels": False}}, True),
        ({"sloth": True}, True),
        ({"plugins": [PLUGIN]}, True),
        ({"plugins": [PLUGIN.replace(".SlothPlugin", ":SlothPlugin")]}, True),
        ({"plugins": [PLUGIN], "use_sloth": False}, False),
        ({"sloth": {"kernels": False}, "use_unsloth": False}, False),
    ],
    ids=str,
)
def test_what_switches_the_backend_on(keys: dict[str, Any], expected: bool) -> None:
    assert is_asked(keys) is expected


@pytest.mark.parametrize("switch", [{"use_sloth": True}, {"use_unsloth": True}, {"plugins": [PLUGIN]}, {"sloth": {}}])
def test_twins_lead_to_the_same_configuration(
    switch: dict[str, Any], model_folder: Path, recorder: Recorder, tmp_path: Path
) -> None:
    cfg = axolotl_runs.load(options(tmp_path, model_folder, **switch))
    assert cfg.plugins == [PLUGIN]
    assert {key: cfg[key] for key in OWN_LORA_KERNELS} == dict.fromkeys(OWN_LORA_KERNELS, False)
    assert is_asked(cfg)
    assert {key: cfg[key] for key in switch} == switch


def test_options_reach_the_run(model_folder: Path, recorder: Recorder, tmp_path: Path) -> None:
    chosen = {"kernels": ["rope", "glu"], "memory": "least", "offload_keep_last": 2}
    cfg = axolotl_runs.load(options(tmp_path, model_folder, use_unsloth=True, sloth=chosen))
    assert options_of(cfg) == SlothConfig(kernels=("rope", "glu"), memory="least", offload_keep_last=2)
    json.dumps(cfg.to_dict()["sloth"])


@pytest.mark.parametrize("text", SNIPPETS)
def test_the_configurations_of_the_page(text: str, model_folder: Path, recorder: Recorder, tmp_path: Path) -> None:
    said = yaml.safe_load(text)
    cfg = axolotl_runs.load(options(tmp_path, model_folder, **said))
    assert is_asked(cfg)
    assert PLUGIN in cfg.plugins
    assert options_of(cfg) == SlothConfig.from_mapping(said.get("sloth", {}))


def test_unsloth_s_checkpointing_is_mapped(model_folder: Path, recorder: Recorder, tmp_path: Path) -> None:
    given = options(tmp_path, model_folder, use_unsloth=True, gradient_checkpointing="unsloth", lora_o_kernel=True)
    cfg = axolotl_runs.load(given)
    assert cfg.gradient_checkpointing is True
    assert cfg.lora_o_kernel is False


def test_axolotl_s_lora_kernels_stay_where_ours_are_off(model_folder: Path, recorder: Recorder, tmp_path: Path) -> None:
    stock = axolotl_runs.load(options(tmp_path, model_folder))
    cfg = axolotl_runs.load(options(tmp_path, model_folder, use_sloth=True, sloth={"kernels": False}))
    assert [cfg[key] for key in OWN_LORA_KERNELS] == [stock[key] for key in OWN_LORA_KERNELS]


def test_without_a_key_nothing_changes(model_folder: Path, tmp_path: Path) -> None:
    axolotl_runs.load(options(tmp_path, model_folder, use_sloth=True))  # Axolotl keeps the plugin for the process
    given = options(tmp_path, model_folder, adapter=None, lora_r=None)
    plain, off = axolotl_runs.load(given), axolotl_runs.load({**given, "use_sloth": False})
    for cfg in (plain, off):
        assert not cfg.plugins
        assert not any(key in cfg for key in OWN_LORA_KERNELS)
    own = {"axolotl_config_path", "use_sloth"}
    assert plain.keys() - own == off.keys() - own


def refused(tmp_path: Path, model: Path, **changes: Any) -> tuple[str, dict[str, str]]:
    """The whole text of the error with which a configuration is refused, and its messages by key."""
    with pytest.raises(ValidationError) as error:
        axolotl_runs.load(options(tmp_path, model, **changes))
    return str(error.value), {str(item["loc"][0]): item["msg"] for item in error.value.errors()}


CONFLICTS = {
    "cut_cross_entropy": (True, "Remove `cut_cross_entropy`, or set `sloth: {kernels: false}`"),
    "liger_rope": (True, "Remove `liger_rope`, or set `sloth: {kernels: false}`"),
    "chunked_cross_entropy": (True, "Remove `chunked_cross_entropy`"),
    "flash_attn_cross_entropy": (True, "Remove `flash_attn_cross_entropy`"),
    "tiled_mlp": (True, "Remove `tiled_mlp`"),
    "torch_compile": (True, "Remove `torch_compile`"),
    "use_kernels": (True, "Remove `use_kernels`"),
    "layer_offloading": (True, "Remove `layer_offloading`"),
    "activation_offloading": ("legacy", "Remove `activation_offloading`, or set `sloth: {checkpointing: host}`"),
    "unsloth_lora_mlp": (True, "remove it, `use_unsloth: true` does what it did"),
    "gradient_checkpointing": ("offload", "Set it to true, or set `sloth: {checkpointing: host}`"),
}


def test_all_conflicts_are_refused_together(model_folder: Path, recorder: Recorder, tmp_path: Path) -> None:
    given = {key: value for key, (value, _) in CONFLICTS.items()}
    text, found = refused(tmp_path, model_folder, use_unsloth=True, plugins=[LIGER, CCE], **given)
    assert found.keys() == {*CONFLICTS, "plugins"}
    for key, (_, remedy) in CONFLICTS.items():
        assert remedy in found[key]
    assert text.startswith(f"{len(CONFLICTS) + 2} validation errors for AxolotlInputConfig")
    assert f"Remove {LIGER} from `plugins`" in text
    assert f"Remove {CCE} from `plugins`" in text
    assert "with `use_unsloth: true` (kernels: true)" in found["tiled_mlp"]
    assert recorder.calls == []


def test_the_error_on_the_page(model_folder: Path, recorder: Recorder, tmp_path: Path) -> None:
    text, _ = refused(tmp_path, model_folder, use_unsloth=True, tiled_mlp=True, gradient_checkpointing="offload")
    assert f"{text}\n" == snippet("docs/hosts-axolotl.md", "2 validation errors")


def test_the_remedies_of_conflicts_work() -> None:
    given = {key: value for key, (value, _) in CONFLICTS.items() if not key.startswith("unsloth")}
    peace = {"use_sloth": True, "plugins": [LIGER, CCE], "sloth": {"kernels": False, "checkpointing": "host"}}
    assert axolotl_config.problems({**given, **peace}) == []
    assert axolotl_config.problems({"use_sloth": True, "sloth": {"kernels": []}, "plugins": [LIGER]}) == []
    assert len(axolotl_config.problems({"use_sloth": True, "tiled_mlp": True, "sloth": {"kernels": ["rope"]}})) == 1


@pytest.mark.parametrize(
    ("keys", "key", "message"),
    [
        ({"sloth": {"kernel": False}}, "sloth", "unknown option 'kernel'; did you mean 'kernels'?"),
        ({"sloth": {"kernels": ["rms_nrm"]}}, "sloth", "unknown op 'rms_nrm'"),
        ({"sloth": {"memory": "some"}}, "sloth", "option 'memory' got 'some': Input should be 'auto', 'least'"),
        ({"sloth": "fast"}, "sloth", "expected a mapping of options"),
        ({"use_sloth": "fast"}, "use_sloth", "expected true or false; options go under `sloth:`"),
        ({"use_sloth": False, "use_unsloth": True}, "use_unsloth", "contradicts `use_sloth`, its twin"),
    ],
)
def test_wrong_options_are_named(
    keys: dict[str, Any], key: str, message: str, model_folder: Path, recorder: Recorder, tmp_path: Path
) -> None:
    text, found = refused(tmp_path, model_folder, **keys)
    assert message in found[key]
    assert text.startswith("1 validation error for AxolotlInputConfig")


def test_problems_of_plugins_are_raised_with_axolotl_s_own(
    model_folder: Path, recorder: Recorder, tmp_path: Path
) -> None:
    recorder.problems.append("a plugin's own problem")
    _, found = refused(tmp_path, model_folder, use_sloth=True)
    assert found == {"sloth": "a plugin's own problem"}


def test_an_axolotl_that_has_moved_is_refused_whole() -> None:
    moved: Any = types.ModuleType("axolotl.cli.config")
    with pytest.raises(RuntimeError, match=r"has no prepare_plugins\(cfg\); name .*SlothPlugin under `plugins:`"):
        axolotl_config.patch_config(moved)
    moved.prepare_plugins = other = lambda config: config
    with pytest.raises(RuntimeError, match="has no prepare_plugins"):
        axolotl_config.patch_config(moved)
    assert moved.prepare_plugins is other


def test_the_switch_is_in_place_once() -> None:
    from axolotl.cli import config

    patched = config.prepare_plugins
    axolotl_config.patch_config(config)
    assert config.prepare_plugins is patched
    assert "axolotl.cli.config" in autoload.status().patched
