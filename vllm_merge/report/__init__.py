# SPDX-License-Identifier: Apache-2.0
"""What a merge did, drawn: plots and a page."""
