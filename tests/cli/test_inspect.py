# SPDX-License-Identifier: Apache-2.0
"""vllm-merge inspect of a merge: the report in the table, the plots, and the page."""

from __future__ import annotations

import re
import sys
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import pytest

from tests.adapters_in_memory import three
from tests.cli.conftest import Run
from vllm_merge import Adapter, merge
from vllm_merge.adapters.peft import write_adapter


@pytest.fixture
def merged(tmp_path: Path) -> Path:
    """The folder of a merge of three, one of which has a name that HTML must not take for its own."""
    x, y, z = three()
    odd = Adapter("<b>y</b>", y.factors)
    merge([x, odd, z], merge_method="ties", space="delta", rank=2, name="three").save_pretrained(tmp_path / "merged")
    return tmp_path / "merged"


class Page(HTMLParser):
    """Tags and attributes of a page, and the text that a reader sees."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.addresses: list[str] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.addresses += [value or "" for name, value in attrs if name in ("src", "href", "srcset", "data", "action")]

    def handle_data(self, data: str) -> None:
        self.text += data


def test_the_table_has_the_report(run: Run, merged: Path) -> None:
    code, out, err = run("inspect", merged)
    assert code == 0
    head = next(line for line in out.splitlines() if line.startswith("module"))
    assert re.split(r"\s{2,}", head)[-3:] == ["energy kept", "effective rank", "sign conflict"]
    assert "cosine with result" in out
    assert re.search(r"^<b>y</b>\s+\S+\s+0\.\d+\s+[xz] [+-]0\.\d{3}$", out, re.MULTILINE)
    assert re.search(
        r"^energy kept \d+\.\d+%; effective rank \d\.\d; sign conflict \d+\.\d%; .* at once$", out, re.MULTILINE
    )
    assert "keep under 90% of their energy" in err


def test_nothing_is_promised_of_accuracy(run: Run) -> None:
    """The numbers did not foretell losses where that was measured (docs/evidence.md)."""
    code, out, _ = run("inspect", "--help")
    assert code == 0
    assert "they do not foretell how much a task loses" in " ".join(out.split())


def test_a_brief_report_is_shown_as_far_as_it_goes(run: Run, tmp_path: Path) -> None:
    merge(three(), merge_method="ties", report="brief").save_pretrained(tmp_path / "brief")
    code, out, _ = run("inspect", tmp_path / "brief", "--plots", tmp_path / "plots")
    assert code == 0
    assert "cosine with result" not in out
    assert sorted(path.name for path in (tmp_path / "plots").iterdir()) == [
        "modules.png",
        "modules.svg",
        "norms.png",
        "norms.svg",
    ]


def test_plots(run: Run, merged: Path, tmp_path: Path) -> None:
    code, out, _ = run("inspect", merged, "--plots", tmp_path / "new" / "plots")
    assert code == 0
    written = sorted((tmp_path / "new" / "plots").iterdir())
    assert [path.name for path in written] == [
        f"{name}.{kind}" for name in ("modules", "norms", "similarity") for kind in ("png", "svg")
    ]
    assert all(f"wrote {path}" in out for path in written)
    before = {path.name: path.read_bytes() for path in written}
    for name, content in before.items():
        if name.endswith(".png"):
            assert content.startswith(b"\x89PNG\r\n")
            assert int.from_bytes(content[16:20], "big") > 800  # pixels across
        else:
            assert ElementTree.fromstring(content).tag == "{http://www.w3.org/2000/svg}svg"
    run("inspect", merged, "--plots", tmp_path / "new" / "plots")
    assert {path.name: path.read_bytes() for path in written} == before


def test_the_page_needs_nothing_else(run: Run, merged: Path, tmp_path: Path) -> None:
    assert run("inspect", merged, "--html", tmp_path / "page.html")[0] == 0
    text = (tmp_path / "page.html").read_text(encoding="utf-8")
    page = Page(text)
    assert len(page.addresses) == 6  # three figures, light and dark
    assert all(address.startswith("data:image/svg+xml;base64,") for address in page.addresses)
    assert not {"script", "link", "iframe", "b"} & set(page.tags)
    assert "default-src 'none'" in text
    assert "prefers-color-scheme: dark" in text
    assert re.sub(r"[A-Za-z0-9+/=]{200,}", "", text).count("http") == 1  # http-equiv
    assert "<b>y</b>" in page.text
    assert "layers.1.up_proj" in page.text
    assert "keep under 90% of their energy" in page.text
    assert page.tags.count("tr") == 1 + 4 + 1 + 4 + 1 + len(
        merge(three(), merge_method="ties", space="delta").report.seconds
    )
    assert [path.name for path in tmp_path.glob(".*")] == []


def test_a_page_of_a_plain_adapter(run: Run, tmp_path: Path) -> None:
    write_adapter(tmp_path / "plain", three()[0].factors, base_model="org/base")
    assert run("inspect", tmp_path / "plain", "--html", tmp_path / "page.html")[0] == 0
    page = Page((tmp_path / "page.html").read_text(encoding="utf-8"))
    assert "adapter, base model org/base" in page.text
    assert len(page.addresses) == 2


def test_wrong_places(run: Run, merged: Path, tmp_path: Path) -> None:
    code, _, err = run("inspect", merged, "--html", tmp_path)
    assert (code, err) == (2, f"Error: --html {tmp_path}: is a folder; give the name of a file\n")
    (tmp_path / "file").write_text("x")
    code, _, err = run("inspect", merged, "--plots", tmp_path / "file")
    assert (code, err) == (2, f"Error: --plots {tmp_path / 'file'}: is not a folder; choose another\n")
    assert run("inspect", merged, "--html", tmp_path / "no" / "page.html")[0] == 1


def test_without_matplotlib_it_says_what_to_install(
    run: Run, merged: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    for option in ("--plots", "--html"):
        code, _, err = run("inspect", merged, option, tmp_path / "out")
        assert code == 2
        assert "matplotlib is not installed" in err
        assert "pip install 'vllm-merge[plots]'" in err
        assert not (tmp_path / "out").exists()
    assert run("inspect", merged)[0] == 0
