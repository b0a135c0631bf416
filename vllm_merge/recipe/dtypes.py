# SPDX-License-Identifier: Apache-2.0
"""The dtypes that a result may have."""

from typing import Literal, TypeAlias

Dtype: TypeAlias = Literal["float32", "float16", "bfloat16"]

BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}
