# SPDX-License-Identifier: Apache-2.0
"""Requests to a server: paced, counted, made again where it is busy; and what answers are worth."""

import math
import re
import threading

import pytest

from tests.search.played import ANSWER
from vllm_merge.errors import MergeError, UserInputError
from vllm_merge.evaluation.tasks import Example
from vllm_merge.search.budget import Budget, Ended
from vllm_merge.search.endpoint import Endpoint, Refused
from vllm_merge.search.examples import in_turns
from vllm_merge.search.metrics import Asking, Exact, Judge, LogProb, Regex, answer_logprobs, read_template
from vllm_merge.search.scores import estimate
from vllm_merge.search.scoring import ExampleScorer

BODY = {"model": "assistant", "prompt": "x", "max_tokens": 1}
HOW = Asking(8)


@pytest.fixture
def endpoint(merges):
    return Endpoint(f"{merges.url}/v1", Budget(), 8)


def test_a_busy_server_is_asked_again_and_others_wait(merges, endpoint):
    merges.refuse = lambda model, n: (503, "0.1") if n <= 3 else None
    assert endpoint.post("/completions", BODY)["model"] == "assistant"
    assert endpoint._budget.requests == 1, "what was refused is not counted"
    assert endpoint.pace.at_once < 8, "fewer at once after a refusal"
    for _ in range(60):
        endpoint.pace.answered()
    assert endpoint.pace.at_once == 8


def test_one_that_waits_alone_slows_nobody(merges, endpoint):
    merges.refuse = lambda model, n: (429, "0.1") if model == "slow" and n == 1 else None
    endpoint.post("/completions", {**BODY, "model": "slow"}, alone=True)
    assert endpoint.pace.at_once == 8


def test_a_refusal_that_does_not_end_is_an_error(merges, endpoint, monkeypatch):
    monkeypatch.setattr("vllm_merge.search.endpoint.PATIENCE_SECONDS", 0.3)
    merges.refuse = lambda model, n: (503, "0.2")
    with pytest.raises(Refused, match="503: refused assistant"):
        endpoint.post("/completions", BODY)


def test_no_more_requests_are_under_way_than_may_be(merges):
    endpoint = Endpoint(merges.url, Budget(), 3)
    examples = [Example("t", f"q{i}", ANSWER) for i in range(40)]
    scorer = ExampleScorer(endpoint, Exact(HOW), examples, 16)
    values = scorer.values_of("assistant", 0, 40)
    scorer.close()
    assert len(values) == len(merges.asked) == 40
    assert merges.most <= 3


def test_the_budget_ends_requests_and_those_that_wait(merges):
    endpoint = Endpoint(merges.url, Budget(requests=2), 8)
    for _ in range(2):
        endpoint.post("/completions", BODY)
    with pytest.raises(Ended, match="2 requests were made"):
        endpoint.post("/completions", BODY)
    stop = threading.Event()
    waiting = Endpoint(merges.url, Budget(stopped=stop.is_set), 8)
    merges.refuse = lambda model, n: (stop.set(), (503, "60"))[1]
    with pytest.raises(Ended, match="it was stopped"):
        waiting.post("/completions", BODY)


@pytest.mark.parametrize("url", ["localhost:8000", "ftp://x", "http://", "http://host:port"])
def test_what_is_no_url_is_refused(url):
    with pytest.raises(UserInputError, match="is not a URL"):
        Endpoint(url, Budget(), 1)


def test_nobody_there_is_said(merges):
    merges.close()
    with pytest.raises(UserInputError, match="cannot be reached"):
        Endpoint(merges.url, Budget(), 1).post("/completions", BODY)


def test_keys_go_to_their_own_server(merges, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "the-server's")
    monkeypatch.setenv("JUDGE_API_KEY", "the-judge's")
    Endpoint(merges.url, Budget(), 1).post("/completions", BODY)
    Endpoint(merges.url, Budget(), 1, option="--judge", keys=("JUDGE_API_KEY",)).post("/completions", BODY)
    assert merges.keys == {"Bearer the-server's", "Bearer the-judge's"}


def said(text):
    return lambda path, body: {"choices": [{"text": text, "message": {"content": text}}]}


@pytest.mark.parametrize(
    ("metric", "text", "answer", "wanted"),
    [
        (Exact(HOW), "\n right \nmore", "right", 1),
        (Exact(HOW), "right!", "right", 0),
        (Exact(Asking(8, chat=True)), "right", "right", 1),
        (Regex(HOW, re.compile(r"#### (-?\d+)")), "so\n#### 42", "42", 1),
        (Regex(HOW, re.compile(r"#### (-?\d+)")), "#### 41", "42", 0),
        (Regex(HOW, re.compile(r"\d+")), "about 42 of", "42", 1),
        (Regex(HOW, re.compile(r"a|(b)")), "a", "a", 0),
        (Regex(HOW), "It is Paris.", "(?i)paris", 1),
        (Regex(HOW), "It is Rome.", "(?i)paris", 0),
    ],
)
def test_right_or_wrong(metric, text, answer, wanted):
    assert metric.value(said(text), "m", Example("t", "p", answer)) == wanted


def test_log_probabilities_are_those_of_the_answer_alone(endpoint):
    values, likeliest = answer_logprobs(endpoint.post, "merge:ties(sql,code;lambda=2)", "question 1", ANSWER)
    assert (values, likeliest) in (([-0.5, -0.25], True), ([-2.0, -4.0], False))
    mean = LogProb().value(endpoint.post, "merge:ties(sql,code;lambda=2)", Example("t", "question 1", ANSWER))
    assert mean == sum(values) / 2


def test_a_server_without_log_probabilities_is_said():
    with pytest.raises(MergeError, match="gave no log probabilities"):
        answer_logprobs(said("x"), "m", "p", "a")


def test_a_judge_sees_question_reference_and_answer_and_nothing_of_them_is_a_template():
    seen = []

    def judge(path, body):
        seen.append(body["messages"][0]["content"])
        return {"choices": [{"message": {"content": "8 of 10"}}]}

    metric = Judge(HOW, judge, "judge", "Q {prompt} R {reference} A {answer}")
    assert metric.value(said("{reference}"), "m", Example("t", "why", "because")) == 0.8
    assert seen == ["Q why R because A {reference}"]
    for text, wanted in (("12", 1.0), ("-", 0.0), ("Grade: 7.5/10", 0.75)):
        assert Judge(HOW, said(text), "j").value(said("x"), "m", Example("t", "p", "a")) == wanted


def test_a_judge_prompt_needs_the_answer(tmp_path):
    (tmp_path / "j").write_text("Grade {prompt}")
    with pytest.raises(UserInputError, match=r"has no \{answer\}"):
        read_template(tmp_path / "j")


def test_every_first_part_of_the_examples_has_all_tasks():
    tasks = ["a"] * 10 + ["b"] * 20 + ["c"] * 4
    order = in_turns(tasks, 0)
    assert sorted(order) == list(range(34))
    for count in (3, 6, 9, 12):
        assert {task: [tasks[i] for i in order[:count]].count(task) for task in "abc"} == dict.fromkeys(
            "abc", count // 3
        )
    assert order == in_turns(tasks, 0) != in_turns(tasks, 1)


def test_estimates_have_intervals():
    shares = estimate(["a", "a", "b", "b"], [1, 0, 1, 1], shares=True)
    assert shares.mean.mean == 0.75
    assert shares.tasks["b"].high == 1
    assert 0 < shares.mean.low < 0.75 < shares.mean.high <= 1
    reals = estimate(["a"] * 4, [-1.0, -2.0, -3.0, -2.0], shares=False)
    assert reals.mean.mean == -2
    assert reals.mean.low == pytest.approx(-2 - 3.182446 * math.sqrt(2 / 3) / 2)
    assert estimate(["a"], [-1.0], shares=False).mean.low == -math.inf
    right = estimate(["a"] * 6, [1.0] * 5 + [0.0], shares=False)  # of a metric that may be anything, here a share
    assert right == estimate(["a"] * 6, [1.0] * 5 + [0.0], shares=True)
    assert right.mean.high < 1
