"""``sloth heal`` on folders with faults: what it shows, what the copy is like, and that the folder stays as it was."""

from __future__ import annotations

import copy
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner, Result

from integration_tests import tiny
from sloth_backend.cli import app

UNTRAINED, EOS = 5, 2
MENDED = (UNTRAINED, EOS)
"""The row planted, and that of eos, which transformers sets to 0 because it is pad."""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A model whose pad is eos, whose bos is added twice, and which has an untrained row."""
    tokenizer = tiny.make_tokenizer()
    tokenizer.add_special_tokens({"extra_special_tokens": ["<|reserved_special_token_0|>"]})
    tokenizer.pad_token = tokenizer.eos_token
    model = tiny.make_model(tokenizer)
    model.get_input_embeddings().weight.data[UNTRAINED] = 1e-23
    model.save_pretrained(tmp_path / "model", max_shard_size="40KB")
    tokenizer.save_pretrained(tmp_path / "model")
    (tmp_path / "model" / "README.md").write_text("A card.")
    return tmp_path / "model"


def heal(*arguments: object) -> Result:
    return CliRunner(env={"COLUMNS": "160"}).invoke(app, ["heal", *map(str, arguments)])


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def error_of(result: Result) -> str:
    assert result.exit_code == 2, result.output
    assert "Traceback" not in result.output
    return " ".join(result.stderr.split())


def test_faults_are_shown_and_nothing_is_written(folder: Path) -> None:
    before = contents(folder)
    result = heal(folder)
    assert result.exit_code == 1, result.output
    text = " ".join(result.stdout.split())
    assert "tokenizer.pad_token" in text
    assert "'<|eos|>' (id 2)" in text
    assert "model.embed_tokens.weight" in text
    assert contents(folder) == before


def test_the_table_is_as_wide_as_asked_after_another_library_has_replaced_the_environment(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """datasets puts a copy in place of ``os.environ`` when it maps in processes of its own."""
    monkeypatch.setattr(os, "environ", copy.deepcopy(os.environ))
    assert "model.embed_tokens.weight" in heal(folder).stdout


def test_the_copy_is_mended_and_complete(folder: Path, tmp_path: Path) -> None:
    before, out = contents(folder), tmp_path / "new" / "copy"
    result = heal(folder, "--write", out)
    assert result.exit_code == 0, result.output
    assert contents(folder) == before
    assert set(before) <= set(contents(out))
    tokenizer, model = AutoTokenizer.from_pretrained(out), AutoModelForCausalLM.from_pretrained(out)
    assert tokenizer.pad_token == "<|pad|>"
    assert model.config.pad_token_id == model.generation_config.pad_token_id == tokenizer.pad_token_id
    old = AutoModelForCausalLM.from_pretrained(folder).state_dict()
    for name, tensor in model.state_dict().items():
        rows = [i for i in range(len(tensor)) if name != "model.embed_tokens.weight" or i not in MENDED]
        assert torch.equal(tensor[rows], old[name][rows]), name
    embedding = model.get_input_embeddings().weight
    others = [i for i in range(len(embedding)) if i not in MENDED]
    for row in MENDED:
        torch.testing.assert_close(embedding[row], embedding[others].double().mean(dim=0).float())
    assert heal(out).exit_code == 0
    assert not list(out.parent.glob(".sloth-heal-*"))


def test_findings_as_json(folder: Path) -> None:
    report = json.loads(heal(folder, "--json").stdout)
    changed = {f["subject"] for f in report["findings"] if f["action"] == "changed"}
    assert {"tokenizer.pad_token", "model.config.pad_token_id", "model.embed_tokens.weight"} <= changed
    assert {f["plugin"] for f in report["findings"] if f["subject"] == "tokenizer.pad_token"} == {"tokenizer_healing"}


def test_a_tokenizer_without_a_model(folder: Path) -> None:
    for file in [*folder.glob("*.safetensors*"), folder / "config.json"]:
        file.unlink()
    result = heal(folder)
    assert "the model was not looked at" in " ".join(result.stdout.split())
    assert "tokenizer.pad_token" in result.stdout


def test_a_healthy_tokenizer_is_copied_as_it_is(tmp_path: Path) -> None:
    folder = tiny.save(tmp_path / "model")
    assert heal(folder, "--write", tmp_path / "copy").exit_code == 0
    assert contents(tmp_path / "copy") == contents(folder)


def test_an_embedding_smaller_than_the_vocabulary(tmp_path: Path) -> None:
    folder = tiny.save(tmp_path / "model", vocab_size=300)
    result = heal(folder, "--write", tmp_path / "copy")
    assert result.exit_code == 1
    assert "model.resize_token_embeddings(316)" in " ".join(result.stdout.split())


def test_weights_of_another_model(folder: Path, tmp_path: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"vocab_size": 1000}))
    text = " ".join(heal(folder).stdout.split())
    assert "the file has 317 rows, config.json says 1000" in text


@pytest.mark.parametrize(
    ("break_it", "says"),
    [
        (lambda folder: shutil.rmtree(folder), "is no folder"),
        (lambda folder: [path.unlink() for path in folder.glob("tokenizer*")], "none of its files is there"),
        (lambda folder: (folder / "tokenizer.json").write_text('{"version": "1.0", "mod'), "fetch it anew"),
        (lambda folder: [class_of_remote_code(folder), lose_the_pipeline(folder)], "which is never run here"),
    ],
    ids=["no folder", "no tokenizer", "half a tokenizer", "code alone"],
)
def test_folders_that_cannot_be_read(break_it: Any, says: str, folder: Path, tmp_path: Path) -> None:
    break_it(folder)
    assert says in error_of(heal(folder, "--write", tmp_path / "copy"))
    assert not (tmp_path / "copy").exists()


def test_a_tokenizer_that_is_code_is_not_run(folder: Path) -> None:
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config |= {"tokenizer_class": "Mine", "auto_map": {"AutoTokenizer": [None, "mine.Mine"]}}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "mine.py").write_text("raise SystemExit('run')")
    result = heal(folder)
    assert result.exit_code in (1, 2)
    assert "run" not in str(result.exception)


def test_weights_that_are_missing_are_one_finding(folder: Path) -> None:
    for file in folder.glob("*.safetensors*"):
        file.unlink()
    findings = json.loads(heal(folder, "--json").stdout)["findings"]
    [warned] = [f for f in findings if f["action"] == "warned"]
    assert "the weights are missing" in warned["reason"]
    assert not [f for f in findings if f["capability"] == "embedding_fix"]


def test_damaged_weights_are_reported(folder: Path) -> None:
    for file in folder.glob("*.safetensors"):
        file.write_bytes(b"damaged")
    result = heal(folder)
    assert "the model was not looked at" in " ".join(result.stdout.split())


def test_nothing_is_written_over(folder: Path, tmp_path: Path) -> None:
    before = contents(folder)
    assert "exists; give --write a new folder" in error_of(heal(folder, "--write", folder))
    assert "which is left as it is" in error_of(heal(folder, "--write", folder / "inside"))
    (tmp_path / "file").write_text("x")
    assert "cannot be written" in error_of(heal(folder, "--write", tmp_path / "file" / "copy"))
    assert contents(folder) == before


def test_the_order_of_shards_stays(folder: Path, tmp_path: Path) -> None:
    heal(folder, "--write", tmp_path / "copy")
    for file in folder.glob("*.safetensors"):
        assert load_file(file).keys() == load_file(tmp_path / "copy" / file.name).keys()


def test_a_corrupt_sentencepiece_model_is_one_finding(tmp_path: Path) -> None:
    folder = tiny.save(tmp_path / "model")
    (folder / "tokenizer.model").write_bytes(b"\x0a\xff corrupt")
    result = heal(folder, "--json", "--write", tmp_path / "copy")
    assert result.exit_code == 1
    warned = [f for f in json.loads(result.stdout)["findings"] if f["action"] == "warned"]
    assert len(warned) == 1
    assert "tokenizer.model cannot be read as a SentencePiece model" in warned[0]["reason"]
    assert (folder / "tokenizer.model").read_bytes() == b"\x0a\xff corrupt"


def lose_a_shard(folder: Path) -> None:
    sorted(folder.glob("*.safetensors"))[0].unlink()


def lose_the_pipeline(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()


def corrupt_tekken(folder: Path) -> None:
    (folder / "tekken.json").write_text('{"config": {"pattern": ".", "default_vocab')


def half_a_config(folder: Path) -> None:
    (folder / "config.json").write_text('{"model_type": "lla')


def class_of_remote_code(folder: Path) -> None:
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config |= {"tokenizer_class": "Mine", "auto_map": {"AutoTokenizer": [None, "mine.Mine"]}}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "mine.py").write_text("raise SystemExit('run')")


def larger_vocabulary(folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(["<|tool|>"])
    tokenizer.save_pretrained(folder)


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (lose_a_shard, "the model was not looked at"),
        (lose_the_pipeline, "cannot be loaded"),
        (corrupt_tekken, "tekken.json cannot be read"),
        (half_a_config, ""),
        (class_of_remote_code, ""),
        (larger_vocabulary, "model.resize_token_embeddings(317)"),
    ],
    ids=lambda part: getattr(part, "__name__", ""),
)
def test_bad_folders_give_one_error_or_finding_and_stay_as_they_are(spoil: Any, says: str, tmp_path: Path) -> None:
    folder = tiny.save(tmp_path / "model")
    if spoil is lose_a_shard:
        AutoModelForCausalLM.from_pretrained(folder).save_pretrained(folder, max_shard_size="40KB")
        (folder / "model.safetensors").unlink(missing_ok=True)
    spoil(folder)
    before = contents(folder)
    result = heal(folder, "--json", "--write", tmp_path / "copy")
    assert contents(folder) == before
    assert result.exit_code in (0, 1, 2)
    if result.exit_code == 2:
        assert "Traceback" not in result.output
        assert result.stderr.count("cannot be loaded") == 1
        assert says in " ".join(result.stderr.split())
        assert not (tmp_path / "copy").exists()
        return
    found = json.loads(result.stdout)["findings"]
    told = [f for f in found if says in f["reason"] and f["action"] != "changed"]
    assert len(told) == 1, found
