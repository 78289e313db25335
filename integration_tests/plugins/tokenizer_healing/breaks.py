"""Every way to break a tokenizer that healing knows of, as data: what it does, and what has to be said about it."""

from __future__ import annotations

import copy
import importlib.util
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import processors
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaTokenizer,
    PreTrainedTokenizerFast,
)

from integration_tests.plugins.tokenizer_healing import test_breaks, test_ranked_truth
from integration_tests.plugins.tokenizer_healing.common import REAL, edit_backend, real_folder
from sloth_backend.config import SlothConfig
from sloth_backend.findings import Edits, Finding
from sloth_backend.run import Run
from sloth_plugins import tokenizer_healing
from sloth_plugins.tokenizer_healing.case import encode
from sloth_plugins.tokenizer_healing.probes import PROBES

TEKKEN = {"tekken 240718": "tekken_240718.json", "tekken 240911": "tekken_240911.json"}
FILES = (*REAL, *TEKKEN)
"""The real files of mistral-common."""
CHAT = "{% for m in messages %}[INST]{{ m['content'] }}{{ eos_token }}{% endfor %}"


@dataclass(frozen=True)
class Break:
    """One fault.

    Attributes:
        name: in words.
        apply: puts it into a tokenizer and its model.
        subject: what the finding is about.
        action: ``changed`` where healing is defined, else ``warned``.
        only: which files it applies to, by the beginnings of their names.
    """

    name: str
    apply: Callable[[Any, Any], None]
    subject: str
    action: str = "changed"
    only: tuple[str, ...] = ("v", "tekken")


def load(version: str, folder: Path) -> Any:
    """One of ``FILES`` as transformers converts it, with a folder of its own."""
    if version in REAL:
        return LlamaTokenizer.from_pretrained(real_folder(folder, version, add_bos_token=True))
    package = importlib.util.find_spec("mistral_common")
    assert package is not None, "mistral-common, a test dependency, is not installed"
    data = Path(str(package.submodule_search_locations[0])) / "data"  # pyright: ignore[reportOptionalSubscript]
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copy(data / TEKKEN[version], folder / "tekken.json")
    config: dict[str, Any] = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}
    config["add_bos_token"] = False
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return PreTrainedTokenizerFast.from_pretrained(folder)


def oracle(version: str, folder: Path) -> Callable[[list[str]], list[list[int]]]:
    """What SentencePiece, or mistral-common's tekken, encodes texts to."""
    if version in REAL:
        import sentencepiece

        return sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model")).encode
    from mistral_common.tokens.tokenizers.tekken import Tekkenizer

    tekken = Tekkenizer.from_file(folder / "tekken.json")
    return lambda texts: [tekken.encode(text, bos=False, eos=False) for text in texts]


def model_for(tokenizer: Any, learned_positions: bool = False) -> Any:
    """A tiny model with a row for each token, which stops at eos and knows pad."""
    rows = max(tokenizer.get_vocab().values()) + 1
    ids = {f"{role}_token_id": getattr(tokenizer, f"{role}_token_id") for role in ("pad", "bos", "eos")}
    with torch.device("meta"):
        if learned_positions:
            config = GPT2Config(vocab_size=rows, n_embd=8, n_layer=1, n_head=1, n_positions=16, **ids)
            return GPT2LMHeadModel(config)
        sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
        return LlamaForCausalLM(LlamaConfig(vocab_size=rows, **sizes, **ids))


def clean(version: str, folder: Path) -> Any:
    """One of ``FILES``, healed and saved: what the faults are put into."""
    tokenizer = load(version, folder)
    tokenizer.padding_side = "right"
    heal_all(tokenizer, model_for(tokenizer))
    tokenizer.save_pretrained(folder)
    return tokenizer


def heal_all(tokenizer: Any, model: Any, edits: Edits | None = None) -> list[Finding]:
    """Both phases, as a run of Axolotl has them: the one host whose batches are padded as the tokenizer says."""
    run, edits = Run("axolotl", SlothConfig()), edits or Edits()
    found = tokenizer_healing.sloth_heal_tokenizer(tokenizer, run, edits) or []
    return found + (tokenizer_healing.sloth_fix_embeddings(model, tokenizer, run, edits) or [])


def _pipeline(change: Callable[[dict[str, Any]], None], *only: str) -> Break:
    name = change.__name__.replace("_", " ")
    return Break(name, lambda tokenizer, _: edit_backend(tokenizer, change), "tokenizer.encode", only=only)


def _role(role: str, value: str | None, action: str = "changed") -> Break:
    def apply(tokenizer: Any, model: Any) -> None:
        setattr(tokenizer, role, getattr(tokenizer, value) if value and value.endswith("_token") else value)

    return Break(f"{role} is {value}", apply, f"tokenizer.{role}", action)


def _post_processor(single: str) -> Break:
    def apply(tokenizer: Any, model: Any) -> None:
        tokens = [("<s>", tokenizer.bos_token_id), ("</s>", tokenizer.eos_token_id)]
        template = processors.TemplateProcessing(single=single, special_tokens=tokens)
        tokenizer.backend_tokenizer.post_processor = template

    return Break(f"post-processor {single}", apply, "tokenizer.post_processor")


def _template(text: str) -> Callable[[Any, Any], None]:
    return lambda tokenizer, _: setattr(tokenizer, "chat_template", text)


def _forget(*tokens: str) -> Callable[[Any, Any], None]:
    def change(content: dict[str, Any]) -> None:
        content["added_tokens"] = [token for token in content["added_tokens"] if token["content"] not in tokens]

    def apply(tokenizer: Any, model: Any) -> None:
        tokenizer.chat_template = CHAT
        edit_backend(tokenizer, change)

    return apply


def _share_an_id(tokenizer: Any, model: Any) -> None:
    edit_backend(tokenizer, lambda c: c["model"]["vocab"].update({"<|again|>": tokenizer.eos_token_id}))


def _list(**listed: str) -> Callable[[Any, Any], None]:
    def apply(tokenizer: Any, model: Any) -> None:
        tokenizer.init_kwargs["added_tokens_decoder"] = {int(number[1:]): token for number, token in listed.items()}

    return apply


def _add(*tokens: str) -> Callable[[Any, Any], None]:
    return lambda tokenizer, _: tokenizer.add_special_tokens({"extra_special_tokens": list(tokens)})


def _bos_not_added(tokenizer: Any, model: Any) -> None:
    tokenizer.add_bos_token = True
    tokenizer.backend_tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)


def _another_pad(tokenizer: Any, model: Any) -> None:
    model.config.pad_token_id = tokenizer.eos_token_id


def _pad_beyond(tokenizer: Any, model: Any) -> None:
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})


def _generation(value: Any) -> Callable[[Any, Any], None]:
    return lambda _, model: setattr(model.generation_config, "eos_token_id", value)


def _other_class(tokenizer: Any, model: Any) -> None:
    tokenizer.__class__ = LlamaTokenizer  # which builds a pipeline of its own when it is loaded


def _left(tokenizer: Any, model: Any) -> None:
    tokenizer.padding_side = "left"


LEFT = "padding on the left under learned positions"
VOCAB, GENERATION = "tokenizer.vocab", "model.generation_config.eos_token_id"
BREAKS = (
    *(_pipeline(change, "v") for change in test_breaks.BREAKS),
    *(_pipeline(change, "tekken") for change in (*test_ranked_truth.BREAKS, test_ranked_truth.gpt2_pattern)),
    *(_role("pad_token", value) for value in (None, "eos_token", "bos_token", "<gone>")),
    *(_role("eos_token", value) for value in (None, "<unk>", "bos_token")),
    _role("eos_token", "<gone>", "warned"),
    *(_role("bos_token", value) for value in (None, "<unk>", "eos_token")),
    _role("bos_token", "<gone>", "warned"),
    *(_role("unk_token", value) for value in (None, "eos_token", "bos_token")),
    _role("unk_token", "<gone>", "warned"),
    Break("eos is cut to pieces", _forget("</s>"), "tokenizer.eos_token"),
    Break("bos is cut to pieces", _forget("<s>"), "tokenizer.bos_token"),
    Break("two tokens share an id", _share_an_id, VOCAB, "warned"),
    Break("a listed token has another id", _list(_300="<tool>"), "tokenizer.added_tokens_decoder", "warned"),
    Break("a token is listed twice", _list(_300="<t>", _301="<t>"), "tokenizer.added_tokens_decoder", "warned"),
    *(_post_processor(single) for single in ("<s> <s> $A", "<s> $A </s> </s>")),
    Break("bos is not added", _bos_not_added, "tokenizer.add_bos_token"),
    Break("bos twice in the template", _template("<s><s>" + CHAT), "tokenizer.chat_template", "warned"),
    Break(
        "tokens of the template are missing",
        _template("{% for m in messages %}<|im_start|>{{ m['content'] }}<|im_end|>{% endfor %}"),
        "tokenizer.chat_template",
        "warned",
    ),
    Break(
        "a token of the template is cut to pieces",
        _forget("[INST]"),
        "tokenizer.chat_template",
        only=("v2", "v3", "v7", "tekken"),
    ),
    Break("another class reads it back", _other_class, "tokenizer.save_pretrained"),
    Break("placeholders without rows", _add("<|reserved_special_token_0|>", "<unused1>"), VOCAB),
    Break("a token without a row", _add("<|tool|>"), VOCAB, "warned"),
    Break("pad without a row", _pad_beyond, "tokenizer.pad_token"),
    Break("the model has another pad id", _another_pad, "model.config.pad_token_id"),
    *(Break(f"generation ends at {value}", _generation(value), GENERATION) for value in (None, 7, [7, 1 << 20])),
    Break(LEFT, _left, "tokenizer.padding_side"),
)


def applies(fault: Break, version: str) -> bool:
    """Whether the fault can be made in this file's tokenizer."""
    return version.startswith(fault.only)


def outcome(fault: Break, tokenizer: Any) -> str | None:
    """Put a fault into a copy of a clean tokenizer and heal it; None where all is as it should be, else what is not.

    A healed one encodes the probe texts as before, the second look finds nothing to change, and a fault that is only
    reported leaves the tokenizer as it was.
    """
    broken = copy.deepcopy(tokenizer)
    model = model_for(broken, fault.name == LEFT)
    fault.apply(broken, model)
    before = broken.backend_tokenizer.to_str() if fault.action == "warned" else ""
    found = heal_all(broken, model)
    if (fault.subject, fault.action) not in {(finding.subject, finding.action) for finding in found}:
        return f"not {fault.action}: {found}"
    if fault.action == "warned":
        return None if broken.backend_tokenizer.to_str() == before else "reported, but changed too"
    again = [f for f in heal_all(broken, model) if f.action == "changed" or f.subject == fault.subject]
    if again:
        return f"not healed: {again}"
    texts = list(PROBES)
    same = encode(broken.backend_tokenizer, texts) == encode(tokenizer.backend_tokenizer, texts)
    return None if same else "healed, but encodes otherwise than before"
