# SPDX-License-Identifier: Apache-2.0
"""Answers through the middleware, with a played front door and a played vLLM behind it."""

import asyncio
import contextlib
from types import SimpleNamespace

import httpx
import pytest
from starlette.applications import Starlette
from starlette.responses import JSONResponse, StreamingResponse
from starlette.routing import Route

from vllm_merge.experiments.running import follow
from vllm_merge.recipe.experiments import Experiment
from vllm_merge.serving.control.front import ArtifactUnavailable
from vllm_merge.serving.control.names import Name
from vllm_merge.serving.experiments.experiments import Experiments
from vllm_merge.serving.experiments.trials import Trials
from vllm_merge.serving.requests import outcome
from vllm_merge.serving.requests.middleware import MergeMiddleware

BASE = "the-base"
SAGEMAKERS, SAGEMAKERS_HEADER = "/invocations", "x-amzn-sagemaker-adapter-identifier"


class Door:
    """Knows some names; `cold` are those whose artifact is not in memory, `lost` those that fail in the engine."""

    def __init__(self):
        self.names = {
            "plain": Name("plain", "recipe", "1" * 64, "plain@1"),
            "strict": Name("strict", "recipe", "2" * 64, "strict@2", on_miss="reject"),
            "easy": Name("easy", "recipe", "3" * 64, "easy@3", on_miss="fallback", fallback="plain"),
            "based": Name("based", "recipe", "4" * 64, "based@4", on_miss="fallback", fallback="base"),
            "theirs": Name("theirs", "recipe", "5" * 64, "theirs@5", on_miss="fallback", fallback="vllms-own"),
            "hopeless": Name(
                "hopeless", "recipe", None, reason="it has no adapter", on_miss="fallback", fallback="plain"
            ),
        }
        self.names["alias"] = Name("alias", "alias", "3" * 64, "easy@3", on_miss="fallback", fallback="plain")
        self.artifacts = {n.digest: n.label for n in self.names.values() if n.digest}
        self.cold: set[str] = set()
        self.lost: set[str] = set()
        self.held: list[str] = []

    def known(self, name):
        return self.names.get(name) or next((n for n in self.names.values() if n.label == name), None)

    def owns(self, path):
        return path.startswith("vllm-merge://")

    @contextlib.asynccontextmanager
    async def hold(self, artifact, label, *, wait=True):
        if artifact in self.cold:
            if wait:
                self.cold.discard(artifact)
            else:
                raise ArtifactUnavailable(f"{artifact} is being merged", retry=True, retry_after=9)
        self.held.append(artifact)
        try:
            yield
        finally:
            self.held.remove(artifact)


@pytest.fixture
def door():
    return Door()


@pytest.fixture
def ask(door):
    """ask(path, model, …) is the response of a server whose engine takes leases as vLLM's does."""

    async def generate(request):
        model = (await request.json())["model"]
        if request.url.path == SAGEMAKERS:  # as vLLM does there
            model = request.headers.get(SAGEMAKERS_HEADER, BASE)
        known = door.known(model)
        if known is not None and known.digest is not None:
            outcome.note_label(known.label)
            if known.label in door.lost:
                error = ArtifactUnavailable(f"{known.label} was gone", retry=True, retry_after=4)
                outcome.note_error(error)
                return JSONResponse({"error": "internal"}, 500)
        answer = JSONResponse({"model": model, "held": list(door.held)})
        if request.query_params.get("stream"):
            return StreamingResponse(iter([answer.body]))
        return answer

    routes = [Route(path, generate, methods=["POST"]) for path in ("/v1/completions", "/pooling", SAGEMAKERS)]
    app = Starlette(routes=routes)
    app.add_middleware(MergeMiddleware)
    listed = [name for name, known in door.names.items() if known.digest]
    requests = {name: SimpleNamespace(lora_path="vllm-merge://x") for name in [*listed, *door.artifacts.values()]}
    requests["vllms-own"] = SimpleNamespace(lora_path="/adapters/own")
    models = SimpleNamespace(lora_requests=requests, base_model_paths=[SimpleNamespace(name=BASE)])
    app.state.vllm_merge, app.state.openai_serving_models = door, models
    app.state.vllm_merge_experiments = Experiments(door, lambda: BASE)

    def ask(path, model, *, user=None, **query):
        async def talk():
            transport = httpx.ASGITransport(app)
            async with httpx.AsyncClient(transport=transport, base_url="http://server") as client:
                body = {"model": "nobody" if path == SAGEMAKERS else model, "user": user}
                return await client.post(path, json=body, params=query, headers={SAGEMAKERS_HEADER: model})

        return asyncio.run(talk())

    ask.experiments = app.state.vllm_merge_experiments
    return ask


def headers(response) -> tuple[str | None, ...]:
    return tuple(response.headers.get(f"x-vllm-merge-{name}") for name in ("artifact", "name", "fallback"))


@pytest.mark.parametrize("query", [{}, {"stream": "1"}])
def test_the_artifact_is_leased_until_the_answer_is_sent(ask, door, query):
    response = ask("/v1/completions", "alias", **query)
    assert response.json() == {"model": "easy@3", "held": ["easy@3"]}
    assert headers(response) == ("easy@3", "alias", None)
    assert door.held == []


def test_by_default_a_request_waits(ask, door):
    door.cold = {"plain@1"}
    assert ask("/v1/completions", "plain").json()["model"] == "plain@1"


def test_reject_is_a_503_that_says_when(ask, door):
    assert ask("/v1/completions", "strict").status_code == 200
    door.cold = {"strict@2"}
    response = ask("/v1/completions", "strict")
    assert (response.status_code, response.headers["retry-after"]) == (503, "9")
    assert response.json()["error"]["message"] == "The model `strict` cannot be served: strict@2 is being merged"
    assert response.json()["error"]["type"] == "merge_unavailable"


@pytest.mark.parametrize(
    ("name", "cold", "answers", "instead_of"),
    [
        ("easy", "easy@3", "plain@1", "easy@3"),
        ("alias", "easy@3", "plain@1", "easy@3"),
        ("based", "based@4", BASE, "based@4"),
        ("theirs", "theirs@5", "vllms-own", "theirs@5"),
        ("hopeless", "", "plain@1", "hopeless"),
    ],
)
def test_a_stand_in_answers_and_the_headers_say_so(ask, door, name, cold, answers, instead_of):
    door.cold = {cold}
    response = ask("/v1/completions", name)
    assert response.json()["model"] == answers
    assert headers(response) == (answers, name, instead_of)
    if cold:
        door.cold = set()
        assert headers(ask("/v1/completions", name))[2] is None


def test_a_stand_in_that_is_cold_too_does_not_keep_anybody_waiting(ask, door):
    door.cold = {"easy@3", "plain@1"}
    response = ask("/v1/completions", "easy")
    assert (response.status_code, response.headers["retry-after"]) == (503, "9")


@pytest.mark.parametrize("path", ["/v1/completions", "/pooling", SAGEMAKERS])
def test_what_fails_in_the_engine_is_a_503_that_says_when(ask, door, path):
    door.lost = {"plain@1"}
    response = ask(path, "plain")
    assert (response.status_code, response.headers["retry-after"]) == (503, "4")
    assert "plain@1 was gone" in response.json()["error"]["message"]
    assert response.headers["x-vllm-merge-name"] == "plain"


@pytest.mark.parametrize("path", ["/pooling", SAGEMAKERS])
def test_routes_outside_of_the_key_check_start_nothing_and_get_their_headers(ask, door, path):
    door.cold = {"strict@2"}
    response = ask(path, "strict")
    assert response.json() == {"model": "strict", "held": []}, "vLLM decides first"
    assert headers(response) == ("strict@2", "strict", None)


def test_a_name_without_an_artifact_says_why(ask, door):
    door.names["alone"] = Name("alone", "recipe", None, reason="adapter x cannot be read")
    response = ask("/v1/completions", "alone")
    assert (response.status_code, response.headers["x-should-retry"]) == (500, "false")
    assert "adapter x cannot be read" in response.text


@pytest.mark.parametrize("path", ["/v1/completions", "/pooling", SAGEMAKERS])
def test_other_models_pass_through(ask, path):
    for model in (BASE, "vllms-own", "nobody"):
        response = ask(path, model)
        assert response.json()["model"] == model
        assert headers(response) == (None, None, None)


@pytest.fixture
def ask_ab(ask, door):
    """ask, where `ab` is an experiment of `plain`, `strict` and the base model."""
    arms = {"plain": 1, "strict": 1, "none": {"serve": "base", "weight": 1}}
    experiment = Experiment.model_validate({"arms": arms, "unit": "user"})
    artifacts = {"plain": "plain@1", "strict": "strict@2", "none": BASE}
    door.names["ab"] = Name("ab", "experiment", "1" * 64, "plain@1")
    ask.experiments.adopt(Trials({"ab": follow("ab", experiment, artifacts, None)}))
    return ask


@pytest.mark.parametrize("path", ["/v1/completions", "/pooling", SAGEMAKERS])
def test_every_route_gives_a_unit_its_arm(ask_ab, path):
    seen = {}
    for user in [f"user-{i}" for i in range(24)]:
        response = ask_ab(path, "ab", user=user)
        arm = response.headers["x-vllm-merge-arm"]
        seen[arm] = response.json()["model"]
        assert headers(response) == (seen[arm], "ab", None)
        assert ask_ab("/v1/completions", "ab", user=user).headers["x-vllm-merge-arm"] == arm
    assert seen == {"plain": "plain@1", "strict": "strict@2", "none": BASE}


def test_no_other_stands_in_for_an_arm_and_a_503_says_which_arm_it_was(ask_ab, door):
    user = next(
        f"u{i}" for i in range(99) if ask_ab("/v1/completions", "ab", user=f"u{i}").json()["model"] == "strict@2"
    )
    door.cold = {"strict@2"}
    assert ask_ab("/v1/completions", "ab", user=user).json()["model"] == "strict@2", (
        "on_miss: reject is for its own name"
    )
    door.lost = {"strict@2"}
    response = ask_ab("/v1/completions", "ab", user=user)
    assert response.status_code == 503
    assert [response.headers[f"x-vllm-merge-{key}"] for key in ("experiment", "arm", "artifact", "reason")] == [
        "ab",
        "strict",
        "strict@2",
        "SPLIT",
    ]
