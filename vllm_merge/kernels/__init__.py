# SPDX-License-Identifier: Apache-2.0
"""Triton kernels for the merging on a GPU; each has a plain torch twin beside its caller and is imported only where it runs."""
