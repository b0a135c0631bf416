# SPDX-License-Identifier: Apache-2.0
"""What happens to a request before vLLM sees it, and what its answer says."""
