"""Fixtures that the tests of tokenizer healing have too."""

from integration_tests.plugins.tokenizer_healing.conftest import _protobuf, stdlib_lines, trained

__all__ = ["_protobuf", "stdlib_lines", "trained"]
