"""What is said of a way to spread a model that cannot carry a path, without any process."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

import sloth_backend
from integration_tests import tiny
from integration_tests.several_gpus.cases import Case, make_model, quantized
from sloth_backend import phases
from sloth_backend.config import SlothConfig
from sloth_backend.findings import Edits, Finding
from sloth_backend.hosts.sharding import sharding_of, sharding_problems, take_over_checkpointing
from sloth_backend.run import BY_MODULE, REASON_BY_MODULE, Run
from sloth_plugins.layer_programs import planner as planning
from sloth_plugins.layer_programs.sharded import STREAMS_SHARE
from sloth_plugins.program_layers import planner_of

NONE = SlothConfig(kernels=False)


def accelerator(
    kind: str = "FSDP", version: int = 2, computes: Any = None, stage: int = 3, json: dict[str, Any] | None = None
) -> Any:
    """What the adapters ask of an Accelerator."""
    policy = SimpleNamespace(param_dtype=computes)
    state = SimpleNamespace(
        fsdp_plugin=SimpleNamespace(mixed_precision_policy=policy, activation_checkpointing=True),
        deepspeed_plugin=SimpleNamespace(zero_stage=stage, deepspeed_config=json or {}),
    )
    return SimpleNamespace(distributed_type=SimpleNamespace(name=kind), state=state, is_fsdp2=version == 2)


def test_the_ways_have_names() -> None:
    assert sharding_of(accelerator("MULTI_GPU")) is None
    assert [sharding_of(accelerator(version=v)) for v in (1, 2)] == ["fsdp1", "fsdp2"]
    assert [sharding_of(accelerator("DEEPSPEED", stage=n)) for n in (1, 2, 3)] == ["zero-1", "zero-2", "zero-3"]


def test_flattened_parameters() -> None:
    assert "fsdp_version: 2" in sharding_problems(accelerator(version=1), SlothConfig(), None)[0]
    assert sharding_problems(accelerator(version=1), NONE, None) == []


def test_packed_weights_that_a_cast_would_destroy() -> None:
    sizes = {"hidden_size": 64, "intermediate_size": 128}
    model = quantized(tiny.make_model(tiny.make_tokenizer(), **sizes))
    (problem,) = sharding_problems(accelerator(computes=torch.bfloat16), SlothConfig(), model)
    assert "bnb_4bit_quant_storage=torch.bfloat16" in problem
    for computes in (None, torch.float32):
        assert sharding_problems(accelerator(computes=computes), SlothConfig(), model) == []


def test_a_rate_that_deepspeed_s_own_optimizer_would_not_get() -> None:
    rate, own = SlothConfig(embedding_learning_rate=1e-5), accelerator("DEEPSPEED", json={"optimizer": {}})
    (problem,) = sharding_problems(own, rate, None)
    assert "leave `optimizer` out" in problem
    assert sharding_problems(own, SlothConfig(), None) == []
    assert sharding_problems(accelerator("DEEPSPEED"), rate, None) == []


@pytest.mark.parametrize("method", ["full", "lora"])
def test_parameters_gathered_module_by_module(method: str) -> None:
    """Modules still run on their ops; what would read the parameters of others says that it steps aside."""
    model = make_model(Case("zero", method=method), tiny.make_tokenizer())
    run = Run("user", SlothConfig(print_report=False), sharding=BY_MODULE)
    session = phases.begin(run, model)
    phases.before_train(session, model)
    report = sloth_backend.report(model)
    aside = {finding.capability for finding in report.of(action="skipped") if finding.reason == REASON_BY_MODULE}
    assert aside == {"layer_program", "linear_cross_entropy"} | ({"lora"} if method == "lora" else set())
    assert not any(report.of(action="changed", capability=capability) for capability in aside)
    assert report.of(action="changed", capability="rms_norm")


def test_parameters_partitioned_before_they_are_looked_at() -> None:
    """What transformers loads under ZeRO-3: each parameter is empty and knows its shape."""
    model = make_model(Case("loaded"), tiny.make_tokenizer())
    for parameter in model.parameters():
        cast("Any", parameter).ds_shape, parameter.data = parameter.shape, torch.empty(0)
    session = phases.begin(Run("user", SlothConfig(print_report=False), sharding=BY_MODULE), model)
    phases.before_train(session, model)
    report = sloth_backend.report(model)
    assert len(report.of(action="changed", capability="rms_norm")) == 5
    assert not report.of(action="skipped", capability="rms_norm")
    (documents,) = report.of(capability="documents")
    assert documents.action == "skipped"
    assert "spread over processes already" in documents.reason


def test_checkpointing_that_some_layers_still_need() -> None:
    fsdp, edits = accelerator(), Edits()
    found = [Finding(a, "layer", "", "layer_program") for a in ("changed", "skipped")]
    take_over_checkpointing(fsdp, found, edits)
    assert found[-1].action == "warned"
    assert fsdp.state.fsdp_plugin.activation_checkpointing
    found = found[:1]
    take_over_checkpointing(fsdp, found, edits)
    assert found[-1].action == "changed"
    assert not fsdp.state.fsdp_plugin.activation_checkpointing
    edits.rollback()
    assert fsdp.state.fsdp_plugin.activation_checkpointing


def test_recordings_are_not_made_of_gathered_parameters() -> None:
    """A recording reads parameters where they were."""
    model = make_model(Case("recorded"), tiny.make_tokenizer())
    phases.before_train(phases.begin(Run("user", SlothConfig(print_report=False), sharding="fsdp2"), model), model)
    assert planner_of(model).is_sharded()
    sloth_backend.optimize(model, config={"print_report": False})
    assert not planner_of(model).is_sharded()


def test_streams_that_gather_keep_memory_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """A plan leaves them the embedding and the head, whole, layers, and a share for gaps."""
    monkeypatch.setattr(planning, "device_budget", lambda *args: 1 << 30)
    model = make_model(Case("budgeted"), tiny.make_tokenizer())
    phases.before_train(phases.begin(Run("user", SlothConfig(print_report=False), sharding="fsdp2"), model), model)
    device = torch.device("cpu")
    budget = planner_of(model)._budget(device)
    ends = {id(end.weight): end.weight.numel() for end in (model.get_input_embeddings(), model.get_output_embeddings())}
    assert budget is not None
    assert budget < (1 << 30) * (1 - STREAMS_SHARE) - 2 * sum(ends.values())
    sloth_backend.optimize(model, config={"print_report": False})
    assert planner_of(model)._budget(device) == 1 << 30
