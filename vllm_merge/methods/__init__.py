# SPDX-License-Identifier: Apache-2.0
"""Merge methods: one file each; the typed signature of a method is the schema of its parameters."""
