"""tekken and tiktoken files: a tokenizer broken in each way is found and rebuilt, an intact one has no finding."""

from __future__ import annotations

import base64
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mistral_common
import pytest
import tiktoken
from mistral_common.tokens.tokenizers.tekken import Tekkenizer
from tokenizers import Tokenizer, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import bytes_to_unicode

from integration_tests.plugins.tokenizer_healing.common import (
    actions,
    assert_not_compared,
    edit_backend,
    heal,
    random_texts,
    state,
)
from sloth_backend.findings import Edits
from sloth_plugins.tokenizer_healing import ranked_truth
from sloth_plugins.tokenizer_healing.case import encode
from sloth_plugins.tokenizer_healing.probes import PROBES, without
from sloth_plugins.tokenizer_healing.ranked_file import NotRanked, letters, read

TEKKEN = Path(mistral_common.__path__[0]) / "data" / "tekken_240911.json"
TOKENS, SPECIALS = 4000, 64
RUNS = [unit * count for unit in ("a", "ab", "aab", "=", " ", "\n", "ha", "01", "\u4e2d") for count in range(1, 80, 3)]


@pytest.fixture(scope="session")
def tekken(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tekken file cut to its first 4,000 ordinary tokens: the whole takes seconds to convert."""
    content = json.loads(TEKKEN.read_text())
    content["config"] |= {"default_vocab_size": TOKENS + SPECIALS, "default_num_special_tokens": SPECIALS}
    content["vocab"] = content["vocab"][: TOKENS + 100]
    path = tmp_path_factory.mktemp("tekken") / "tekken.json"
    path.write_text(json.dumps(content))
    PreTrainedTokenizerFast.from_pretrained(path.parent).save_pretrained(path.parent)
    return path


@pytest.fixture
def folder(tekken: Path, tmp_path: Path) -> Path:
    """A folder of a model with a tekken file and the tokenizer.json converted from it."""
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"}
    for name in ("tekken.json", "tokenizer.json"):
        (tmp_path / name).write_bytes((tekken.parent / name).read_bytes())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({**config, "pad_token": "<pad>", "unk_token": "<unk>"}))
    return tmp_path


@pytest.fixture
def tiktoken_folder(folder: Path) -> Path:
    """The same vocabulary as a tiktoken file, without special tokens before it, and a tokenizer converted from it."""
    ranks = read(folder / "tekken.json").ranks
    (folder / "tekken.json").unlink()
    lines = [f"{base64.b64encode(token).decode()} {rank}" for token, rank in ranks.items()]
    (folder / "tokenizer.model").write_text("\n".join(lines))
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)

    def shift(content: dict[str, Any]) -> None:
        special = {token["content"] for token in content["added_tokens"]}
        vocab = content["model"]["vocab"]
        content["model"]["vocab"] = {t: i - SPECIALS for t, i in vocab.items() if t not in special}
        names = ("<s>", "</s>", "<pad>")
        template = next(token for token in content["added_tokens"])
        content["added_tokens"] = [{**template, "id": TOKENS + i, "content": t} for i, t in enumerate(names)]

    edit_backend(tokenizer, shift)
    tokenizer.init_kwargs.pop("added_tokens_decoder", None)
    tokenizer.backend_tokenizer.save(str(folder / "tokenizer.json"))
    return folder


def shuffle_merges(content: dict[str, Any]) -> None:
    random.Random(0).shuffle(content["model"]["merges"])


def no_merges(content: dict[str, Any]) -> None:
    content["model"].update(merges=[], ignore_merges=False)


def merge_first(content: dict[str, Any]) -> None:
    """What Llama 3's first conversion had: whole pieces are merged up and not looked up."""
    content["model"]["ignore_merges"] = False
    content["model"]["merges"] = content["model"]["merges"][: len(content["model"]["merges"]) // 2]


def lowercase(content: dict[str, Any]) -> None:
    content["normalizer"] = {"type": "Lowercase"}


def nfc(content: dict[str, Any]) -> None:
    content["normalizer"] = {"type": "NFC"}


def prefix_space(content: dict[str, Any]) -> None:
    content["pre_tokenizer"]["pretokenizers"][-1]["add_prefix_space"] = True


def lose_decoder(content: dict[str, Any]) -> None:
    content["decoder"] = None


def gpt2_pattern(content: dict[str, Any]) -> None:
    content["pre_tokenizer"] = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}


BREAKS = [shuffle_merges, no_merges, merge_first, lowercase, nfc, prefix_space, lose_decoder]


def id_of(change: Callable[..., Any]) -> str:
    return change.__name__


def texts_for(tokenizer: Any, lines: list[str]) -> list[str]:
    specials = [str(token) for token in tokenizer.added_tokens_decoder.values()]
    texts = lines[:600] + random_texts(150) + RUNS + list(PROBES)
    return without(tuple(texts), specials)


def test_an_intact_tekken_file_has_no_finding(folder: Path, stdlib_lines: list[str]) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    before, oracle = state(tokenizer), Tekkenizer.from_file(folder / "tekken.json")
    assert heal(tokenizer) == []
    assert state(tokenizer) == before
    texts = texts_for(tokenizer, stdlib_lines)
    assert encode(tokenizer.backend_tokenizer, texts) == [oracle.encode(text, bos=False, eos=False) for text in texts]


@pytest.mark.parametrize("change", [*BREAKS, gpt2_pattern], ids=id_of)
def test_each_way_to_break_tekken_is_found_and_healed(
    folder: Path, stdlib_lines: list[str], change: Callable[[dict[str, Any]], None]
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    oracle = Tekkenizer.from_file(folder / "tekken.json")
    vocab = tokenizer.get_vocab()
    edit_backend(tokenizer, change)
    broken, edits = state(tokenizer), Edits()
    [finding] = heal(tokenizer, edits)
    assert (finding.action, finding.subject) == ("changed", "tokenizer.encode")
    assert "tekken.json" in finding.reason
    assert " instead of " in finding.reason
    texts = texts_for(tokenizer, stdlib_lines)
    truth = [oracle.encode(text, bos=False, eos=False) for text in texts]
    assert encode(tokenizer.backend_tokenizer, texts) == truth
    assert tokenizer.batch_decode(truth) == [oracle.decode(ids) for ids in truth]
    assert tokenizer.get_vocab() == vocab
    assert tokenizer.encode("<s>[INST]", add_special_tokens=False) == [1, 3]
    assert heal(tokenizer) == []
    edits.rollback()
    assert state(tokenizer) == broken


@pytest.mark.parametrize("change", [None, *BREAKS], ids=lambda change: change and change.__name__)
def test_tiktoken_files(
    tiktoken_folder: Path, stdlib_lines: list[str], change: Callable[[dict[str, Any]], None] | None
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiktoken_folder)
    pattern = ranked_truth.cut_by(tokenizer.backend_tokenizer)
    lines = (line.split() for line in (tiktoken_folder / "tokenizer.model").read_text().splitlines())
    ranks = {base64.b64decode(token): int(rank) for token, rank in lines}
    oracle = tiktoken.Encoding("x", pat_str=str(pattern), mergeable_ranks=ranks, special_tokens={})
    if change is not None:
        edit_backend(tokenizer, change)
    found = [finding.subject for finding in heal(tokenizer) if finding.action == "changed"]
    assert found == (["tokenizer.encode"] if change else [])
    texts = texts_for(tokenizer, stdlib_lines)
    assert encode(tokenizer.backend_tokenizer, texts) == [oracle.encode_ordinary(text) for text in texts]


def test_a_pattern_that_the_tiktoken_file_was_not_trained_with_is_reported(tiktoken_folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiktoken_folder)
    digits = pre_tokenizers.Split(" ", behavior="isolated")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.backend_tokenizer.pre_tokenizer = byte_level
    [finding] = [f for f in heal(tokenizer) if f.subject == "tokenizer.pre_tokenizer"]
    assert "can never be encoded" in finding.reason
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, byte_level])
    [finding] = [f for f in heal(tokenizer) if f.subject == "tokenizer.encode"]
    assert "neither it nor the tokenizer says how texts are cut" in finding.reason


def test_llama_3_keeps_its_file_in_a_folder_below(tiktoken_folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiktoken_folder)
    (tiktoken_folder / "original").mkdir()
    (tiktoken_folder / "tokenizer.model").rename(tiktoken_folder / "original" / "tokenizer.model")
    edit_backend(tokenizer, shuffle_merges)
    assert actions(heal(tokenizer)) == {"tokenizer.encode": "changed"}


def test_roles_that_are_missing_come_from_tekken(folder: Path) -> None:
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.eos_token is None
    found = actions(heal(tokenizer))
    assert found == {f"tokenizer.{role}_token": "changed" for role in ("eos", "bos", "unk", "pad")}
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (1, 2, 11)
    assert tokenizer.unk_token_id == 0


def test_the_file_of_another_tokenizer(folder: Path) -> None:
    content = json.loads((folder / "tekken.json").read_text())
    vocab = content["vocab"]
    vocab[2000]["token_bytes"], vocab[2001]["token_bytes"] = vocab[2001]["token_bytes"], vocab[2000]["token_bytes"]
    (folder / "tekken.json").write_text(json.dumps(content))
    assert_not_compared(AutoTokenizer.from_pretrained(folder))


@pytest.mark.parametrize(
    ("name", "spoil", "says"),
    [
        ("tekken.json", lambda text: text[: len(text) // 2], "cannot be read"),
        ("tekken.json", lambda text: text.replace('"pattern"', '"paths"'), "no 'pattern'"),
        (
            "tekken.json",
            lambda text: text.replace('"Ag=="', '"Aw=="'),
            "different tokens",
        ),
        ("tokenizer.model", lambda text: text + "\nIQ== 7", "twice"),
        ("tokenizer.model", lambda text: "IQ== 0\nIg== 1\n", "lacks 254 of the 256 bytes"),
    ],
)
def test_damaged_files_are_one_finding_each(
    request: pytest.FixtureRequest, name: str, spoil: Callable[[str], str], says: str
) -> None:
    folder = request.getfixturevalue("folder" if name == "tekken.json" else "tiktoken_folder")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    (folder / name).write_text(spoil((folder / name).read_text()))
    before = state(tokenizer)
    [finding] = heal(tokenizer)
    assert (finding.action, finding.subject) == ("warned", "tokenizer.encode")
    assert f"{name} cannot be read as a vocabulary in order of merging" in finding.reason
    assert says in finding.reason
    assert state(tokenizer) == before


def test_without_the_package_tiktoken(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "tiktoken", None)
    with pytest.raises(NotRanked, match="is not installed"):
        read(folder / "tekken.json")


def test_a_rebuilt_one_that_differs_is_not_taken(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    edit_backend(tokenizer, no_merges)
    backend = tokenizer.backend_tokenizer
    monkeypatch.setattr(ranked_truth, "_rebuilt", lambda case, _: Tokenizer.from_str(case.backend.to_str()))
    assert "a rebuilt one still differs" in heal(tokenizer)[0].reason
    assert tokenizer.backend_tokenizer is backend


def test_letters_are_those_of_gpt2() -> None:
    assert letters() == bytes_to_unicode()
