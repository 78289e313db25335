"""A format's tokens on reserved ones: one id each, nothing grown, every file of a tokenizer in step."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mistral_common
import pytest
import sentencepiece
from mistral_common.protocol.instruct.messages import AssistantMessage, UserMessage
from mistral_common.protocol.instruct.request import ChatCompletionRequest
from mistral_common.tokens.tokenizers.mistral import MistralTokenizer
from mistral_common.tokens.tokenizers.tekken import Tekkenizer
from tokenizers import Tokenizer
from transformers import AutoTokenizer, LlamaTokenizer, PreTrainedTokenizerFast

import sloth_backend
from integration_tests import tiny
from integration_tests.plugins.chat_templates.fixtures import BYE, CONVERSATIONS, HELLO, HI
from integration_tests.plugins.tokenizer_healing.common import (
    BASE,
    byte_level,
    dressed,
    heal,
    real_folder,
    state,
)
from sloth_backend import SlothConfigError
from sloth_backend.findings import Finding
from sloth_plugins.chat_templates import applied
from sloth_plugins.tokenizer_healing.probes import PROBES

IM = ("<|im_start|>", "<|im_end|>")
RESERVED = ["<|reserved_special_token_0|>", "<|reserved_special_token_1|>", "<|reserved_special_token_2|>"]


def findings(tokenizer: Any, subject: str = "") -> list[Finding]:
    """What the last call did."""
    known = applied(tokenizer)
    assert known is not None
    return [finding for finding in known.findings if finding.subject.startswith(subject)]


def with_reserved(*tokens: str, **names: str) -> PreTrainedTokenizerFast:
    tokenizer = byte_level(**{**BASE, **names})
    tokenizer.add_special_tokens({"extra_special_tokens": list(tokens)})
    return tokenizer


def ids_of_specials(tokenizer: Any) -> list[int]:
    """The ids of ChatML's tokens in a conversation, which must be there as often as they are written."""
    ids = tokenizer.apply_chat_template(CONVERSATIONS["turns"], return_dict=True)["input_ids"]
    start, end = (tokenizer.convert_tokens_to_ids(token) for token in IM)
    assert (ids.count(start), ids.count(end)) == (4, 4)
    return [start, end]


@pytest.mark.parametrize(
    "reserved",
    [
        RESERVED,
        ["<unused7>", "<unused8>", "<unused9>"],
        ["[control_8]", "[control_9]", "[control_10]"],
        ["<SPECIAL_20>", "<SPECIAL_21>", "<SPECIAL_22>"],
        ["<|extra_0|>", "<|extra_1|>", "<|extra_2|>"],
    ],
)
def test_reserved_tokens_give_their_ids(reserved: list[str], tmp_path: Path) -> None:
    tokenizer = with_reserved(*reserved)
    before, size = tokenizer.get_vocab(), len(tokenizer)
    sloth_backend.get_chat_template(tokenizer, "chatml")
    assert ids_of_specials(tokenizer) == [before[reserved[0]], before[reserved[1]]]
    assert len(tokenizer) == size
    names = {reserved[0]: IM[0], reserved[1]: IM[1]}
    assert tokenizer.get_vocab() == {names.get(token, token): number for token, number in before.items()}
    assert not set(names) & set(tokenizer.all_special_tokens)
    assert set(IM) <= set(tokenizer.all_special_tokens)
    tokenizer.save_pretrained(tmp_path)
    for file in tmp_path.iterdir():
        assert reserved[0] not in file.read_text()
        assert reserved[1] not in file.read_text()
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert ids_of_specials(loaded) == ids_of_specials(tokenizer)
    assert loaded.decode(ids_of_specials(loaded), skip_special_tokens=True) == ""
    assert len(loaded) == size
    assert loaded.chat_template == tokenizer.chat_template


def test_tokens_with_a_role_and_tokens_of_the_template_are_not_taken() -> None:
    tokenizer = with_reserved(*RESERVED, pad_token=RESERVED[0])
    sloth_backend.get_chat_template(tokenizer, "chatml")
    assert tokenizer.pad_token == RESERVED[0]
    assert RESERVED[1] not in tokenizer.get_vocab()
    vocab, before = tokenizer.get_vocab(), findings(tokenizer, "tokenizer.vocab")
    sloth_backend.get_chat_template(tokenizer, "chatml")
    assert tokenizer.get_vocab() == vocab
    assert findings(tokenizer, "tokenizer.vocab") == before


def test_a_second_format_takes_the_next_ones_and_the_report_keeps_the_first() -> None:
    tokenizer = with_reserved(*RESERVED, "<|reserved_special_token_3|>", "<|reserved_special_token_4|>")
    before = tokenizer.get_vocab()
    sloth_backend.get_chat_template(tokenizer, "gemma")
    sloth_backend.get_chat_template(tokenizer, "chatml")
    assert ids_of_specials(tokenizer) == [before[RESERVED[2]], before["<|reserved_special_token_3|>"]]
    assert len(findings(tokenizer, "tokenizer.vocab")) == 4
    assert len(findings(tokenizer, "tokenizer.chat_template")) == 1


def test_pieces_that_texts_are_made_of_are_not_taken() -> None:
    """A reserved-looking name that merges lead to stands for text."""
    tokenizer = with_reserved()
    content = json.loads(tokenizer.backend_tokenizer.to_str())
    vocab = content["model"]["vocab"]
    for token in ("<u", "<un", "<unused5>", "nused5>"):
        vocab[token] = 1000 + len(vocab)
    content["model"]["merges"] = [["<", "u"], ["<u", "nused5>"]]
    tokenizer._tokenizer = Tokenizer.from_str(json.dumps(content).replace('<un"', '<un "'))
    sloth_backend.get_chat_template(tokenizer, "chatml")
    assert "<unused5>" in tokenizer.get_vocab()


def test_tokens_are_added_where_none_is_free() -> None:
    tokenizer = with_reserved(RESERVED[0])
    before, size = tokenizer.get_vocab(), len(tokenizer)
    sloth_backend.get_chat_template(tokenizer, "chatml")
    assert ids_of_specials(tokenizer) == [before[RESERVED[0]], size]
    [warned] = [f for f in findings(tokenizer) if f.action == "warned"]
    assert "pass model=model" in warned.reason
    assert IM[1] in warned.reason


def test_a_token_that_is_an_ordinary_piece_becomes_special() -> None:
    tokenizer = byte_level(*IM, **BASE)
    size, number = len(tokenizer), tokenizer.convert_tokens_to_ids(IM[0])
    assert len(tokenizer.encode(IM[0], add_special_tokens=False)) > 1
    sloth_backend.get_chat_template(tokenizer, "chatml")
    assert len(tokenizer) == size
    assert tokenizer.encode(IM[0], add_special_tokens=False) == [number]


@pytest.mark.parametrize("saved", [False, True])
def test_map_eos_takes_the_place_of_eos(saved: bool, tmp_path: Path) -> None:
    tokenizer = tiny.make_tokenizer()
    eos, size = tokenizer.eos_token_id, len(tokenizer)
    sloth_backend.get_chat_template(tokenizer, "llama-3", map_eos=True)
    if saved:
        tokenizer.save_pretrained(tmp_path)
        tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert (tokenizer.eos_token, tokenizer.eos_token_id) == ("<|eot_id|>", eos)
    assert "<|eos|>" not in tokenizer.get_vocab()
    assert len(tokenizer) == size + 2
    out = tokenizer.apply_chat_template(CONVERSATIONS["ended"], return_dict=True, return_assistant_tokens_mask=True)
    assert out["input_ids"][-1] == eos
    assert out["assistant_masks"][-1] == 1


def test_map_eos_with_a_token_that_is_there() -> None:
    tokenizer = tiny.make_tokenizer()
    number = tokenizer.convert_tokens_to_ids("<|im_end|>")
    sloth_backend.get_chat_template(tokenizer, "chatml")
    assert tokenizer.eos_token == "<|eos|>"
    sloth_backend.get_chat_template(tokenizer, "chatml", map_eos=True)
    assert (tokenizer.eos_token, tokenizer.eos_token_id) == ("<|im_end|>", number)
    assert "<|eos|>" in tokenizer.get_vocab()


def test_the_post_processor_follows() -> None:
    tokenizer = tiny.make_tokenizer()
    tokenizer.add_bos_token, tokenizer.add_eos_token = True, True
    tokenizer.update_post_processor()
    eos = tokenizer.eos_token_id
    assert tokenizer("x").input_ids[-1] == eos
    sloth_backend.get_chat_template(tokenizer, "llama-3", map_eos=True)
    ids = tokenizer("x").input_ids
    assert (ids[0], ids[-1]) == (tokenizer.bos_token_id, eos)
    assert tokenizer.decode(ids).endswith("<|eot_id|>")


def test_bos_and_eos_of_the_family_are_named_where_the_tokenizer_names_none() -> None:
    tokenizer = byte_level("<s>", "</s>")
    sloth_backend.get_chat_template(tokenizer, "mistral")
    assert (tokenizer.bos_token, tokenizer.eos_token) == ("<s>", "</s>")
    bare = byte_level()
    with pytest.raises(SlothConfigError, match="ends turns with eos, and the tokenizer has none"):
        sloth_backend.get_chat_template(bare, "zephyr")
    sloth_backend.get_chat_template(bare, "llama-3")
    assert bare.eos_token == "<|eot_id|>"
    assert [f.action for f in findings(bare, "tokenizer.bos_token")] == ["warned"]


def test_a_failure_leaves_the_tokenizer_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = with_reserved(*RESERVED)
    before = state(tokenizer)

    def broken(*arguments: object) -> bool:
        return False

    monkeypatch.setattr("sloth_plugins.chat_templates.applying._is_whole", broken)
    with pytest.raises(SlothConfigError, match="into pieces"):
        sloth_backend.get_chat_template(tokenizer, "chatml", map_eos=True)
    assert state(tokenizer) == before


@pytest.mark.parametrize("name", ["chat-ml2", "", "gemini"])
def test_unknown_names(name: str) -> None:
    with pytest.raises(SlothConfigError, match=r"unknown chat template .* There are: chatml, llama-3, llama-3\.1,"):
        sloth_backend.get_chat_template(tiny.make_tokenizer(), name)


def test_what_is_no_fast_tokenizer_is_refused() -> None:
    with pytest.raises(SlothConfigError, match="no chat template for this tokenizer"):
        sloth_backend.get_chat_template("tokenizer", "chatml")  # pyright: ignore[reportArgumentType, reportCallIssue]


def encodings(tokenizer: Any) -> list[list[int]]:
    return [tokenizer.encode(text, add_special_tokens=False) for text in PROBES]


def saved(tokenizer: Any, folder: Path) -> Any:
    """The tokenizer after save and load, its origin saved beside it."""
    tokenizer.save_pretrained(folder)
    tokenizer.save_vocabulary(str(folder))
    return AutoTokenizer.from_pretrained(folder)


@pytest.mark.parametrize(
    ("version", "map_eos"),
    [
        ("v3", False),
        pytest.param("v2", True, marks=pytest.mark.slow),
        pytest.param("v7", True, marks=pytest.mark.slow),
    ],
)
def test_real_sentencepiece_files(version: str, map_eos: bool, tmp_path: Path) -> None:
    """Control tokens are taken; tokenizer.json and tokenizer.model say the same, and healing finds no fault."""
    folder = real_folder(tmp_path / "real", version, add_bos_token=True)
    original = (folder / "tokenizer.model").read_bytes()
    tokenizer = LlamaTokenizer.from_pretrained(folder)
    heal(tokenizer)
    before, size = encodings(tokenizer), len(tokenizer)
    sloth_backend.get_chat_template(tokenizer, "chatml", map_eos=map_eos)
    start, end = ids_of_specials(tokenizer)
    assert len(tokenizer) == size
    assert start < size
    assert (end == 2) == map_eos
    assert encodings(tokenizer) == before
    loaded = saved(tokenizer, tmp_path / "saved")
    assert ids_of_specials(loaded) == [start, end]
    assert encodings(loaded) == before
    assert heal(loaded) == []
    processor = sentencepiece.SentencePieceProcessor(str(tmp_path / "saved" / "tokenizer.model"))
    assert processor.id_to_piece([start, end]) == list(IM)
    assert processor.is_control(start)
    assert processor.is_control(end)
    assert processor.get_piece_size() == size
    assert processor.eos_id() == 2
    assert processor.bos_id() == 1
    assert (folder / "tokenizer.model").read_bytes() == original


def test_real_file_without_reserved_tokens(tmp_path: Path) -> None:
    """Mistral's first file has none: pieces are appended, and encode as before."""
    folder = real_folder(tmp_path / "real", "v1", add_bos_token=True)
    tokenizer = LlamaTokenizer.from_pretrained(folder)
    heal(tokenizer)
    before, size = encodings(tokenizer), len(tokenizer)
    sloth_backend.get_chat_template(tokenizer, "chatml", map_eos=True)
    assert ids_of_specials(tokenizer) == [size, 2]
    assert encodings(tokenizer) == before
    assert heal(tokenizer) == []
    loaded = saved(tokenizer, tmp_path / "saved")
    assert encodings(loaded) == before
    assert heal(loaded) == []
    processor = sentencepiece.SentencePieceProcessor(str(tmp_path / "saved" / "tokenizer.model"))
    assert processor.get_piece_size() == len(tokenizer) == size + 1
    assert processor.id_to_piece([size, 2]) == list(IM)
    assert processor.encode("a <|im_start|> b") != tokenizer.encode("a <|im_start|> b", add_special_tokens=False)


def test_user_defined_pieces(tmp_path: Path, trained: Callable[..., Path]) -> None:
    """Gemma's reserved tokens are user-defined pieces, which texts can give: renamed they are control pieces."""
    model = trained("reserved", user_defined_symbols=["<unused0>", "<unused1>", "<unused2>"])
    tokenizer = LlamaTokenizer.from_pretrained(dressed(tmp_path / "real", model, add_bos_token=True))
    heal(tokenizer)
    before = encodings(tokenizer)
    reserved = tokenizer.convert_tokens_to_ids(["<unused0>", "<unused1>"])
    sloth_backend.get_chat_template(tokenizer, "chatml")
    assert ids_of_specials(tokenizer) == reserved
    loaded = saved(tokenizer, tmp_path / "saved")
    assert encodings(loaded) == before
    assert heal(loaded) == []
    processor = sentencepiece.SentencePieceProcessor(str(tmp_path / "saved" / "tokenizer.model"))
    assert [processor.is_control(number) for number in reserved] == [True, True]


def test_the_file_of_another_tokenizer_is_left(tmp_path: Path, trained: Callable[..., Path]) -> None:
    folder = dressed(tmp_path / "other", trained())
    tokenizer = tiny.make_tokenizer()
    tokenizer.save_pretrained(folder)
    loaded = PreTrainedTokenizerFast.from_pretrained(folder)
    sloth_backend.get_chat_template(loaded, "llama-3")
    [left] = findings(loaded, "tokenizer.vocab_file")
    assert left.action == "skipped"
    assert "belongs to another tokenizer" in left.reason


def test_a_damaged_file_is_left(tmp_path: Path) -> None:
    tiny.make_tokenizer().save_pretrained(tmp_path)
    (tmp_path / "tokenizer.model").write_bytes(b"\x0a\xff damaged")
    loaded = PreTrainedTokenizerFast.from_pretrained(tmp_path)
    sloth_backend.get_chat_template(loaded, "llama-3")
    assert "not kept in step" in findings(loaded, "tokenizer.vocab_file")[0].reason
    assert (tmp_path / "tokenizer.model").read_bytes() == b"\x0a\xff damaged"


def test_real_tekken_file(tmp_path: Path) -> None:
    """A tekken file cut to 3,000 ordinary tokens: the whole takes seconds to convert."""
    data = Path(str(mistral_common.__file__)).parent / "data"
    content = json.loads((data / "tekken_240911.json").read_text())
    content["vocab"] = content["vocab"][:3000]
    content["config"]["default_vocab_size"] = 4000
    source = tmp_path / "tekken.json"
    source.write_text(json.dumps(content))
    tokenizer = PreTrainedTokenizerFast.from_pretrained(tmp_path)
    before, size = encodings(tokenizer), len(tokenizer)
    reserved = tokenizer.convert_tokens_to_ids(["<SPECIAL_20>", "<SPECIAL_21>"])
    sloth_backend.get_chat_template(tokenizer, "chatml")
    assert ids_of_specials(tokenizer) == reserved
    assert len(tokenizer) == size
    assert encodings(tokenizer) == before
    tokenizer.save_pretrained(tmp_path / "saved")
    loaded = AutoTokenizer.from_pretrained(tmp_path / "saved")
    assert ids_of_specials(loaded) == reserved
    assert encodings(loaded) == before
    copy = Path(tokenizer.vocab_file)
    assert [Tekkenizer.from_file(copy).get_special_token(token) for token in IM] == reserved
    assert PreTrainedTokenizerFast.from_pretrained(copy.parent).get_vocab() == tokenizer.get_vocab()
    assert json.loads(source.read_text()) == content


def test_the_answer_of_a_real_tokenizer(tmp_path: Path) -> None:
    """Assistant masks, and for its own format the very ids of Mistral's library."""
    tokenizer = LlamaTokenizer.from_pretrained(real_folder(tmp_path, "v3"))
    heal(tokenizer)
    sloth_backend.get_chat_template(tokenizer, "mistral")
    theirs = MistralTokenizer.v3().encode_chat_completion(
        ChatCompletionRequest(
            messages=[UserMessage(content=HELLO), AssistantMessage(content=HI), UserMessage(content=BYE)]
        )
    )
    assert tokenizer.apply_chat_template(CONVERSATIONS["turns"][1:], return_dict=True)["input_ids"] == theirs.tokens
    for name in ("mistral", "chatml", "vicuna"):
        sloth_backend.get_chat_template(tokenizer, name)
        out = tokenizer.apply_chat_template(
            CONVERSATIONS["ended"] * 2, return_dict=True, return_assistant_tokens_mask=True
        )
        ids = [number for number, mask in zip(out["input_ids"], out["assistant_masks"], strict=True) if mask]
        stop = applied(tokenizer).stop  # pyright: ignore[reportOptionalMemberAccess]
        pieces = [piece.strip() for piece in tokenizer.decode(ids).split(stop)]
        assert pieces == [HI, HI, ""]
