# SPDX-License-Identifier: Apache-2.0
"""How what was found in a file is shown in a message."""

MAX_SHOWN = 120


def shown(value: object) -> str:
    """`repr(value)`, shortened in its middle where it is long: a file may hold megabytes where a word belongs."""
    text = repr(value)
    return text if len(text) <= MAX_SHOWN else f"{text[: MAX_SHOWN // 2]}…{text[-MAX_SHOWN // 2 :]}"
