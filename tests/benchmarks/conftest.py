# SPDX-License-Identifier: Apache-2.0
"""What the tests of the quality benchmark share."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from tests.benchmarks.quality_miniature import Done


@pytest.fixture(scope="session")
def done(tmp_path_factory: pytest.TempPathFactory) -> Done:
    """The miniature, which has run."""
    from tests.benchmarks.quality_miniature import made

    return made(tmp_path_factory.mktemp("quality"))
