# SPDX-License-Identifier: Apache-2.0
"""Experiments on live traffic: what arms were used, what came of it, and what that says about them."""
