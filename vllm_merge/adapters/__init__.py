# SPDX-License-Identifier: Apache-2.0
"""LoRA adapters: in memory, in and out of PEFT folders, and the catalogue of registered ones."""
