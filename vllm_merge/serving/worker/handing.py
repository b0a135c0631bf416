# SPDX-License-Identifier: Apache-2.0
"""What vLLM's own thread gets of an artifact, inside a step: the LoRAModel of a request, and what goes into a slot.

For requests of ours nothing here reads a file, allocates anything of an adapter's size or raises: an exception would end the engine.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch

from vllm_merge.serving import compat
from vllm_merge.serving.control.control import Message
from vllm_merge.serving.identity import FIRST_ID, parse_path
from vllm_merge.serving.memory.residency import ArtifactStore
from vllm_merge.serving.memory.slots import SlotLayout
from vllm_merge.serving.worker.alarm import Alarm
from vllm_merge.serving.worker.claims import Claims

logger = logging.getLogger("vllm_merge.worker")


class Handing:
    """tell(event): lets every API process know, by and by."""

    def __init__(
        self,
        manager: Any,
        store: ArtifactStore,
        layout: SlotLayout | None,
        claims: Claims,
        alarm: Alarm,
        tell: Callable[[Message], None],
    ) -> None:
        self._manager, self._store, self._layout = manager, store, layout
        self._claims, self._alarm, self._tell = claims, alarm, tell
        self._zero = compat.zero_lora_model(manager, 1)

    def load(self, lora_request: Any) -> Any | None:
        """The LoRAModel of a request of ours, None for others.

        Raises only for a request that is not ours and has an id of ours, before anything is scheduled with it
        (`load_inplace` under a name of ours): other weights would answer for an artifact.
        """
        digest = parse_path(lora_request.lora_path)
        if digest is None:
            if lora_request.lora_int_id >= FIRST_ID:
                raise ValueError(
                    f"{lora_request.lora_name} is a name of vllm-merge; load the adapter under another one"
                )
            return None
        try:
            artifact = self._store.get(digest)
            if artifact is not None:  # vLLM never keeps a tensor of it, however many adapters it registers
                model = compat.marker_lora_model(self._manager, lora_request.lora_int_id)
                model.vllm_merge_service, model.vllm_merge_digest = self, digest
                return model
            reason = f"{lora_request.lora_name} was not in memory when a request needed it"
        except Exception as error:
            logger.exception("could not hand %s to vLLM", lora_request.lora_name)
            reason = f"{lora_request.lora_name} could not be handed to vLLM: {error}"
        self._say_broken(digest, lora_request.lora_int_id, reason)
        return self._zero.clone(lora_request.lora_int_id)

    def fill(self, lora_model: Any, slot: int) -> Any | None:
        """Fill a slot with the artifact that a LoRAModel stands for. Never raises.

        True: done. A LoRAModel: vLLM is to copy from it. None: from the one that stands there, which changes nothing.
        """
        digest = lora_model.vllm_merge_digest
        try:
            artifact = self._store.peek(digest)
            if artifact is not None:
                if artifact.storage.is_cuda:  # its memory may be given back before this stream has read it
                    stream = torch.cuda.current_stream(artifact.storage.device)
                    for storage in artifact.storages:
                        storage.record_stream(stream)
                if artifact.source is None or self._layout is None:
                    return compat.packed_lora_model(self._manager, lora_model.id, artifact.factors)
                self._layout.fill(slot, artifact.source)
                return True
            reason = "it was not in memory when its slot was filled"
        except Exception as error:
            logger.exception("could not fill slot %d", slot)
            reason = f"its slot could not be filled: {error}"
        self._say_broken(digest, lora_model.id, reason)
        return None

    def _say_broken(self, digest: str, lora_id: int, reason: str) -> None:
        """The id is used up: whoever asks next gets another one, and requests that run under it fail.

        All that an API process looks at before it passes a token on is done when this returns, before the step runs.
        """
        self._claims.break_(lora_id, reason)
        self._alarm.ring()
        logger.error("artifact %s: %s; its requests fail", digest[:12], reason)
        self._tell({"event": "broken", "digest": digest, "lora_id": lora_id, "reason": reason})
