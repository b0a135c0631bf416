# SPDX-License-Identifier: Apache-2.0
"""How many tasks a base model, its adapters and their merges get right, before one of them is promoted."""
