# SPDX-License-Identifier: Apache-2.0
"""An adapter that was trained on something else is served, and a warning says what differs."""

import json
import logging
import shutil

import pytest
import yaml

from tests.conftest import DEMO
from tests.serving.facts import FACTS
from vllm_merge.adapters.catalogue import Catalogue
from vllm_merge.serving.control.another_base import another_base
from vllm_merge.serving.control.names import resolve_names

BASE = "an/base"


@pytest.fixture
def folder(tmp_path):
    shutil.copytree(DEMO / "adapters" / "add", tmp_path / "add")
    return tmp_path / "add"


def configured(folder, **fields):
    """The adapter with these in its configuration, as the catalogue sees it."""
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))
    return Catalogue().register("add", folder)


def test_another_model(folder):
    adapter = configured(folder, base_model_name_or_path="an/other")
    assert another_base(adapter, BASE) == ("it was trained on 'an/other', and is used on an/base",)
    assert another_base(adapter, "an/other") == ()


def test_a_folder_is_not_compared_with_a_name(folder, tmp_path):
    assert another_base(configured(folder, base_model_name_or_path="an/other"), str(tmp_path)) == ()
    assert another_base(configured(folder, base_model_name_or_path=str(tmp_path)), BASE) == ()


def test_a_folder_of_the_model_may_look_like_a_name(folder, tmp_path, monkeypatch):
    (tmp_path / BASE).mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert another_base(configured(folder, base_model_name_or_path="an/other"), BASE) == ()


def test_another_revision(folder):
    adapter = configured(folder, base_model_name_or_path=BASE, revision="v1")
    assert another_base(adapter, BASE, "v2") == ("it was trained on revision 'v1' of an/base, and is used on v2",)
    assert another_base(adapter, BASE, "v1") == another_base(adapter, BASE, None) == ()


@pytest.mark.parametrize("mine", ["{{ a }}", None])
@pytest.mark.parametrize("base", ["{{ a }}", "{{ b }}", None])
def test_another_chat_template(folder, tmp_path, mine, base):
    """Wherever each has it: in a file of its own, or among what the tokenizer is told."""
    model = tmp_path / "model"
    model.mkdir()
    if base is not None:
        (model / "tokenizer_config.json").write_text(json.dumps({"chat_template": base}))
    if mine is not None:
        (folder / "chat_template.jinja").write_text(mine)
    found = another_base(Catalogue().register("add", folder), str(model))
    assert ["chat template" in text for text in found] == ([True] if mine is not None and mine != base else [])


@pytest.mark.parametrize("content", ["{", "[]", '{"chat_template": [{"name": "default"}]}', "[" * 100_000])
def test_what_cannot_be_read_is_no_template(folder, tmp_path, content):
    (folder / "tokenizer_config.json").write_text(content)
    assert another_base(Catalogue().register("add", folder), str(tmp_path)) == ()


def test_the_server_says_so_once_and_serves_it(folder, tmp_path, caplog):
    configured(folder, base_model_name_or_path="an/other")
    file = tmp_path / "recipes.yaml"
    file.write_text(yaml.safe_dump({"version": 1, "adapters": {"add": {"path": str(folder)}}, "recipes": {}}))
    catalogue = Catalogue()
    with caplog.at_level(logging.WARNING, "vllm_merge"):
        found = [resolve_names(file, {**FACTS, "base_model": BASE}, catalogue, {}) for _ in range(2)]
    assert [names.warnings["add"] for names in found] == [("it was trained on 'an/other', and is used on an/base",)] * 2
    assert found[0].names["add"].digest is not None
    assert len([record for record in caplog.records if "an/other" in record.getMessage()]) == 1
