# SPDX-License-Identifier: Apache-2.0
"""A recipe file on a mounted ConfigMap: a link into a folder that is swapped by a rename, and whose old one is deleted."""

import shutil
from pathlib import Path

import pytest

from tests.serving.test_published import two, until  # noqa: F401
from vllm_merge.serving.launch import environment
from vllm_merge.serving.plugin import CONFIG_VARIABLE


class ConfigMap:
    """A folder as a kubelet keeps it: FILE → ..data/FILE, ..data → ..TIMESTAMP, swapped by a rename."""

    def __init__(self, folder: Path, file: str, text: str):
        self._folder, self._file, self._versions = folder, file, 0
        folder.mkdir()
        self.update(text)
        self.path = folder / file
        self.path.symlink_to(f"..data/{file}")

    def update(self, text: str) -> None:
        data, before = self._folder / "..data", None
        if data.is_symlink():
            before = data.resolve()
        self._versions += 1
        version = self._folder / f"..2026_11_22_08_00_0{self._versions}.123456789"
        version.mkdir()
        (version / self._file).write_text(text)
        link = self._folder / "..data_tmp"
        link.symlink_to(version.name)
        link.rename(data)
        if before is not None:
            shutil.rmtree(before)


@pytest.fixture
def mounted(tmp_path):
    return ConfigMap(tmp_path / "mount", "recipes.yaml", "ties")


def test_serve_hands_the_link_on_and_not_the_folder_behind_it(mounted, monkeypatch):
    given = Path(environment(mounted.path)[CONFIG_VARIABLE])
    assert given == mounted.path
    monkeypatch.chdir(mounted.path.parent)
    assert environment(Path("recipes.yaml"))[CONFIG_VARIABLE] == str(mounted.path)
    mounted.update("linear")
    assert given.read_text() == "linear"


def test_an_update_of_a_configmap_is_served(two, mounted):  # noqa: F811
    async def scenario(processes, config):
        config.unlink()
        config.symlink_to(mounted.path)  # where the processes look
        for target in ("linear", "ties", "linear"):  # the same sizes, new folders
            mounted.update(target.ljust(8))
            await until(lambda t=target: all(process.answers == f"ours://{t}@1" for process in processes))
        assert {process.published.state.error for process in processes} == {None}

    two(scenario)
