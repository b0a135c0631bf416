# SPDX-License-Identifier: Apache-2.0
"""The container image and the manifests: what they name exists, here, in vLLM and in each other."""

import importlib.util
import re
from functools import cache
from pathlib import Path

import pytest
import yaml

from vllm_merge.recipe_files import load_recipes

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "deploy" / "kubernetes"
PAGES = sorted((ROOT / "docs" / "deploy").glob("*.md"))


@cache
def objects() -> dict[str, dict]:
    """{kind/name: object} of everything that is applied."""
    files = yaml.safe_load((FOLDER / "kustomization.yaml").read_text())["resources"]
    assert set(files) == {path.name for path in FOLDER.glob("*.yaml")} - {"kustomization.yaml"}
    documents = [document for file in files for document in yaml.safe_load_all((FOLDER / file).read_text())]
    return {f"{document['kind']}/{document['metadata']['name']}": document for document in documents}


def pod() -> dict:
    return objects()["Deployment/vllm-merge"]["spec"]["template"]["spec"]


def container() -> dict:
    (found,) = pod()["containers"]
    return found


@cache
def variables() -> set[str]:
    """The environment variables that the code reads."""
    code = "".join(path.read_text() for path in (ROOT / "vllm_merge").rglob("*.py"))
    return set(re.findall(r'"(VLLM_MERGE_[A-Z_]+)"', code))


@cache
def vllm_options() -> set[str]:
    """The options of `vllm serve`, and ours."""
    if importlib.util.find_spec("vllm") is None:
        pytest.skip("vLLM is not installed")
    from vllm.entrypoints.cli.serve import ServeSubcommand
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parsers = FlexibleArgumentParser().add_subparsers()
    ServeSubcommand().subparser_init(parsers)
    parser = parsers.choices["serve"]
    return {option for action in parser._actions for option in action.option_strings} | {"--config"}


def test_the_objects_fit_together():
    assert {name.split("/")[0] for name in objects()} == {"ConfigMap", "PersistentVolumeClaim", "Deployment", "Service"}
    deployment, service = objects()["Deployment/vllm-merge"]["spec"], objects()["Service/vllm-merge"]["spec"]
    labels = deployment["template"]["metadata"]["labels"]
    assert deployment["selector"]["matchLabels"].items() <= labels.items()
    assert service["selector"].items() <= labels.items()
    ports = {port["name"] for port in container()["ports"]}
    assert {port["targetPort"] for port in service["ports"]} <= ports
    volumes = {volume["name"]: volume for volume in pod()["volumes"]}
    assert {mount["name"] for mount in container()["volumeMounts"]} == set(volumes)
    claims = {v["persistentVolumeClaim"]["claimName"] for v in volumes.values() if "persistentVolumeClaim" in v}
    assert {f"PersistentVolumeClaim/{claim}" for claim in claims} <= set(objects())
    assert {f"ConfigMap/{v['configMap']['name']}" for v in volumes.values() if "configMap" in v} <= set(objects())


def test_what_replicas_share_can_be_shared():
    for name, document in objects().items():
        if name.startswith("PersistentVolumeClaim"):
            assert document["spec"]["accessModes"] == ["ReadWriteMany"]
    environment = {entry["name"]: entry.get("value") for entry in container()["env"]}
    mounts = {mount["mountPath"]: mount for mount in container()["volumeMounts"]}
    assert not mounts[environment["VLLM_MERGE_DISK"]].get("readOnly")
    claimed = objects()["PersistentVolumeClaim/vllm-merge-artifacts"]["spec"]["resources"]["requests"]["storage"]
    assert int(claimed.removesuffix("Gi")) << 30 > int(environment["VLLM_MERGE_DISK_BYTES"])


def test_the_recipe_file_is_one_that_is_watched(tmp_path):
    """Mounted as a folder (a subPath is never updated), at the place that --config names, and right."""
    (given,) = [arg.partition("=")[2] for arg in container()["args"] if arg.startswith("--config=")]
    mount = next(m for m in container()["volumeMounts"] if m["name"] == "recipes")
    assert "subPath" not in mount
    (file,) = objects()["ConfigMap/vllm-merge-recipes"]["data"]
    assert given == f"{mount['mountPath']}/{file}"
    (tmp_path / file).write_text(objects()["ConfigMap/vllm-merge-recipes"]["data"][file])
    recipes = load_recipes(tmp_path / file)
    assert all(Path(adapter.path).is_absolute() for adapter in recipes.adapters.values())
    places = [mount["mountPath"] for mount in container()["volumeMounts"]]
    assert all(any(a.path.startswith(f"{place}/") for place in places) for a in recipes.adapters.values())


def test_variables_are_read_and_secrets_are_no_text():
    for entry in container()["env"]:
        name = entry["name"]
        assert name in variables() or name == "VLLM_API_KEY"
        assert ("valueFrom" in entry) == ("TOKEN" in name or "KEY" in name)


def test_arguments_are_options_of_the_server():
    options = [arg.partition("=")[0] for arg in container()["args"] if arg.startswith("--")]
    assert not container()["args"][0].startswith("-"), "the model comes first"
    assert set(options) <= vllm_options()
    assert "--no-such-option" not in vllm_options()


def test_probes_ask_what_answers_without_a_key_and_give_a_start_its_time():
    server = container()
    for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
        assert server[probe]["httpGet"] == {"path": "/health", "port": "http"}
    assert server["startupProbe"]["periodSeconds"] * server["startupProbe"]["failureThreshold"] >= 1200
    annotations = objects()["Deployment/vllm-merge"]["spec"]["template"]["metadata"]["annotations"]
    assert annotations["prometheus.io/path"] == "/metrics"


def test_the_image_is_vllms_and_starts_the_command():
    lines = (ROOT / "deploy" / "Dockerfile").read_text().splitlines()
    assert [line for line in lines if line.startswith("FROM")][-1] == "FROM vllm/vllm-openai:${VLLM_VERSION}"
    assert lines[-1] == 'ENTRYPOINT ["vllm-merge", "serve"]'
    kept = set((ROOT / "deploy" / "Dockerfile.dockerignore").read_text().splitlines())
    for line in (line for line in lines if line.startswith("COPY ") and "--from" not in line):
        for source in line.split()[1:-1]:
            assert (ROOT / source).exists()
            assert f"!{source}" in kept, "the context leaves it out"


# -- the pages ----------------------------------------------------------------------------------------------------------


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", page.read_text(), re.DOTALL)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_what_a_page_shows_parses_and_names_what_exists(page):
    for block in blocks(page, "yaml"):
        documents = [document for document in yaml.safe_load_all(block) if document is not None]
        assert all(isinstance(document, dict) for document in documents)
        assert documents
    named = set(re.findall(r"\bVLLM_MERGE_[A-Z_]+\b", page.read_text()))
    assert named <= variables()
    for command in [*COMMAND.findall(page.read_text()), *("serve " + block for block in blocks(page, "yaml"))]:
        name = command.split()[0]
        known = vllm_options() if name == "serve" else own_options(name)
        assert set(OPTION.findall(command)) <= known, command


OPTION = re.compile(r"(?<![\w-])--[a-z][a-z-]+")
COMMAND = re.compile(r"^vllm(?:-merge)? ((?:[^\n\\]|\\\n)*)", re.MULTILINE)


def own_options(command: str) -> set[str]:
    """The options of one of our commands."""
    from typer.main import get_command

    from vllm_merge.cli.app import app

    return {option for parameter in get_command(app).commands[command].params for option in parameter.opts}


def test_a_wrong_command_would_be_found():
    assert COMMAND.findall("vllm-merge plan r.yaml --no-such \\\n  --either\n") == [
        "plan r.yaml --no-such \\\n  --either"
    ]
    assert "--server" in own_options("plan")
    assert "--no-such" not in own_options("plan")


def test_every_integration_has_a_page_that_says_when_it_was_read():
    wanted = {"llm-d", "kserve", "production-stack", "litellm", "envoy-ai-gateway"}
    assert wanted <= {page.stem for page in PAGES}
    for page in PAGES:
        if page.stem in wanted:
            assert re.search(r"Read for .* on 2026-\d\d-\d\d", page.read_text())


def test_the_index_links_every_page():
    index = (ROOT / "docs" / "deploy" / "README.md").read_text()
    for page in PAGES:
        assert page.stem == "README" or f"({page.name})" in index
