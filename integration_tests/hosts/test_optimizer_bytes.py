"""What the optimizer will keep on the device, as the memory plan is told."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import pytest
import torch
from transformers.training_args import OptimizerNames
from trl import SFTConfig, SFTTrainer

from integration_tests import tiny
from sloth_backend.optimizers import FIXED_BYTES, PAGED, STATES, state_bytes
from sloth_backend.phases import find_session

NAMES = {name.value for name in OptimizerNames}


def parameters(dtype: torch.dtype, numel: int = 8192) -> list[torch.nn.Parameter]:
    return [torch.nn.Parameter(torch.ones(numel, dtype=dtype)), torch.nn.Parameter(torch.ones(99), requires_grad=False)]


def held(optimizer: torch.optim.Optimizer, trained: torch.nn.Parameter) -> float:
    """Bytes of state for each entry after one step."""
    trained.grad = torch.ones_like(trained)
    optimizer.step()
    tensors = [value for value in optimizer.state[trained].values() if isinstance(value, torch.Tensor)]
    return sum(tensor.nbytes for tensor in tensors if tensor.numel() > 1) / trained.numel()


def test_the_tables_name_optimizers_that_exist() -> None:
    assert {*FIXED_BYTES, *STATES} <= NAMES
    assert any(name.startswith(PAGED) for name in NAMES)


@pytest.mark.parametrize(
    ("name", "make", "dtype"),
    [
        ("adamw_torch", torch.optim.AdamW, torch.float32),
        ("adamw_torch_fused", torch.optim.AdamW, torch.bfloat16),
        ("adagrad", torch.optim.Adagrad, torch.float32),
        ("rmsprop", torch.optim.RMSprop, torch.bfloat16),
        ("sgd", torch.optim.SGD, torch.float32),
        ("adamw_8bit", bnb.optim.AdamW8bit, torch.float32),
        ("adamw_bnb_8bit", bnb.optim.AdamW8bit, torch.bfloat16),
        ("lion_8bit", bnb.optim.Lion8bit, torch.float32),
        ("lion_32bit", bnb.optim.Lion, torch.bfloat16),
    ],
)
def test_it_is_what_the_optimizer_holds(name: str, make: Any, dtype: torch.dtype) -> None:
    trained, frozen = parameters(dtype)
    try:
        measured = held(make([trained], lr=1e-3), trained)
    except (RuntimeError, NotImplementedError, AttributeError) as error:
        pytest.skip(f"does not run on this CPU: {error}")
    told = state_bytes(name, [trained, frozen])
    # 8-bit states come with a table of 256 values for each parameter, which is much for small ones.
    assert measured <= told + 0.3
    assert told <= measured * 1.06


def test_mixed_dtypes_are_averaged_and_unknown_names_count_as_adam() -> None:
    mixed = [parameters(torch.float32)[0], parameters(torch.bfloat16)[0]]
    assert state_bytes("adamw_torch", mixed) == state_bytes("made_up", mixed) == 6.0
    assert state_bytes("adamw_torch", []) == 8.0


@pytest.mark.parametrize(
    ("options", "told"),
    [({}, 8.0), ({"optim": "paged_adamw_8bit"}, 0.0), ({"optim": "adafactor"}, 0.0), ({"optim": "lion_32bit"}, 4.0)],
)
def test_trl_says_what_its_optimizer_keeps(options: dict[str, Any], told: float, tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, **options)
    session = find_session(trainer.model)
    assert session is not None
    assert session.run.optimizer_bytes == told


def test_8_bit_optimizers_keep_embeddings_in_32_bits(tmp_path: Path) -> None:
    """As the Trainer asks bitsandbytes to, for every ``nn.Embedding``."""
    trainer = make_trainer(tmp_path, optim="adamw_8bit")
    embedding = trainer.model.get_input_embeddings().weight.numel()
    rest = sum(p.numel() for p in trainer.model.parameters()) - embedding
    session = find_session(trainer.model)
    assert session is not None
    assert session.run.optimizer_bytes == pytest.approx((8.0 * embedding + 2.1 * rest) / (embedding + rest))


def test_an_optimizer_of_the_users_making_counts_as_adam(tmp_path: Path) -> None:
    model = tiny.make_model(tiny.make_tokenizer())
    own = torch.optim.SGD(model.parameters(), lr=0.1)
    trainer = make_trainer(tmp_path, model, optimizers=(own, None), optim="sgd")
    session = find_session(trainer.model)
    assert session is not None
    assert session.run.optimizer_bytes == 8.0


def make_trainer(folder: Path, model: Any = None, optimizers: Any = (None, None), **options: Any) -> Any:
    tokenizer = tiny.make_tokenizer()
    settings = {"report_to": "none", "use_cpu": True, "bf16": False, **options}
    return SFTTrainer(
        model or tiny.make_model(tokenizer),
        SFTConfig(str(folder), **settings),
        train_dataset=tiny.make_dataset(),
        processing_class=tokenizer,
        optimizers=optimizers,
        backend={"print_report": False},  # pyright: ignore[reportCallIssue]
    )
