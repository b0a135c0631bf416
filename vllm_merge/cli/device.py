# SPDX-License-Identifier: Apache-2.0
"""The --device option."""

from vllm_merge.errors import UserInputError


def checked_device(name: str) -> str:
    """`name` if something can be put there. Raises UserInputError with the reason if not."""
    import torch

    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise UserInputError(f"--device {name}: cannot be used here: {reason}") from None
    return name
