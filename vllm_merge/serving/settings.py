# SPDX-License-Identifier: Apache-2.0
"""The environment variables of a server, read in one place. docs/operations.md explains each."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path

from vllm_merge.errors import UserInputError

CACHE_BYTES_VARIABLE = "VLLM_MERGE_CACHE_BYTES"
HOST_BYTES_VARIABLE = "VLLM_MERGE_HOST_BYTES"
DISK_VARIABLE = "VLLM_MERGE_DISK"
DISK_BYTES_VARIABLE = "VLLM_MERGE_DISK_BYTES"
SOURCE_BYTES_VARIABLE = "VLLM_MERGE_SOURCE_BYTES"
WORKSPACE_BYTES_VARIABLE = "VLLM_MERGE_WORKSPACE_BYTES"
QUEUE_VARIABLE = "VLLM_MERGE_QUEUE"
TIME_LIMIT_VARIABLE = "VLLM_MERGE_TIME_LIMIT"
ADMIN_TOKEN_VARIABLE = "VLLM_MERGE_ADMIN_TOKEN"
STORE_DAYS_VARIABLE = "VLLM_MERGE_STORE_DAYS"
JUDGE_VARIABLE = "VLLM_MERGE_JUDGE"
JUDGE_MODEL_VARIABLE = "VLLM_MERGE_JUDGE_MODEL"
JUDGE_KEY_VARIABLE = "VLLM_MERGE_JUDGE_KEY"
ADHOC_VARIABLE = "VLLM_MERGE_ADHOC"
ADAPTER_ROOT_VARIABLE = "VLLM_MERGE_ADAPTER_ROOT"

# variable -> (default, smallest value)
NUMBERS = {
    CACHE_BYTES_VARIABLE: (4 << 30, 1),
    HOST_BYTES_VARIABLE: (4 << 30, 0),
    DISK_BYTES_VARIABLE: (64 << 30, 1),
    SOURCE_BYTES_VARIABLE: (2 << 30, 0),
    WORKSPACE_BYTES_VARIABLE: (2 << 30, 64 << 20),
    QUEUE_VARIABLE: (16, 1),
    TIME_LIMIT_VARIABLE: (600, 1),
}


@dataclass(frozen=True)
class WorkerSettings:
    """What a worker does with artifacts and merges. Bytes are per worker, but `disk_bytes`, which is of the whole place.

    host_bytes: None where nothing was said: then the device decides. disk: a folder or an fsspec URL; None: no disk tier.
    source_bytes: host memory for adapters that were read to be merged. workspace_bytes: what a merge may hold at once; None
    where nothing was said: then the device decides.
    queue: merges that may wait. time_limit: seconds that one merge may take.
    """

    cache_bytes: int
    host_bytes: int | None
    disk: str | None
    disk_bytes: int
    source_bytes: int
    workspace_bytes: int | None
    queue: int
    time_limit: int

    @classmethod
    def read(cls, environment: Mapping[str, str] = os.environ) -> WorkerSettings:
        """Raises UserInputError that names the variable."""
        return cls(
            cache_bytes=number(environment, CACHE_BYTES_VARIABLE),
            host_bytes=number(environment, HOST_BYTES_VARIABLE) if environment.get(HOST_BYTES_VARIABLE) else None,
            disk=environment.get(DISK_VARIABLE) or None,
            disk_bytes=number(environment, DISK_BYTES_VARIABLE),
            source_bytes=number(environment, SOURCE_BYTES_VARIABLE),
            workspace_bytes=number(environment, WORKSPACE_BYTES_VARIABLE)
            if environment.get(WORKSPACE_BYTES_VARIABLE)
            else None,
            queue=number(environment, QUEUE_VARIABLE),
            time_limit=number(environment, TIME_LIMIT_VARIABLE),
        )

    def workspace_bytes_on(self, device_bytes: int | None) -> int:
        """A merge's workspace: by default at most a fortieth of a GPU's memory (None: not a GPU)."""
        if self.workspace_bytes is not None:
            return self.workspace_bytes
        default, least = NUMBERS[WORKSPACE_BYTES_VARIABLE]
        return default if device_bytes is None else max(least, min(default, device_bytes // 40))

    def merge_bytes_on(self, device_bytes: int | None) -> int:
        """What is set aside for merges beside the cache: a workspace, and as much for what they are made of and make."""
        return 2 * self.workspace_bytes_on(device_bytes)

    def host_bytes_on(self, device: str) -> int:
        """The host tier's budget: by default none on the CPU, where the cache is host memory already."""
        if self.host_bytes is not None:
            return self.host_bytes
        return 0 if device == "cpu" else NUMBERS[HOST_BYTES_VARIABLE][0]


def number(environment: Mapping[str, str], variable: str) -> int:
    """The whole number in a variable, or its default. Raises UserInputError."""
    default, least = NUMBERS[variable]
    value = environment.get(variable)
    if value is None:
        return default
    if not value.isdecimal() or int(value) < least:
        whole = "whole number of bytes," if variable.endswith("_BYTES") else "whole number"
        raise UserInputError(f"{variable} is {value!r}; give a {whole} of at least {least}, or unset it ({default})")
    return int(value)


def admin_token(environment: Mapping[str, str] = os.environ) -> str | None:
    """What opens the routes that change things; None: there are no such routes."""
    return environment.get(ADMIN_TOKEN_VARIABLE) or None


@dataclass(frozen=True)
class AdHocSettings:
    """What merges of requests may cost. count: that are kept at once. adapters: inputs of one. rank: the highest of a
    result; 0: what the server takes. rate: new ones in a minute, at each API process. bytes: of all that are kept.
    idle: seconds after its last use that one is forgotten.
    """

    count: int = 16
    adapters: int = 8
    rank: int = 0
    rate: int = 30
    bytes: int = 1 << 30
    idle: int = 600

    @classmethod
    def read(cls, environment: Mapping[str, str] = os.environ) -> AdHocSettings | None:
        """None: there are no such merges. Raises UserInputError."""
        value = environment.get(ADHOC_VARIABLE, "").replace(" ", "")
        if value in ("", "0", "off"):
            return None
        if value in ("1", "on"):
            return cls()
        names = [field.name for field in fields(cls)]
        given: dict[str, int] = {}
        for part in value.split(","):
            name, _, text = part.partition("=")
            least = 0 if name == "rank" else 1
            if name not in names or name in given or not text.isdecimal() or int(text) < least:
                raise UserInputError(
                    f"{ADHOC_VARIABLE} is {value!r}; give on, off, or limits such as count=16,rank=32: whole numbers of at "
                    f"least 1, each once, of {', '.join(names)} ({part!r} is none)"
                )
            given[name] = int(text)
        return cls(**given)


def adapter_root(environment: Mapping[str, str] = os.environ) -> Path | None:
    """The folder whose folders may be registered as adapters while the server runs; None: none may."""
    value = environment.get(ADAPTER_ROOT_VARIABLE)
    if not value:
        return None
    root = Path(value)
    if not root.is_absolute() or not root.is_dir():
        raise UserInputError(f"{ADAPTER_ROOT_VARIABLE} is {value!r}; give the absolute path of a folder, or unset it")
    return root.resolve()


def store_days(environment: Mapping[str, str] = os.environ) -> int | None:
    """How many days the store of experiments keeps exposures and outcomes; None: for ever. Raises UserInputError."""
    value = environment.get(STORE_DAYS_VARIABLE)
    if not value:
        return None
    if not value.isdecimal() or int(value) < 1:
        raise UserInputError(
            f"{STORE_DAYS_VARIABLE} is {value!r}; give a whole number of at least 1, or unset it (for ever)"
        )
    return int(value)


@dataclass(frozen=True)
class JudgeSettings:
    """Who compares answers of shadows. url: of an OpenAI-compatible endpoint, up to /v1. key: its API key, "" for none."""

    url: str
    model: str
    key: str = field(default="", repr=False)

    @classmethod
    def read(cls, environment: Mapping[str, str] = os.environ) -> JudgeSettings | None:
        """None: there is no judge. Raises UserInputError that names the variable, without the URL: it may hold a password."""
        url, model = environment.get(JUDGE_VARIABLE, ""), environment.get(JUDGE_MODEL_VARIABLE, "")
        if not url:
            return None
        if not url.startswith(("http://", "https://")):
            raise UserInputError(f"{JUDGE_VARIABLE} is no URL; give http(s)://HOST/v1, or unset it (no judge)")
        if not model:
            raise UserInputError(f"{JUDGE_VARIABLE} is set, but not {JUDGE_MODEL_VARIABLE}; name the judge's model")
        return cls(url.rstrip("/"), model, environment.get(JUDGE_KEY_VARIABLE, ""))


TEXTS: Mapping[str, Callable[[Mapping[str, str]], object]] = {
    ADHOC_VARIABLE: AdHocSettings.read,
    ADAPTER_ROOT_VARIABLE: adapter_root,
    STORE_DAYS_VARIABLE: store_days,
    JUDGE_VARIABLE: JudgeSettings.read,
}
"""What reads the variables that are no plain numbers, and raises UserInputError for what is none."""


def wrong_variables(environment: Mapping[str, str] = os.environ) -> dict[str, str]:
    """{variable: what is wrong and what is allowed}, of all variables that a server would refuse."""
    readings: list[tuple[str, Callable[[Mapping[str, str]], object], Mapping[str, str]]] = [
        *((variable, read, environment) for variable, read in TEXTS.items()),
        # Each number by itself: who reads them all tells the first that is wrong.
        *((name, WorkerSettings.read, {name: environment[name]}) for name in NUMBERS if name in environment),
    ]
    found = {}
    for variable, read, given in readings:
        try:
            read(given)
        except UserInputError as error:
            found[variable] = str(error)
    return found


def check_variables(environment: Mapping[str, str] = os.environ) -> None:
    """Raises UserInputError with a line for each of `wrong_variables`."""
    if wrong := wrong_variables(environment):
        raise UserInputError("\n".join(wrong.values()))
