"""What each chat format looks like, written by hand from the page that documents it.

``prompt``: a question, ready for the answer. ``turns``: system, question, answer, question, ready for the second
answer. ``ended``: question and answer, as trained on. ``{bos}`` and ``{eos}`` stand for the tokenizer's own.
"""

from __future__ import annotations

from dataclasses import dataclass

SYSTEM, HELLO, HI, BYE = "Be brief.", "Hello?", "Hi there.", "Bye!"

user = {"role": "user", "content": HELLO}
answer = {"role": "assistant", "content": HI}
again = {"role": "user", "content": BYE}
system = {"role": "system", "content": SYSTEM}

CONVERSATIONS = {
    "prompt": [user],
    "turns": [system, user, answer, again],
    "ended": [user, answer],
}


@dataclass(frozen=True)
class Card:
    """One format as documented: the page, and three renderings; ``turns`` is None where system is refused."""

    source: str
    prompt: str
    turns: str | None
    ended: str


CARDS = {
    # OpenAI's description of Chat Markup Language.
    "chatml": Card(
        "https://github.com/openai/openai-python/blob/v0.28.1/chatml.md",
        prompt="<|im_start|>user\nHello?<|im_end|>\n<|im_start|>assistant\n",
        turns="<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHello?<|im_end|>\n"
        "<|im_start|>assistant\nHi there.<|im_end|>\n<|im_start|>user\nBye!<|im_end|>\n<|im_start|>assistant\n",
        ended="<|im_start|>user\nHello?<|im_end|>\n<|im_start|>assistant\nHi there.<|im_end|>\n",
    ),
    # Meta's prompt format page.
    "llama-3": Card(
        "https://www.llama.com/docs/model-cards-and-prompt-formats/meta-llama-3",
        prompt="{bos}<|start_header_id|>user<|end_header_id|>\n\nHello?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n",
        turns="{bos}<|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nHello?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\nHi there.<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nBye!<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n",
        ended="{bos}<|start_header_id|>user<|end_header_id|>\n\nHello?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\nHi there.<|eot_id|>",
    ),
    "llama-3.1": Card(
        "https://www.llama.com/docs/model-cards-and-prompt-formats/llama3_1",
        prompt="{bos}<|start_header_id|>system<|end_header_id|>\n\n"
        "Cutting Knowledge Date: December 2023\nToday Date: 26 Jul 2024\n\n<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nHello?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n",
        turns="{bos}<|start_header_id|>system<|end_header_id|>\n\n"
        "Cutting Knowledge Date: December 2023\nToday Date: 26 Jul 2024\n\nBe brief.<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nHello?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\nHi there.<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nBye!<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n",
        ended="{bos}<|start_header_id|>system<|end_header_id|>\n\n"
        "Cutting Knowledge Date: December 2023\nToday Date: 26 Jul 2024\n\n<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nHello?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\nHi there.<|eot_id|>",
    ),
    # Mistral's cookbook, "Chat templates": one table row a version.
    "mistral-v1": Card(
        "https://github.com/mistralai/cookbook/blob/main/concept-deep-dive/tokenization/chat_templates.md",
        prompt="{bos} [INST] Hello? [/INST]",
        turns="{bos} [INST] Be brief.\n\nHello? [/INST] Hi there.{eos} [INST] Bye! [/INST]",
        ended="{bos} [INST] Hello? [/INST] Hi there.{eos}",
    ),
    "mistral-v3": Card(
        "https://github.com/mistralai/cookbook/blob/main/concept-deep-dive/tokenization/chat_templates.md",
        prompt="{bos}[INST] Hello?[/INST]",
        turns="{bos}[INST] Hello?[/INST] Hi there.{eos}[INST] Be brief.\n\nBye![/INST]",
        ended="{bos}[INST] Hello?[/INST] Hi there.{eos}",
    ),
    "mistral-v3-tekken": Card(
        "https://github.com/mistralai/cookbook/blob/main/concept-deep-dive/tokenization/chat_templates.md",
        prompt="{bos}[INST]Hello?[/INST]",
        turns="{bos}[INST]Hello?[/INST]Hi there.{eos}[INST]Be brief.\n\nBye![/INST]",
        ended="{bos}[INST]Hello?[/INST]Hi there.{eos}",
    ),
    "mistral-v7": Card(
        "https://huggingface.co/mistralai/Mistral-Large-Instruct-2411",
        prompt="{bos}[INST] Hello?[/INST]",
        turns="{bos}[SYSTEM_PROMPT] Be brief.[/SYSTEM_PROMPT][INST] Hello?[/INST] Hi there.{eos}[INST] Bye![/INST]",
        ended="{bos}[INST] Hello?[/INST] Hi there.{eos}",
    ),
    # "Chat Template" on the cards; the second also in Google's "Gemma formatting and system instructions".
    "gemma-2": Card(
        "https://huggingface.co/google/gemma-2-9b-it",
        prompt="{bos}<start_of_turn>user\nHello?<end_of_turn>\n<start_of_turn>model\n",
        turns=None,
        ended="{bos}<start_of_turn>user\nHello?<end_of_turn>\n<start_of_turn>model\nHi there.<end_of_turn>\n",
    ),
    "gemma-3": Card(
        "https://ai.google.dev/gemma/docs/core/prompt-structure",
        prompt="{bos}<start_of_turn>user\nHello?<end_of_turn>\n<start_of_turn>model\n",
        turns="{bos}<start_of_turn>user\nBe brief.\n\nHello?<end_of_turn>\n"
        "<start_of_turn>model\nHi there.<end_of_turn>\n"
        "<start_of_turn>user\nBye!<end_of_turn>\n<start_of_turn>model\n",
        ended="{bos}<start_of_turn>user\nHello?<end_of_turn>\n<start_of_turn>model\nHi there.<end_of_turn>\n",
    ),
    "qwen-2.5": Card(
        "https://qwen.readthedocs.io/en/v2.5/getting_started/concepts.html",
        prompt="<|im_start|>system\nYou are Qwen, created by Alibaba Cloud. You are a helpful assistant.<|im_end|>\n"
        "<|im_start|>user\nHello?<|im_end|>\n<|im_start|>assistant\n",
        turns="<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHello?<|im_end|>\n"
        "<|im_start|>assistant\nHi there.<|im_end|>\n<|im_start|>user\nBye!<|im_end|>\n<|im_start|>assistant\n",
        ended="<|im_start|>system\nYou are Qwen, created by Alibaba Cloud. You are a helpful assistant.<|im_end|>\n"
        "<|im_start|>user\nHello?<|im_end|>\n<|im_start|>assistant\nHi there.<|im_end|>\n",
    ),
    # "Chat Format" on the card; a finished text gets eos.
    "phi-3": Card(
        "https://huggingface.co/microsoft/Phi-3-mini-4k-instruct",
        prompt="<|user|>\nHello?<|end|>\n<|assistant|>\n",
        turns="<|system|>\nBe brief.<|end|>\n<|user|>\nHello?<|end|>\n<|assistant|>\nHi there.<|end|>\n"
        "<|user|>\nBye!<|end|>\n<|assistant|>\n",
        ended="<|user|>\nHello?<|end|>\n<|assistant|>\nHi there.<|end|>\n{eos}",
    ),
    # The comments in the card's example.
    "zephyr": Card(
        "https://huggingface.co/HuggingFaceH4/zephyr-7b-beta",
        prompt="<|user|>\nHello?{eos}\n<|assistant|>\n",
        turns="<|system|>\nBe brief.{eos}\n<|user|>\nHello?{eos}\n<|assistant|>\nHi there.{eos}\n"
        "<|user|>\nBye!{eos}\n<|assistant|>\n",
        ended="<|user|>\nHello?{eos}\n<|assistant|>\nHi there.{eos}\n",
    ),
    # FastChat's conversation "vicuna_v1.1": separators " " and eos after "ROLE: text".
    "vicuna": Card(
        "https://github.com/lm-sys/FastChat/blob/main/fastchat/conversation.py",
        prompt="{bos}A chat between a curious user and an artificial intelligence assistant. The assistant gives "
        "helpful, detailed, and polite answers to the user's questions. USER: Hello? ASSISTANT:",
        turns="{bos}Be brief. USER: Hello? ASSISTANT: Hi there.{eos}USER: Bye! ASSISTANT:",
        ended="{bos}A chat between a curious user and an artificial intelligence assistant. The assistant gives "
        "helpful, detailed, and polite answers to the user's questions. USER: Hello? ASSISTANT: Hi there.{eos}",
    ),
    # The column "text" of the data set, without an input.
    "alpaca": Card(
        "https://huggingface.co/datasets/tatsu-lab/alpaca",
        prompt="{bos}Below is an instruction that describes a task. Write a response that appropriately completes the "
        "request.\n\n### Instruction:\nHello?\n\n### Response:\n",
        turns="{bos}Be brief.\n\n### Instruction:\nHello?\n\n### Response:\nHi there.{eos}\n\n"
        "### Instruction:\nBye!\n\n### Response:\n",
        ended="{bos}Below is an instruction that describes a task. Write a response that appropriately completes the "
        "request.\n\n### Instruction:\nHello?\n\n### Response:\nHi there.{eos}",
    ),
}
