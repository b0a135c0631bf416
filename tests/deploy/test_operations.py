# SPDX-License-Identifier: Apache-2.0
"""docs/operations.md quotes messages that the code has, and names every variable with its default."""

import ast
import re
from functools import cache
from pathlib import Path

import pytest

from vllm_merge.serving.settings import NUMBERS

ROOT = Path(__file__).resolve().parents[2]
DOCUMENT = (ROOT / "docs" / "operations.md").read_text()
GAP = "\0"


@cache
def messages() -> list[str]:
    """Every text in the code, with a gap for each value that goes into it."""
    found = []
    for path in (ROOT / "vllm_merge").rglob("*.py"):
        tree = ast.parse(path.read_text())
        documentation = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
        for node in ast.walk(tree):
            if isinstance(node, ast.JoinedStr):
                found.append("".join(n.value if isinstance(n, ast.Constant) else GAP for n in node.values))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in documentation:
                found.append(re.sub(r"%[.\d]*[sdf]", GAP, node.value))
    return found


def quoted() -> list[str]:
    """The first cells of the table of troubles."""
    section = DOCUMENT.split("## Troubleshooting")[1].split("\n## ")[0]
    rows = [line for line in section.splitlines() if line.startswith("| `")]
    return [re.match(r"\| `([^`]+)`", row)[1] for row in rows]


def exists(quote: str) -> bool:
    parts = [part.strip() for part in quote.split("…")]
    pattern = re.compile(r"\s*.*?\s*".join(re.escape(part) for part in parts), re.DOTALL)
    return any(pattern.search(message) for message in messages())


@pytest.mark.parametrize("quote", quoted())
def test_every_quoted_message_is_in_the_code(quote):
    assert len(quote.replace("…", "").strip()) >= 15
    assert exists(quote)


def test_a_message_that_is_not_in_the_code_is_found():
    assert not exists("… of … vLLM workers did not open a window")
    assert len(quoted()) >= 15


def test_every_variable_is_explained_with_its_default():
    section = DOCUMENT.split("\n## ")[1]
    rows = dict(re.findall(r"^\| `(VLLM_MERGE_[A-Z_]+)` \| ([^|]*) \|", section, re.MULTILINE))
    code = "".join(path.read_text() for path in (ROOT / "vllm_merge" / "serving").rglob("*.py"))
    assert set(re.findall(r'_VARIABLE = "(VLLM_MERGE_[A-Z_]+)"', code)) <= set(rows)
    for variable, (default, _) in NUMBERS.items():
        said = rows[variable]
        shown = f"{default >> 30} GiB" if default >= 1 << 30 else str(default)
        assert shown in said, f"{variable}: {said}"


def test_the_calculator_is_shown_as_it_is_called():
    assert "vllm-merge plan recipes.yaml --server" in DOCUMENT
