# SPDX-License-Identifier: Apache-2.0
"""The one folder from which requests may register adapters. A request gives the name of a folder inside, never a path."""

from __future__ import annotations

from pathlib import Path

from vllm_merge.adapters.peft import CONFIG_FILE, WEIGHTS_FILE
from vllm_merge.adapters.sequence_state import REPORT_FILE
from vllm_merge.errors import UserInputError
from vllm_merge.recipe.values import NAME, NAME_RULE


def folder_in(root: Path, name: str) -> Path:
    """The folder `name` directly inside of `root`. Raises UserInputError where there is none, or it leads out of `root`.

    Links are followed, of the folder and of each file that is read, and must end inside of `root`. What is read later is
    compared with the content that was hashed then, so that a link which changes after this look changes no answer.
    """
    if NAME.fullmatch(name) is None:
        raise UserInputError(f"{name!r} is not a name; a name is {NAME_RULE}")
    root = root.resolve()
    try:
        folder = (root / name).resolve(strict=True)
        found = [folder, *((folder / file).resolve() for file in (CONFIG_FILE, WEIGHTS_FILE, REPORT_FILE))]
    except (OSError, RuntimeError):  # RuntimeError: links in a circle
        raise UserInputError(f"there is no folder {name!r} in the adapters' root") from None
    if not all(path.is_relative_to(root) and path != root for path in found):
        raise UserInputError(f"{name!r} leads out of the adapters' root by a link; copy the adapter into it")
    if not folder.is_dir():
        raise UserInputError(f"{name!r} in the adapters' root is no folder")
    return folder
