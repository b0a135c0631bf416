# SPDX-License-Identifier: Apache-2.0
"""The dashboard, the alert rules and docs/metrics.md speak of the metrics that there are, with the labels that they have."""

import json
import re
from pathlib import Path

import pytest
import yaml

from vllm_merge.serving.telemetry.metrics import HEADINGS, METRICS, tables

ROOT = Path(__file__).resolve().parents[2]
DASHBOARD = json.loads((ROOT / "deploy" / "grafana" / "vllm-merge.json").read_text())
RULES = yaml.safe_load((ROOT / "deploy" / "prometheus" / "alerts.yaml").read_text())
DOCUMENT = (ROOT / "docs" / "metrics.md").read_text()
NAME = re.compile(r"vllm_merge_[a-z_]+")
PARTS = ("_bucket", "_sum", "_count")
OF_THE_SCRAPE = {"job", "instance", "le"}


def expressions() -> dict[str, str]:
    """Every expression of the dashboard, of the rules and of the page, by where it stands."""
    panels = {
        f"{panel['title']} {target['refId']}": target["expr"]
        for panel in DASHBOARD["panels"]
        for target in panel.get("targets", ())
    }
    variables = {v["name"]: v["query"] for v in DASHBOARD["templating"]["list"] if v["type"] == "query"}
    rules = {rule["alert"]: rule["expr"] for group in RULES["groups"] for rule in group["rules"]}
    page = dict(enumerate(re.findall(r"\| `([^`|]*vllm_merge[^`|]*[({][^`|]*)`", DOCUMENT)))
    return {**panels, **variables, **rules, **{f"docs/metrics.md {k}": v for k, v in page.items()}}


def metric_of(name: str) -> str:
    """The metric that a sample belongs to."""
    for part in PARTS:
        base = name.removesuffix(part)
        if base != name and base in METRICS and METRICS[base].kind == "histogram":
            return base
    return name


def problems(expression: str) -> list[str]:
    found = []
    for match in NAME.finditer(expression):
        name = metric_of(match[0])
        if name not in METRICS:
            found.append(f"there is no metric {match[0]}")
            continue
        if (METRICS[name].kind == "histogram") != (match[0] != name):
            found.append(f"{match[0]} is no sample of the {METRICS[name].kind} {name}")
        selector = re.match(r"\{(.*?)\}(?!\})", expression[match.end() :])
        labels = set(re.findall(r"(\w+) ?(?:=~|!=|=)", selector[1])) if selector else set()
        known = {*METRICS[name].all_labels, *OF_THE_SCRAPE}
        found += [f"{name} has no label {label}" for label in sorted(labels - known)]
        if METRICS[name].kind == "counter" and not re.search(r"(rate|increase)\($", expression[: match.start()]):
            found.append(f"{name} is a counter and is not asked for its rate")
    return found


@pytest.mark.parametrize("where", expressions())
def test_every_expression_asks_for_what_there_is(where):
    assert problems(expressions()[where]) == []


@pytest.mark.parametrize(
    ("expression", "said"),
    [
        ("vllm_merge_nothing_total", "there is no metric"),
        ('rate(vllm_merge_requests_total{tier="x"}[5m])', "has no label tier"),
        ("vllm_merge_wait_seconds", "is no sample of the histogram"),
        ("sum(vllm_merge_requests_total)", "is not asked for its rate"),
    ],
)
def test_a_wrong_expression_is_found(expression, said):
    assert said in problems(expression)[0]


@pytest.mark.parametrize("where", expressions())
def test_what_is_grouped_by_is_a_label_of_it(where):
    expression = expressions()[where]
    names = {metric_of(match[0]) for match in NAME.finditer(expression)}
    for grouped in re.findall(r"by \(([^)]*)\)", expression):
        wanted = {label.strip() for label in grouped.split(",")} - OF_THE_SCRAPE
        assert all(wanted <= set(METRICS[name].all_labels) for name in names), where
    assert expression.count("(") == expression.count(")")
    assert expression.count("{") == expression.count("}")


def test_every_metric_is_shown():
    panels = [target["expr"] for panel in DASHBOARD["panels"] for target in panel.get("targets", ())]
    shown = {metric_of(match[0]) for expression in panels for match in NAME.finditer(expression)}
    assert shown == set(METRICS)


def test_the_dashboard_is_one_that_grafana_imports():
    panels = DASHBOARD["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    assert DASHBOARD["schemaVersion"] >= 36
    assert DASHBOARD["uid"]
    for panel in panels:
        place = panel["gridPos"]
        assert place["x"] + place["w"] <= 24
        if panel["type"] != "row":
            assert panel["datasource"]["uid"] == "${datasource}"
            assert panel["description"]
            assert len({target["refId"] for target in panel["targets"]}) == len(panel["targets"])
    variables = {v["name"] for v in DASHBOARD["templating"]["list"]}
    used = set(re.findall(r"\$\{?(\w+)", json.dumps(panels))) - {"__rate_interval", "__all"}
    assert used <= variables


def test_rules_have_what_prometheus_asks_of_them():
    for group in RULES["groups"]:
        for rule in group["rules"]:
            assert set(rule) <= {"alert", "expr", "for", "labels", "annotations"}
            assert rule["labels"]["severity"] in ("critical", "warning")
            assert rule["annotations"]["summary"]
            assert re.fullmatch(r"\d+[smh]", rule.get("for", "1m"))


def test_the_page_has_the_tables_of_the_code():
    for source, rows in tables().items():
        assert f"## {HEADINGS[source]}\n\n{rows}\n" in DOCUMENT, (
            "python -m vllm_merge.serving.telemetry.metrics prints them"
        )


def test_the_page_names_the_spans_that_are_made():
    code = (ROOT / "vllm_merge" / "serving" / "telemetry" / "tracing.py").read_text()
    code += (ROOT / "vllm_merge" / "serving" / "worker" / "merging.py").read_text()
    for span in re.findall(r"^\| `vllm_merge\.(\w+)`", DOCUMENT, re.MULTILINE):
        assert f'"{span}"' in code or f'"vllm_merge.{span}"' in code
