# SPDX-License-Identifier: Apache-2.0
"""The vllm-merge command. Modules import what is heavy inside their functions, so that --help is quick."""
