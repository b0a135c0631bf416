# SPDX-License-Identifier: Apache-2.0
"""Batched linear algebra of low-rank weight changes: bases, coordinates, selection, truncation."""
