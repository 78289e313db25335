"""Probe texts: short, fixed, and each there for a way in which conversions of tokenizers go wrong."""

from __future__ import annotations

import re

SPACES = (
    " ", "  ", "   ", " lead", "  lead", "trail ", "trail  ", "a b", "a  b", "a  b   c", "a    b", " a ", "\u2581",
    "\u2581x", "a\u2581b", " \u2581 ", "\u00a0", "a\u00a0b", "\u3000", "a\u3000b", "\u2003x", "\u200b", "a\u200bb",
    "\ufeffx", "x" + " " * 9 + "y", "x" + " " * 18 + "y",
)  # fmt: skip
LINES = (
    "\n", "\n\n", "\n\n\n", "a\nb", "a\n\nb", "a\n b", "a \nb", "\na", "a\n", "\r\n", "a\r\nb", "\t", "\t\t", "a\tb",
    "\n\t\tx",
)  # fmt: skip
RUNS = tuple(
    unit * count
    for unit in (" ", "\n", "\t", "a", "=", "-", ".", "0", "\u00e9", "\u4e2d", "\U0001f600", "ab", " a", "_")
    for count in (4, 7, 15, 16, 17, 31, 33, 64)
)
WORDS = (
    "Hello world", "hello, World!", "don't", "it's", "HELLO", "iPhone", "ünïcödé", "naïve café", "Straße", "e\u0301",
    "\ufb01n", "\u2460\u00bd\u2122", "The quick brown fox jumps over the lazy dog.", "antidisestablishmentarianism",
    "\u201cquoted\u201d \u2014 dash\u2026", "a.b,c;d:e!f?g", "user@example.com", "https://example.com/a_b?c=d&e=%20#f",
)  # fmt: skip
NUMBERS = (
    "0", "12", "123", "1234", "1234567890", "3.14159", "1,000,000", "-5", "1e-16", "0x1F", "２０", "٣٤٥", "10 000",
)  # fmt: skip
SCRIPTS = (
    "你好，世界", "日本語のテキスト", "ひらがなカタカナ", "한국어 문장입니다", "Привет, мир", "Γειά σου Κόσμε",
    "مرحبا بالعالم", "שלום עולם", "नमस्ते दुनिया", "สวัสดีชาวโลก", "Xin chào thế giới", "გამარჯობა", "ሰላም ልዑል",
    "བོད་སྐད", "𝕳𝖊𝖑𝖑𝖔", "𓀀𓂀", "mixed 中文 and عربي text",
)  # fmt: skip
SYMBOLS = (
    "😀", "👍🏽", "👨‍👩‍👧‍👦", "🇫🇷", "a😀b 😀", "∑∫√≤", "→⇒", "£€¥₿", "\u202eabc", "\ufffd", "\u0301", "\x00",
    "\x01\x02", "a\x07b", "\x1b[0m", "\x7f\x80\x9f", "\ue000", "\U0010fffd", "<0x0A>", "##a", "Ġa", "</w>",
)  # fmt: skip
CODE = (
    "def f(x):\n    return x + 1\n", "for (int i = 0; i < n; ++i) {\n\ta[i] *= 2;\n}", "if x:\n        y = {'a': [1]}",
    '{"key": "value", "n": null}', "<div class='x'>\n  <b>y</b>\n</div>", "SELECT * FROM t WHERE a='b';",
    'x = "\\n\\t"', "| a | b |\n|---|---|\n| 1 | 2 |", "$\\frac{a}{b}$", "git commit -m 'x' && ls -la /tmp",
    "snake_case camelCase PascalCase",
)  # fmt: skip

PROBES: tuple[str, ...] = SPACES + LINES + RUNS + WORDS + NUMBERS + SCRIPTS + SYMBOLS + CODE
"""All probe texts; a tokenizer encodes them in some milliseconds."""

CONVERSATION = (
    {"role": "user", "content": "What is the capital of France?"},
    {"role": "assistant", "content": "Paris."},
)
"""What every chat template can render."""


def without(texts: tuple[str, ...], forbidden: list[str]) -> list[str]:
    """The texts that contain none of the ``forbidden`` strings, which a tokenizer cuts out before it encodes."""
    if not any(forbidden):
        return list(texts)
    pattern = re.compile("|".join(map(re.escape, filter(None, forbidden))))
    return [text for text in texts if not pattern.search(text)]
