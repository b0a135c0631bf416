# SPDX-License-Identifier: Apache-2.0
"""vllm-merge experiment: what it prints, writes and asks a server."""

import json
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import numpy as np
import pytest

from tests.experiment_records import define, exposure, outcome
from vllm_merge.cli import admin_call
from vllm_merge.experiments.store import Store
from vllm_merge.serving.settings import ADMIN_TOKEN_VARIABLE


@pytest.fixture
def store(tmp_path, monkeypatch) -> str:
    """A store with an experiment in which b is better, and its outcomes."""
    path = str(tmp_path / "experiments.sqlite")
    monkeypatch.setenv("VLLM_MERGE_STORE", path)
    opened = Store.open(path)
    define(opened, guardrails=[{"metric": "errors", "max_increase": 0.5}])
    random = np.random.default_rng(1)
    exposures = [exposure(i, "ab"[i % 2], first_token=float(random.lognormal(-2, 0.2))) for i in range(400)]
    opened.add_exposures(exposures)
    scores = [outcome(i, float(random.random() + 0.2 * (i % 2)), arm="ab"[i % 2]) for i in range(400)]
    opened.add_outcomes(scores)
    opened.close()
    return path


def test_list(run, store):
    code, out, _ = run("experiment", "list")
    assert code == 0
    assert out.splitlines()[1].split()[:3] == ["ab", "1", "running"]
    code, out, _ = run("experiment", "list", "--json")
    assert json.loads(out)[0]["units"] == 400


def test_report(run, store):
    code, out, _ = run("experiment", "report", "ab")
    assert code == 0
    lines = out.splitlines()
    assert lines[0] == "ab, version 1, running"
    assert lines[1].startswith("b is better than a: score +0.")
    for section in ("arms", "metrics", "differences from control", "latencies", "guardrails"):
        assert section in lines
    facts = json.loads(run("experiment", "report", "ab", "--json")[1])
    assert facts["verdict"]["arm"] == "b"


def test_report_as_a_page_and_plots(run, store, tmp_path):
    page, plots = tmp_path / "report.html", tmp_path / "plots"
    code, out, _ = run("experiment", "report", "ab", "--html", page, "--plots", plots)
    assert code == 0
    names = sorted(path.name for path in plots.iterdir())
    assert names == ["course.png", "course.svg", "metrics.png", "metrics.svg"]
    assert out.count("wrote ") == 5
    assert (plots / "course.png").read_bytes().startswith(b"\x89PNG")
    text = page.read_text(encoding="utf-8")
    assert "b is better than a" in text
    assert "<script" not in text
    assert "http://" not in text.replace("http://www.w3.org", "")
    assert text.count("<figure>") == 2
    assert not list(tmp_path.glob(".report*"))


def test_a_page_shows_names_as_they_are(run, store, tmp_path):
    opened = Store.open(store)
    opened.add_outcomes([outcome(900 + i, 1.0, metric="said", label="<b>&", arm="ab"[i % 2]) for i in range(4)])
    opened.close()
    assert run("experiment", "report", "ab", "--html", tmp_path / "p.html")[0] == 0
    assert "said=&lt;b&gt;&amp;" in (tmp_path / "p.html").read_text()


def test_figures_that_are_not_to_be_read_are_a_failure(run, store):
    opened = Store.open(store)
    opened.add_exposures([exposure(10_000 + i, "b") for i in range(300)])
    opened.close()
    code, out, _ = run("experiment", "report", "ab")
    assert (code, "Do not read these figures" in out) == (1, True)


@pytest.mark.parametrize(
    ("arguments", "what"),
    [
        (["report", "nope"], "no experiment 'nope'"),
        (["report", "ab", "--version", "9"], "has no version 9"),
        (["report", "ab", "--store", "/nowhere/x.sqlite"], "there is no store of experiments"),
        (["report", "ab", "--store", "mysql://u:secret@h/d"], "is of mysql"),
        (["export", "{store}"], "is not a folder"),
        (["export", "out", "--name", "nope"], "no experiment 'nope'"),
        (["plan"], "say what control does today"),
        (["plan", "--share", "0.3"], "give one of --effect and --lift"),
        (["plan", "--share", "0.3", "--mean", "1", "--deviation", "1", "--lift", "0.1"], "say what control does today"),
        (["plan", "--share", "1.5", "--lift", "0.1"], "the share is 1.5"),
        (["plan", "--like", "nope", "--lift", "0.1"], "no experiment 'nope'"),
        (["promote", "ab", "b"], "set VLLM_MERGE_ADMIN_TOKEN"),
    ],
)
def test_what_is_asked_wrongly_is_said(run, store, arguments, what, monkeypatch):
    monkeypatch.delenv(ADMIN_TOKEN_VARIABLE, raising=False)
    code, _, err = run("experiment", *(argument.format(store=store) for argument in arguments))
    assert (code, what in err) == (2, True), err
    assert "secret" not in err


def test_plan(run, store):
    code, out, _ = run("experiment", "plan", "--share", "0.3", "--lift", "0.1", "--units-per-day", "2000", "--json")
    found = json.loads(out)
    assert (code, found["one_look"], found["effect"]) == (0, 3760, pytest.approx(0.03))
    code, out, _ = run("experiment", "plan", "--like", "ab", "--lift", "0.1")
    assert code == 0
    assert "units in each of 2 arms" in out


def test_export_and_prune(run, store, tmp_path):
    code, out, _ = run("experiment", "export", tmp_path / "out", "--format", "csv")
    assert code == 0
    assert "exposures.csv (400 rows)" in out
    assert len((tmp_path / "out" / "exposures.csv").read_text().splitlines()) == 401
    code, out, _ = run("experiment", "prune", "--days", "30", "--json")
    assert (code, json.loads(out)["exposures"]) == (0, 400)


@pytest.fixture
def server():
    """(URL, requests): answers what `requests.answer` says."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["content-length"])))
            requests.append((self.path, dict(self.headers.items()), body))
            status, text = answers.pop(0)
            self.send_response(status)
            self.end_headers()
            self.wfile.write(text.encode())

        def log_message(self, *_):
            pass

    requests, answers = [], []
    with HTTPServer(("127.0.0.1", 0), Handler) as made:
        threading.Thread(target=made.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{made.server_port}", requests, answers
        made.shutdown()


def test_promote_and_stop_ask_the_server(run, server, monkeypatch):
    url, requests, answers = server
    monkeypatch.setenv(ADMIN_TOKEN_VARIABLE, "a token")
    monkeypatch.setenv("VLLM_API_KEY", "a key")
    answers += [(200, "{}"), (200, "{}")]
    assert run("experiment", "promote", "ab", "b", "--server", f"{url}/v1", "--reason", "it won")[:2] == (
        0,
        "ab: everybody gets b\n",
    )
    assert run("experiment", "stop", "ab", "--server", url)[0] == 0
    (path, headers, body), (other, _, nothing) = requests
    assert (path, body) == ("/v1/merge/experiments/ab/promote", {"arm": "b", "reason": "it won"})
    assert (other, nothing) == ("/v1/merge/experiments/ab/stop", {"reason": ""})
    sent = {name.lower(): value for name, value in headers.items()}
    assert (sent["x-vllm-merge-admin-token"], sent["authorization"]) == ("a token", "Bearer a key")


@pytest.mark.parametrize(
    ("left", "said"),
    [
        (None, []),
        (
            {"alias": "assistant", "target": "m1", "before": "m0"},
            [
                "alias assistant still stands for m1, as it was promoted; POST /v1/merge/aliases/assistant/back moves it back "
                "to m0"
            ],
        ),
        (
            {"alias": "assistant", "target": "m1", "before": None},
            ["alias assistant still stands for m1, as it was promoted; POST /v1/merge/aliases/assistant moves it"],
        ),
    ],
)
def test_stop_names_the_alias_that_a_promotion_moved(run, server, monkeypatch, left, said):
    url, _, answers = server
    monkeypatch.setenv(ADMIN_TOKEN_VARIABLE, "a token")
    answers.append((200, json.dumps({"status": "stopped", "alias_left": left})))
    code, out, _ = run("experiment", "stop", "ab", "--server", url)
    assert (code, out.splitlines()) == (0, ["ab: stopped; everybody gets control", *said])


@pytest.mark.parametrize(
    ("answer", "code", "what"),
    [
        ((404, '{"error": {"message": "no such experiment"}}'), 2, "404: no such experiment"),
        (
            (404, '{"detail":"Not Found"}'),
            2,
            "404: has no route /v1/merge/experiments/ab/stop: it was started without VLLM_MERGE_ADMIN_TOKEN, or is no vllm-merge "
            "server",
        ),
        ((404, "<html>nothing here</html>"), 2, "404: <html>nothing here"),
        ((403, '{"detail":"Not Found"}'), 2, "403: Not Found"),
        ((403, "{}"), 2, "403"),
        ((503, '{"error": {"message": "not now"}}'), 1, "503: not now"),
        ((200, "<html>"), 1, "is not JSON"),
    ],
)
def test_what_a_server_refuses_is_passed_on(run, server, monkeypatch, answer, code, what):
    url, _, answers = server
    monkeypatch.setenv(ADMIN_TOKEN_VARIABLE, "a token")
    answers.append(answer)
    found = run("experiment", "stop", "ab", "--server", url)
    assert (found[0], what in found[2]) == (code, True), found[2]


def test_a_server_that_is_not_there(run, monkeypatch):
    monkeypatch.setenv(ADMIN_TOKEN_VARIABLE, "a token")
    assert run("experiment", "stop", "ab", "--server", "http://127.0.0.1:1")[0] == 2
    assert run("experiment", "stop", "ab", "--server", "localhost")[0] == 2


def test_the_names_are_the_servers():
    admin = (
        Path(admin_call.__file__).parents[1] / "serving" / "routes" / "admin.py"
    )  # not imported: it needs the server's packages
    assert f'"{admin_call.TOKEN_HEADER}"' in admin.read_text()
    assert admin_call.TOKEN_VARIABLE == ADMIN_TOKEN_VARIABLE
