# SPDX-License-Identifier: Apache-2.0
"""A converted merge: the recipe file that it became, and what its reader should know."""

from __future__ import annotations

import textwrap
from dataclasses import dataclass
from typing import Any

import yaml

WIDTH = 110


class _Dumper(yaml.SafeDumper):
    """Writes an object that is used twice twice, not as an anchor and an alias."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


@dataclass(frozen=True)
class Converted:
    """document: the content of a recipe file. notes: what differs, or was left out, in sentences."""

    document: dict[str, Any]
    notes: tuple[str, ...]

    def to_yaml(self) -> str:
        """The recipe file, its notes as comments at the top."""
        lines = [line for note in self.notes for line in textwrap.wrap(f"- {note}", WIDTH, subsequent_indent="  ")]
        head = "".join(f"# {line}\n" for line in lines)
        return head + yaml.dump(
            self.document, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=WIDTH, default_flow_style=None
        )
