# SPDX-License-Identifier: Apache-2.0
"""Runs a merge: groups modules by shape, works in batches and tiles within a workspace, cuts the result to its rank."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vllm_merge.adapters.factors import Adapter, LoraFactors
from vllm_merge.adapters.stacking import ModuleGroup, Stack, group_modules, stack_group
from vllm_merge.algebra.coordinates import Coordinates, Grams, coordinates
from vllm_merge.algebra.ranks import RankPolicy
from vllm_merge.algebra.support import nonzero_adapters
from vllm_merge.algebra.tiles import Part, Passes, Tile, default_tile_entries, parts
from vllm_merge.algebra.truncation import Truncated, truncate
from vllm_merge.algebra.workspace import Workspace, module_bytes
from vllm_merge.artifact import MergedAdapter, MergeReport
from vllm_merge.errors import MergeCancelled, MergeError, UserInputError
from vllm_merge.methods.preconditions import resolve_preconditions
from vllm_merge.methods.registry import MethodSpec, default_registry
from vllm_merge.methods.resolve import ResolvedParameters, resolve_parameters

LOW_ENERGY = 0.9
