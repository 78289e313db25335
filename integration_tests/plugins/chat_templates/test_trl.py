"""TRL's assistant_only_loss trains on the assistant's tokens, end of turn included, and on nothing else."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset
from trl import SFTConfig, SFTTrainer, maybe_convert_to_chatml

import sloth_backend
from integration_tests import tiny
from integration_tests.plugins.chat_templates.fixtures import CONVERSATIONS, HI
from integration_tests.plugins.chat_templates.test_rows import SHAREGPT, sharegpt
from sloth_plugins.chat_templates import applied
from sloth_plugins.chat_templates.formats import FORMATS

MESSAGES = [*CONVERSATIONS["ended"], *CONVERSATIONS["ended"]]


@pytest.fixture(autouse=True)
def _no_logs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")


def trained_labels(tokenizer: Any, rows: list[dict[str, Any]], folder: Path, model: Any, **options: Any) -> str:
    """The labels of the first batch as text, after one step through SFTTrainer with the backend on."""
    arguments = SFTConfig(
        output_dir=str(folder),
        max_steps=1,
        per_device_train_batch_size=1,
        assistant_only_loss=True,
        max_length=None,
        report_to=[],
        use_cpu=True,
        bf16=False,
        save_strategy="no",
        disable_tqdm=True,
        **options,
    )
    trainer = SFTTrainer(
        model,
        arguments,
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
        backend={"print_report": False},
    )
    batch = next(iter(trainer.get_train_dataloader()))
    trainer.train()
    return tokenizer.decode(batch["labels"][batch["labels"] != -100])


@pytest.mark.parametrize("name", ["chatml", "llama-3.1", "mistral", "gemma-3", "phi-3", "vicuna", "alpaca"])
def test_labels_are_the_answers(name: str, tmp_path: Path) -> None:
    tokenizer = tiny.make_tokenizer()
    model = tiny.make_model(tokenizer, max_position_embeddings=512)
    sloth_backend.get_chat_template(tokenizer, name, model=model)
    space = " " if name in ("mistral", "vicuna") else ""
    stop = applied(tokenizer).stop  # pyright: ignore[reportOptionalMemberAccess]
    labels = trained_labels(tokenizer, [{"messages": MESSAGES}], tmp_path, model)
    assert labels == f"{space}{HI}{stop}" * 2


def test_sharegpt_rows(tmp_path: Path) -> None:
    tokenizer = tiny.make_tokenizer()
    model = tiny.make_model(tokenizer)
    sloth_backend.get_chat_template(tokenizer, "chatml", mapping=SHAREGPT, map_eos=True, model=model)
    # TRL asks for role and content before it renames from and value itself; the roles stay human and gpt.
    rows = Dataset.from_list([{"conversations": sharegpt(MESSAGES)}])
    rows = rows.map(maybe_convert_to_chatml, remove_columns="conversations")
    labels = trained_labels(tokenizer, rows.to_list(), tmp_path, model)
    assert labels == f"{HI}<|im_end|>" * 2
    assert tokenizer.eos_token == "<|im_end|>"


def test_every_format_ends_on_what_trl_takes_for_the_end() -> None:
    """TRL warns where the last trained token is no special one."""
    from trl.chat_template_utils import has_generation_markers, is_chat_template_stop_token_trained

    base = tiny.make_tokenizer()
    for known in FORMATS:
        tokenizer = sloth_backend.get_chat_template(copy.deepcopy(base), known.name)
        assert has_generation_markers(str(tokenizer.chat_template))
        assert is_chat_template_stop_token_trained(tokenizer), known.name
