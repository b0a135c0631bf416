# SPDX-License-Identifier: Apache-2.0
"""What docs/security.md promises of files, tried: paths in names, what is swapped after it was hashed, links, sockets, pickle."""

from __future__ import annotations

import json
import shutil
import stat
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest

pytest.importorskip("fastapi", reason="vLLM is not installed")

import yaml

from tests.serving.played_server import TOKEN, PlayedServer, played, recipe_file, write_adapter
from tests.serving.test_security import filled, routes_of, state_of
from vllm_merge.adapters.peft import read_adapter
from vllm_merge.serving.control.control import ControlError, runtime_dir
from vllm_merge.serving.memory.disk_tier import DiskTier
from vllm_merge.serving.routes.admin import ADMIN_HEADER

# -- paths ----------------------------------------------------------------------------------------------------------------

CANARY = "canary7f3a"
EVENTS = (
    "open",
    "os.",
    "shutil.",
    "glob.",
    "subprocess.",
    "exec",
    "import",
    "socket.",
    "tempfile.",
    "pathlib.",
    "ctypes.",
)
_seen: list[str] | None = None


def _hook(event: str, arguments: tuple[Any, ...]) -> None:
    if _seen is not None and event.startswith(EVENTS):
        text = " ".join(str(argument) for argument in arguments)
        if CANARY in text:
            _seen.append(f"{event}: {text[:200]}")


sys.addaudithook(_hook)  # which cannot be taken away again: it does nothing unless `watched` runs


@contextmanager
def watched() -> Iterator[list[str]]:
    """What the process does with files, modules, sockets and programs whose name has the canary in it."""
    global _seen
    _seen = []
    try:
        yield _seen
    finally:
        _seen = None


TRAVERSALS = [
    CANARY,
    f"../../{CANARY}",
    f"/tmp/{CANARY}",
    f"..%2f..%2f{CANARY}",
    f"....//{CANARY}",
    f"~/{CANARY}",
    f"file:///{CANARY}",
    f"s3://bucket/{CANARY}",
    f"vllm-merge://{CANARY}/0",
    f"{CANARY}\0.safetensors",
    f"{CANARY}\n{CANARY}",
    f"merge:linear(../{CANARY}=1,{CANARY}=1)",
    f"m0@{CANARY}",
    f"$({CANARY})",
    f"{{{{{CANARY}}}}}",
    f"org/{CANARY}",
]


def test_the_watch_sees_what_it_is_to_see(tmp_path):
    with watched() as seen:
        (tmp_path / CANARY).exists()
        with pytest.raises(OSError):
            (tmp_path / CANARY).read_text()
        shutil.rmtree(tmp_path / CANARY, ignore_errors=True)
    assert any(event.startswith("open") for event in seen)


def test_nothing_of_a_request_reaches_the_file_system(tmp_path):
    async def scenario(server: PlayedServer) -> None:
        client = server.apis[0].client
        for text in TRAVERSALS:
            bodies: list[dict[str, Any]] = [
                {"model": text, "prompt": text, "user": text},
                {"model": "m0", "prompt": text, "merge": {"merge_method": text, "adapters": [{"adapter": text}]}},
                {"model": "m0", "prompt": text, "lora_path": text, "lora_request": {"lora_path": text}, "path": text},
                {"model": "m0", "prompt": text, "merge": {"adapters": {text: {"path": text}}, "path": text}},
            ]
            for body in bodies:
                await client.post("/v1/completions", json=body, headers={"x-request-id": quote(text)})
            for method, path in [*routes_of(server.apis[0].app), ("GET", "/merge/{file}")]:
                if path.endswith("/events"):
                    continue  # does not end
                for token in (TOKEN, "wrong"):
                    document = dict.fromkeys(("target", "name", "path", "revision", "adapter", "recipe", "file"), text)
                    url = (
                        f"{filled(path, quote(text, safe=''))}?name={quote(text)}&path={quote(text)}&file={quote(text)}"
                    )
                    reply = await client.request(method, url, headers={ADMIN_HEADER: token}, json=document)
                    assert reply.status_code != 500, (method, path, text, reply.text)
        await server.idle()

    with watched() as seen:
        played(scenario, recipe_file(tmp_path), ADHOC="on", DISK=str(tmp_path / "merges"), HOST_BYTES=1 << 16)
    assert seen == []


def test_the_disk_tier_takes_digests_and_nothing_else(tmp_path):
    (tmp_path / "secret").mkdir()
    (tmp_path / "secret" / "artifact.json").write_text("{}")
    disk = DiskTier(str(tmp_path / "merges"), 1 << 20)
    for name in (
        "../secret",
        "..",
        "",
        "secret",
        "/etc",
        "0" * 63,
        "0" * 63 + "G",
        "0" * 64 + "/../x",
        "0" * 64 + "\n",
    ):
        assert not disk.holds(name)
        assert disk.read(name) is None
        disk.touch(name)
        with pytest.raises(ValueError, match="no digest"):
            disk.remove(name)
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["artifact.json", "merges", "secret"]


@pytest.mark.parametrize(
    "name", ["../x", "a/b", "/etc/passwd", "a b", "", ".", "..", "a\nb", "x" * 65, "é", "a\0b", "~"]
)
@pytest.mark.parametrize("kind", ["adapters", "recipes", "aliases"])
def test_names_in_a_recipe_file_are_no_paths(tmp_path, kind, name):
    from vllm_merge.recipe.problems import RecipeError
    from vllm_merge.recipe_files import load_recipes

    config = recipe_file(tmp_path)
    document = yaml.safe_load(config.read_text())
    document[kind][name] = next(iter(document[kind].values()))
    config.write_text(yaml.safe_dump(document))
    with pytest.raises(RecipeError, match="1 to 64 letters, digits"):
        load_recipes(config)


# -- files ------------------------------------------------------------------------------------------------------------------


def swap_weights(folder: Path, other: Path) -> None:
    shutil.copy(other / "adapter_model.safetensors", folder / "adapter_model.safetensors")


def swap_config(folder: Path, other: Path) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "lora_alpha": 99}))


def swap_folder(folder: Path, other: Path) -> None:
    folder.rename(folder.with_name("away"))
    folder.symlink_to(other)


def swap_for_a_link(folder: Path, other: Path) -> None:
    (folder / "adapter_model.safetensors").unlink()
    (folder / "adapter_model.safetensors").symlink_to(other / "adapter_model.safetensors")


@pytest.mark.parametrize("swap", [swap_weights, swap_config, swap_folder, swap_for_a_link])
def test_what_was_hashed_is_what_is_merged(tmp_path, swap):
    config = recipe_file(tmp_path)
    write_adapter(tmp_path / "other", 99)

    async def scenario(server: PlayedServer) -> None:
        right = (await server.ask("m1")).json()
        swap(tmp_path / "a0", tmp_path / "other")
        replies = [await server.ask(name) for name in ("m0", "a0", "assistant")]
        assert {reply.status_code for reply in replies} == {500}
        assert all("the content changed since it was registered" in reply.text for reply in replies)
        assert (await server.ask("m1")).json() == right

    played(scenario, config, SOURCE_BYTES=0)


def test_adapters_are_added_from_inside_the_root_alone(tmp_path):
    root, outside = tmp_path / "root", tmp_path / "outside"
    for folder in (outside, root / "good", root / "linked-weights", root / "linked-config"):
        write_adapter(folder, 50)
    (root / "linked-folder").symlink_to(outside)
    (root / "linked-up").symlink_to("..")
    (root / "linked-root").symlink_to(root)
    for folder, file in (("linked-weights", "adapter_model.safetensors"), ("linked-config", "adapter_config.json")):
        (root / folder / file).unlink()
        (root / folder / file).symlink_to(outside / file)
    (root / "linked-inside").symlink_to(root / "good")

    async def scenario(server: PlayedServer) -> None:
        before = await state_of(server)
        names = ["linked-folder", "linked-up", "linked-root", "linked-weights", "linked-config", "nobody"]
        for name in [
            *names,
            "..%2foutside",
            "%2e%2e",
            "..",
            "%2ftmp",
            "good%2f..%2f..%2foutside",
            "good%00",
            "good%0a",
        ]:
            reply = await server.admin("POST", f"adapters/{name}")
            assert reply.status_code in (400, 404, 405, 422), (name, reply.text)
            assert str(tmp_path) not in reply.text, "the answer tells no path"
        assert await state_of(server) == before
        for name in ("good", "linked-inside"):
            assert (await server.admin("POST", f"adapters/{name}")).status_code == 200
        right = (await server.ask("good")).json()
        await server.idle()
        await server.admin("POST", "artifacts/good/evict")
        await server.until(lambda: server.service.store.peek(server.front.known("good").digest) is None)
        shutil.rmtree(root / "good")
        (root / "good").symlink_to(tmp_path / "a1")  # another adapter, out of the root, after it was let in
        reply = await server.ask("good")
        assert (right["model"].partition("@")[0], reply.status_code) == ("good", 500)
        assert "the content changed since it was registered" in reply.text

    played(scenario, recipe_file(tmp_path), ADAPTER_ROOT=str(root), SOURCE_BYTES=0)


# -- sockets and pickle -----------------------------------------------------------------------------------------------------


def test_sockets_and_alarms_are_the_users_alone(tmp_path):
    async def scenario(server: PlayedServer) -> None:
        folder = server.service._server.path.parent
        for path in folder.iterdir():
            assert stat.S_IMODE(path.stat().st_mode) == 0o600, path.name
        assert {path.suffix for path in folder.iterdir()} == {".sock", ".alarm"}

    played(scenario, recipe_file(tmp_path))


@pytest.mark.parametrize("mode", [0o777, 0o770, 0o722])
def test_a_folder_for_sockets_that_others_may_write_to_is_refused(tmp_path, monkeypatch, mode):
    folder = tmp_path / "run"
    folder.mkdir()
    folder.chmod(mode)
    monkeypatch.setenv("VLLM_MERGE_RUNTIME_DIR", str(folder))
    with pytest.raises(ControlError, match="not this user's alone"):
        runtime_dir(create=True)
    monkeypatch.setenv("VLLM_MERGE_RUNTIME_DIR", str(tmp_path / "new" / "run"))
    made = runtime_dir(create=True)
    assert made is not None
    assert stat.S_IMODE(made.stat().st_mode) == 0o700


def test_pickle_and_code_are_never_read(tmp_path):
    from vllm_merge.errors import UserInputError

    write_adapter(tmp_path / "a", 1)
    (tmp_path / "a" / "adapter_model.safetensors").rename(tmp_path / "a" / "adapter_model.bin")
    with pytest.raises(UserInputError, match="pickle is never read"):
        read_adapter(tmp_path / "a")
