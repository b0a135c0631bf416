# SPDX-License-Identifier: Apache-2.0
"""Patterns of module names: what PEFT's matching by Python's regular expressions gives, but in bounded time."""

import re
import time

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from vllm_merge.adapters.name_patterns import MAX_LENGTH, PatternError, compile_pattern

NAMES = ["layers.0.q", "layers.1.q", "layers.11.q", "x.layers.1.q", "k-proj", "q", "a", "aa", "ab.a", "b.aab", "", "."]

ATOMS = st.sampled_from(
    ["a", "b", ".", r"\.", r"\d", "[ab]", "[^a]", "q", "layers", "-", "1", "$", "^", r"\w", "[]a]", r"[\[^]", r"\["]
)
PATTERNS = st.recursive(
    ATOMS,
    lambda inner: st.one_of(
        st.tuples(inner, inner).map("".join),
        st.tuples(inner, inner).map(lambda pair: f"({pair[0]}|{pair[1]})"),
        st.tuples(inner, st.sampled_from(["*", "+", "?", "*?", "{2}", "{1,}", "{0,2}", "{0}"])).map(
            lambda pair: f"(?:{pair[0]}){pair[1]}"
        ),
    ),
    max_leaves=8,
)


def by_python(key: str, name: str) -> bool:
    return re.match(rf"(.*\.)?({key})$", name) is not None


@settings(max_examples=500, deadline=None)
@given(PATTERNS, st.lists(st.text("ab.1q-", max_size=12), max_size=3))
@example("^layers\\.[01]\\..*", [])
@example("a|", ["b."])
@example("(a*)*b", ["aab"])
def test_as_python_matches(key: str, names: list[str]) -> None:
    matches = compile_pattern(key)
    for name in NAMES + names:
        assert matches(name) == by_python(key, name), name


@pytest.mark.parametrize(
    "key",
    [
        r".*\.(q|k|v)_proj",
        r"model\.layers\.[0-9]+\.self_attn\.q_proj",
        r"layers\.(1[0-9]|2[0-7])\.mlp\.(gate|up)_proj",
        "layers.0.mlp.up_proj",
        r"^model\.layers\.3\..*$",
        r"(?:self_attn|mlp)\.\w+",
    ],
)
def test_what_people_write(key: str) -> None:
    names = [f"model.layers.{i}.{part}" for i in range(30) for part in ("self_attn.q_proj", "mlp.up_proj")]
    matches = compile_pattern(key)
    found = [matches(name) for name in names]
    assert found == [by_python(key, name) for name in names]
    assert any(found)


@pytest.mark.parametrize(
    "key", ["(a+)+$", "(a|a)*$", "(a|aa)+$", "(.*)*x", ".*.*.*.*.*.*x", "((a*)*)*b", "(a?){60}a{60}", "(\\w*\\.?)*$x"]
)
def test_hostile_patterns_are_quick(key: str) -> None:
    matches = compile_pattern(key)
    started = time.process_time()
    for name in ("a" * 500 + "!", "a." * 200 + "!", "a" * 60):
        matches(name)
    assert time.process_time() - started < 2


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ("q(", "is not a regular expression (missing ), unterminated subpattern)"),
        ("*", "is not a regular expression (nothing to repeat)"),
        ("a" * (MAX_LENGTH + 1), "has 513 characters; at most 512 are allowed"),
        ("(?=a)", "has a group (?…), which is not supported; only (…) and (?:…) are"),
        (r"(a)\1", r"has \1, which is not supported; \d, \w, \s and escaped signs are"),
        (r"a\b", r"has \b, which is not supported; \d, \w, \s and escaped signs are"),
        ("a{65}", "repeats something more than 64 times; write it shorter"),
        ("(((a{50}){50}){50})", "needs more than 2000 states; write it shorter"),
        ("[[a]", "has a class with one of '[', '--', '&&', '||', '~~' in it; put a backslash before it"),
        ("a*+", "has a possessive operator, which is not supported; leave out its '+'"),
        ("a{99999999999999999999}", "is not a regular expression (the repetition number is too large)"),
    ],
)
def test_refused(key: str, message: str) -> None:
    with pytest.raises(PatternError) as caught:
        compile_pattern(key)
    assert str(caught.value) == message
