# SPDX-License-Identifier: Apache-2.0
"""Experiments in an API process: assignment, exposures, comparisons, and decisions that every process follows."""
