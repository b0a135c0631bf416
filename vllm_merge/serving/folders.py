# SPDX-License-Identifier: Apache-2.0
"""Messages as a client may read them: what lies where on the server is for its log, and for whoever runs it."""

from __future__ import annotations

import re
from typing import Annotated

from pydantic import AfterValidator

# An absolute path up to its last slash. Its names may have single spaces, as in a folder of that kind; routes are none.
_NAME = r"[^/\s'\"`(),;:]+"
_FOLDERS = re.compile(rf"(?<![\w./~])~?/(?!v\d/){_NAME}(?: {_NAME})*/(?:{_NAME}(?: {_NAME})*/)*")
_ALONE = re.compile(rf"(?<![\w./~…])/(?!v\d/)(?={_NAME})")


def without_folders(message: str) -> str:
    """`message`, where of every absolute path only the last name is left: “…/sql” instead of “/srv/adapters/sql”."""
    return _ALONE.sub("…/", _FOLDERS.sub("…/", message))


Told = Annotated[str, AfterValidator(without_folders)]
"""A field of an answer whose text may come from an error."""
