# SPDX-License-Identifier: Apache-2.0
"""The judge: what it is shown, what is made of what it says, and what is said when it fails."""

import asyncio

import pytest

from tests.serving.judging import judging
from vllm_merge.errors import UserInputError
from vllm_merge.serving.experiments.judge import MOST_CHARACTERS, Judge, JudgeFailed
from vllm_merge.serving.experiments.shadow_requests import question
from vllm_merge.serving.settings import JudgeSettings


def asked(judge, own="mine", other="theirs", *, turned=False, key="", request="why?"):
    settings = JudgeSettings(judge.url, "wise", key)
    return asyncio.run(Judge(settings).prefers(request, own, other, turned=turned))


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize(("likes", "worth"), [("theirs", 1.0), ("mine", 0.0), ("", 0.5)])
def test_its_word_means_the_same_in_either_order(turned, likes, worth):
    with judging() as judge:
        judge.likes = likes
        assert asked(judge, turned=turned, key="secret") == worth
        (text,) = judge.asked
        assert (text.index("theirs") < text.index("mine")) == turned
        assert judge.keys == ["Bearer secret"]


def test_long_texts_are_cut_and_words_of_the_template_are_text():
    with judging() as judge:
        asked(judge, own="{second}{request}", other="x" * 50_000)
        (text,) = judge.asked
        assert text.count("x" * MOST_CHARACTERS) == 1
        assert "{second}{request}" in text
        assert len(text) < 2 * MOST_CHARACTERS
        assert judge.keys == [None]


@pytest.mark.parametrize(
    ("status", "says", "message"),
    [(500, "", "status 500"), (200, "who knows", "neither A, B nor TIE"), (200, 7, "neither")],
)
def test_what_it_gets_wrong_is_said_without_what_it_was_asked(status, says, message):
    with judging() as judge:
        judge.status, judge.says = status, says
        with pytest.raises(JudgeFailed, match=message) as caught:
            asked(judge, request="a secret")
    assert "secret" not in str(caught.value)
    with pytest.raises(JudgeFailed, match="cannot be reached"):
        asked(judge)  # it has gone


@pytest.mark.parametrize(
    ("environment", "wrong"),
    [
        ({"VLLM_MERGE_JUDGE": "file:///etc/passwd", "VLLM_MERGE_JUDGE_MODEL": "m"}, "VLLM_MERGE_JUDGE is no URL"),
        ({"VLLM_MERGE_JUDGE": "http://user:password@host/v1"}, "VLLM_MERGE_JUDGE_MODEL; name"),
    ],
)
def test_wrong_settings_are_named_and_not_repeated(environment, wrong):
    with pytest.raises(UserInputError, match=wrong) as caught:
        JudgeSettings.read(environment)
    assert "passw" not in str(caught.value)


def test_settings():
    assert JudgeSettings.read({}) is None
    given = {"VLLM_MERGE_JUDGE": "http://h/v1/", "VLLM_MERGE_JUDGE_MODEL": "m", "VLLM_MERGE_JUDGE_KEY": "k-e-y"}
    found = JudgeSettings.read(given)
    assert found == JudgeSettings("http://h/v1", "m", "k-e-y")
    assert "k-e-y" not in repr(found)


@pytest.mark.parametrize(
    ("document", "text"),
    [
        ({"prompt": "why?"}, "why?"),
        ({"prompt": [1, 2]}, "[1, 2]"),
        (
            {
                "messages": [
                    {"role": "system", "content": "s"},
                    {"role": "user", "content": [{"type": "text", "text": "u"}]},
                ]
            },
            "system: s\n\nuser: u",
        ),
        ({"messages": [{"role": "assistant", "content": None}]}, "assistant: "),
    ],
)
def test_the_question_is_what_was_written(document, text):
    assert question(document) == text
