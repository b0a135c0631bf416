# SPDX-License-Identifier: Apache-2.0
"""The errors vllm-merge raises on purpose. Anything else that escapes is a bug."""


class MergeError(Exception):
    """A merge, or the reading or writing around it, failed. The message is written for the person who asked."""


class UserInputError(MergeError):
    """What was handed in is wrong. The message says where, what was found, what is allowed and what to do."""


class MergeCancelled(MergeError):
    """The merge was stopped on request before it ended; nothing of it was kept."""
