"""The chat formats: for each its file, the tokens that it needs whole, the token that ends a turn, and its source.

The files under ``jinja/`` are written after the formats that the model cards document. Each marks what the assistant
says, end of turn included, by ``{% generation %}``, and nothing else: what the prompt ends with is not part of it.
"""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass
from pathlib import Path

from sloth_backend.config import SlothConfigError

FOLDER = Path(__file__).parent / "jinja"


@dataclass(frozen=True)
class Format:
    """One chat format.

    Attributes:
        name: what users call it.
        source: where its authors document it.
        special: tokens that must be one id each; a tokenizer may lack them.
        stop: the token that ends the assistant's turn; None where that is the tokenizer's eos.
        bos: the token that a conversation starts with in the model the format comes from; None where with none. A
            tokenizer that names its own bos keeps that.
        eos: what that model's eos is called; taken where the format ends turns with eos and the tokenizer names none.
        roles: what a message's role may be.
    """

    name: str
    source: str
    special: tuple[str, ...] = ()
    stop: str | None = None
    bos: str | None = None
    eos: str | None = None
    roles: tuple[str, ...] = ("system", "user", "assistant")

    @property
    def text(self) -> str:
        """The template."""
        file = self.name.replace("-", "_").replace(".", "_") + ".jinja"
        return (FOLDER / file).read_text(encoding="utf-8").rstrip("\n")

    @property
    def knows_tools(self) -> bool:
        """Whether the template describes tools to the model."""
        return "tool" in self.roles


HUB = "https://huggingface.co"
IM = ("<|im_start|>", "<|im_end|>")
HEADERS = ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
TURNS = ("<start_of_turn>", "<end_of_turn>")
WITH_TOOLS = ("system", "user", "assistant", "tool")
LLAMA_DOCS = "https://www.llama.com/docs/model-cards-and-prompt-formats"
MISTRAL_DOCS = "https://github.com/mistralai/cookbook/blob/main/concept-deep-dive/tokenization/chat_templates.md"

FORMATS = (
    Format("chatml", "https://github.com/openai/openai-python/blob/v0.28.1/chatml.md", IM, "<|im_end|>"),
    Format("llama-3", f"{LLAMA_DOCS}/meta-llama-3", HEADERS, "<|eot_id|>", bos="<|begin_of_text|>"),
    Format(
        "llama-3.1",
        f"{LLAMA_DOCS}/llama3_1",
        HEADERS,
        "<|eot_id|>",
        bos="<|begin_of_text|>",
        roles=(*WITH_TOOLS, "ipython"),
    ),
    Format("mistral-v1", MISTRAL_DOCS, bos="<s>", eos="</s>"),
    Format("mistral-v3", MISTRAL_DOCS, ("[INST]", "[/INST]"), bos="<s>", eos="</s>"),
    Format("mistral-v3-tekken", MISTRAL_DOCS, ("[INST]", "[/INST]"), bos="<s>", eos="</s>"),
    Format(
        "mistral-v7",
        MISTRAL_DOCS,
        ("[INST]", "[/INST]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]"),
        bos="<s>",
        eos="</s>",
    ),
    Format("gemma-2", f"{HUB}/google/gemma-2-9b-it", TURNS, "<end_of_turn>", bos="<bos>"),
    Format("gemma-3", f"{HUB}/google/gemma-3-4b-it", TURNS, "<end_of_turn>", bos="<bos>"),
    Format("qwen-2.5", f"{HUB}/Qwen/Qwen2.5-7B-Instruct", IM, "<|im_end|>", roles=WITH_TOOLS),
    Format(
        "phi-3",
        f"{HUB}/microsoft/Phi-3-mini-4k-instruct",
        ("<|system|>", "<|user|>", "<|assistant|>", "<|end|>"),
        "<|end|>",
        eos="<|endoftext|>",
    ),
    Format("zephyr", f"{HUB}/HuggingFaceH4/zephyr-7b-beta", eos="</s>"),
    Format("vicuna", "https://github.com/lm-sys/FastChat/blob/main/fastchat/conversation.py", bos="<s>", eos="</s>"),
    Format("alpaca", f"{HUB}/datasets/tatsu-lab/alpaca", bos="<s>", eos="</s>"),
)
"""Every format, in the order in which errors and pages list them."""

ALIASES = {
    "mistral": "mistral-v3",
    "mistralv2": "mistral-v3",
    "gemma": "gemma-3",
    "qwen": "qwen-2.5",
    "llama": "llama-3.1",
}
_NAMES = {re.sub(r"[-_. ]", "", known.name): known for known in FORMATS}


def find(name: str) -> Format:
    """The format called ``name``; case, dots, dashes and underscores do not matter.

    Raises:
        SlothConfigError: there is none; the message lists all names.
    """
    key = re.sub(r"[-_. ]", "", name.lower())
    key = re.sub(r"[-_. ]", "", ALIASES.get(key, key))
    if key in _NAMES:
        return _NAMES[key]
    close = difflib.get_close_matches(key, _NAMES, n=1)
    hint = f"; did you mean {_NAMES[close[0]].name!r}?" if close else "."
    names = ", ".join(known.name for known in FORMATS)
    raise SlothConfigError([f"unknown chat template {name!r}{hint} There are: {names}"])
