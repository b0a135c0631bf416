# SPDX-License-Identifier: Apache-2.0
"""Finding a recipe on a running server: candidates are merged and asked there, and the worse ones leave step by step."""
