# SPDX-License-Identifier: Apache-2.0
"""Repositories of the Hugging Face Hub as folders on this machine. Needs huggingface_hub, which vLLM brings along."""

from pathlib import Path

from vllm_merge.adapters.peft import CONFIG_FILE, WEIGHTS_FILE
from vllm_merge.errors import UserInputError


def cached_snapshot(repository: str, revision: str | None = None) -> Path | None:
    """The folder of `repository` in the local cache, or None; nothing is downloaded."""
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        return None
    try:
        return Path(snapshot_download(repository, revision=revision, local_files_only=True))
    except (OSError, ValueError):  # not in the cache, or not the name of a repository
        return None


def adapter_folder(path: str, revision: str | None = None) -> Path:
    """The folder of an adapter: `path` itself, or that of the Hub repository `path`, fetched if it is not in the cache.

    Only adapter_config.json and adapter_model.safetensors are fetched. Raises UserInputError where there is neither.
    """
    folder = Path(path).expanduser()
    if folder.is_dir():
        return folder.absolute()
    if folder.is_absolute() or path.startswith("."):
        raise UserInputError(f"{path} is not a folder; give a PEFT folder with {CONFIG_FILE}")
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise UserInputError(
            f"{path} is not a folder, and huggingface_hub, which fetches Hub repositories, is not installed; "
            "install it or give a folder"
        ) from None
    try:
        return Path(snapshot_download(path, revision=revision, allow_patterns=[CONFIG_FILE, WEIGHTS_FILE]))
    except (OSError, ValueError) as error:
        at = f" at revision {revision}" if revision else ""
        reason = str(error).strip().partition("\n")[0]
        raise UserInputError(f"{path} is not a folder and cannot be had from the Hub{at}: {reason}") from None
