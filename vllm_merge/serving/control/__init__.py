# SPDX-License-Identifier: Apache-2.0
"""The line between API processes and workers, and the one state that all of them serve."""
