# SPDX-License-Identifier: Apache-2.0
"""Recipe files: reading, checking, resolving to a plan, and the digest that identifies what a plan makes."""
