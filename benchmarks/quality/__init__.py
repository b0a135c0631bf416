# SPDX-License-Identifier: Apache-2.0
"""Does merging work, which method, and does OSRM help? A small model, real tasks, equal budgets, intervals."""
