# SPDX-License-Identifier: Apache-2.0
"""Merges written for mergekit, PEFT and LoRAX, as recipe files."""

from vllm_merge.convert.formats import FORMATS, convert
from vllm_merge.convert.written import Converted

__all__ = ["FORMATS", "Converted", "convert"]
