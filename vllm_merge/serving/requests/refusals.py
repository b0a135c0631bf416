# SPDX-License-Identifier: Apache-2.0
"""A request that is answered with no, before vLLM sees it."""

from __future__ import annotations

from starlette.responses import JSONResponse

from vllm_merge.errors import MergeError
from vllm_merge.serving.folders import without_folders


class Refused(MergeError):
    """A request is not served; the answer in OpenAI's shape. param: the field of the request that is wrong."""

    def __init__(self, status: int, kind: str, param: str, message: str, retry_after: int | None = None) -> None:
        super().__init__(message)
        self.status, self.kind, self.param, self.retry_after = status, kind, param, retry_after

    @property
    def response(self) -> JSONResponse:
        detail = {"message": without_folders(str(self)), "type": self.kind, "param": self.param, "code": self.status}
        headers = {"retry-after": str(self.retry_after)} if self.retry_after is not None else {}
        return JSONResponse({"error": detail}, self.status, headers)
