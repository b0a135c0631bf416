# SPDX-License-Identifier: Apache-2.0
"""A download: an artifact's PEFT folder as a tar archive, made while it is sent. One piece is in memory at a time."""

from __future__ import annotations

import base64
import tarfile
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack

from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from vllm_merge.adapters.peft import WEIGHTS_FILE
from vllm_merge.serving.control.front import Artifact, FrontDoor
from vllm_merge.serving.memory.export import MAX_PIECE

MEDIA_TYPE = "application/x-tar"
_MODE = 0o644


class LeasedResponse(StreamingResponse):
    """Sends a download, and gives its lease back whether or not it was sent, or even begun."""

    def __init__(self, download: Download) -> None:
        headers = {
            "content-length": str(download.size),
            "content-disposition": f'attachment; filename="{download.folder}.tar"',
        }
        super().__init__(download.stream(), media_type=MEDIA_TYPE, headers=headers)
        self._download = download

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            await self._download.close()


class Download:
    """open(), then stream(), then close()."""

    def __init__(self, front: FrontDoor, artifact: Artifact) -> None:
        self.folder = artifact.name  # letters, digits and .-_@ alone
        self._front, self._artifact = front, artifact
        self._lease = AsyncExitStack()
        self._texts: dict[str, bytes] = {}
        self._weights = 0  # bytes

    async def open(self) -> None:
        """Have the artifact in every worker's cache, and leased. Raises ArtifactUnavailable, ControlError."""
        try:
            await self._lease.enter_async_context(self._front.hold(self._artifact, self._artifact.name))
            reply = await self._front.links.all[0].call("export", digest=self._artifact.plan.digest)
        except BaseException:
            await self._lease.aclose()
            raise
        self._texts = {name: text.encode() for name, text in reply["texts"].items()}
        self._weights = reply["size"]

    @property
    def size(self) -> int:
        """Bytes of the archive."""
        sizes = [*map(len, self._texts.values()), self._weights]
        return sum(tarfile.BLOCKSIZE + size + _padding(size) for size in sizes) + 2 * tarfile.BLOCKSIZE

    async def stream(self) -> AsyncIterator[bytes]:
        """The archive: small files first."""
        for name, text in self._texts.items():
            yield self._header(name, len(text)) + text + bytes(_padding(len(text)))
        yield self._header(WEIGHTS_FILE, self._weights)
        for offset in range(0, self._weights, MAX_PIECE):
            yield await self._piece(offset)
        yield bytes(_padding(self._weights) + 2 * tarfile.BLOCKSIZE)

    async def close(self) -> None:
        """Give the lease back."""
        await self._lease.aclose()

    async def _piece(self, offset: int) -> bytes:
        digest, worker = self._artifact.plan.digest, self._front.links.all[0]
        reply = await worker.call("export", digest=digest, offset=offset, size=MAX_PIECE)
        return base64.b64decode(reply["data"])

    def _header(self, name: str, size: int) -> bytes:
        entry = tarfile.TarInfo(f"{self.folder}/{name}")
        entry.size, entry.mode = size, _MODE
        return entry.tobuf(tarfile.USTAR_FORMAT)


def _padding(size: int) -> int:
    return -size % tarfile.BLOCKSIZE
