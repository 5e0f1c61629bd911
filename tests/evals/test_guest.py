"""What crosses between a program and its tests."""

from collections import Counter
from decimal import Decimal
from fractions import Fraction
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mtp_graft.bench.evals.guest import Foreign, decode, encode

PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text() | st.binary()
    | st.floats(allow_nan=False) | st.complex_numbers(allow_nan=False),
    lambda inner: st.lists(inner, max_size=4)
    | st.lists(inner, max_size=4).map(tuple)
    | st.dictionaries(st.integers() | st.text() | st.tuples(st.booleans()), inner, max_size=4)
    | st.frozensets(st.integers() | st.text(), max_size=4),
    max_leaves=20,
)  # fmt: skip


@given(PLAIN)
def test_decode_undoes_encode(value: Any) -> None:
    found = decode(encode(value))
    assert found == value and type(found) is type(value)
    assert repr(found) == repr(value) or isinstance(value, frozenset) or "frozenset" in repr(value)


def test_special_values_cross() -> None:
    for value in (Decimal("0.10"), Fraction(-1, 3), range(2, 9, 3), {1, 2}, bytearray(b"x")):
        assert decode(encode(value)) == value
    assert decode(encode(10**6000)) == 10**6000, "longer than int() reads in decimal"
    assert decode(encode(Counter("aab"))) == {"a": 2, "b": 1}
    foreign = decode(encode(object()))
    assert isinstance(foreign, Foreign) and foreign != foreign.type_name
    with pytest.raises(TypeError, match="not iterable"):
        list(foreign)


@pytest.mark.parametrize("value", [{"int": "1", "float": "1"}, {"eval": "1"}, 3, 1.5])
def test_what_encode_never_gives_is_refused(value: Any) -> None:
    with pytest.raises(ValueError, match="not an encoded value"):
        decode(value)
