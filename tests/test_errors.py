"""Exceptions of reading a file, in words for people."""

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from mtp_graft.errors import in_words


@pytest.mark.parametrize(
    ("read", "words"),
    [
        (lambda: json.loads("{"), "not JSON: expecting property name .* at column 2"),
        (lambda: json.loads('{\n"a": }'), "not JSON: expecting value at line 2, column 6"),
        (b"\xff".decode, "not text in UTF-8"),
        (lambda: {}["text"], "has no 'text'"),
        (lambda: iter(json.loads("1")), "JSON of another structure"),
        (Path("/nowhere/at/all").read_text, "no such file or directory"),
        (lambda: int("x"), "invalid literal"),
    ],
)
def test_an_exception_is_said_without_its_class(read: Callable[[], object], words: str) -> None:
    with pytest.raises(Exception) as raised:
        read()
    assert re.match(words, in_words(raised.value))
