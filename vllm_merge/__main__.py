# SPDX-License-Identifier: Apache-2.0
"""`python -m vllm_merge` is the `vllm-merge` command."""

from vllm_merge.cli.app import main

if __name__ == "__main__":
    main()
