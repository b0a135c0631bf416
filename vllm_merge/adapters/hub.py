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
    except Exception as error:  # the library lets errors of the HTTP client it uses through, whichever that is
        raise UserInputError(_why_not(path, revision, error)) from None


def _why_not(path: str, revision: str | None, error: Exception) -> str:
    """What a person can do about a repository that could not be fetched."""
    from huggingface_hub import constants, errors

    at = f" at revision {revision}" if revision else ""
    command = f"hf download {path}" + (f" --revision {revision}" if revision else "")
    elsewhere = f"fetch it where there is a network (`{command}`), or give a folder"
    match error:
        case errors.GatedRepoError():
            return (
                f"{path} is a gated repository of the Hub; ask for access on its page, then log in with `hf auth login`"
            )
        case errors.RepositoryNotFoundError():
            return (
                f"{path} is neither a folder nor a repository of the Hub that you may read; correct the path, or log in "
                "with `hf auth login` if it is private"
            )
        case errors.RevisionNotFoundError():
            return f"{path} on the Hub has no revision {revision}; give a branch, tag or commit that it has"
        case errors.LocalEntryNotFoundError() | errors.OfflineModeIsEnabled() if constants.HF_HUB_OFFLINE:
            return (
                f"{path}{at} is neither a folder nor in the Hub's cache, and HF_HUB_OFFLINE forbids the network; "
                f"unset it, {elsewhere}"
            )
        case errors.LocalEntryNotFoundError():
            return f"{path}{at} is neither a folder nor in the Hub's cache, and the Hub cannot be reached; {elsewhere}"
    reason = str(error).strip().partition("\n")[0] or type(error).__name__
    return f"{path} is not a folder and cannot be had from the Hub{at}: {reason}"
