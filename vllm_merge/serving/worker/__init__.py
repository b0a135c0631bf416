# SPDX-License-Identifier: Apache-2.0
"""A worker's half: the line of merges, the thread that makes them, and what vLLM's loader is handed."""
