# SPDX-License-Identifier: Apache-2.0
"""Errors of the routes under /v1/merge, in OpenAI's shape, as vLLM's own are."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI, Request
from pydantic import BaseModel, Field
from starlette.responses import JSONResponse

from vllm_merge.errors import UserInputError
from vllm_merge.serving.control.control import ControlError
from vllm_merge.serving.control.front import ArtifactUnavailable
from vllm_merge.serving.folders import Told


class ErrorDetail(BaseModel):
    """What went wrong."""

    message: Told = Field(description="What was found, what is allowed, and what to do.")
    type: str = Field(description="The name of the status.")
    param: str | None = Field(None, description="The field of the request that is wrong.")
    code: int = Field(description="The status.")


class ErrorAnswer(BaseModel):
    """The body of every answer with a status from 400 on."""

    error: ErrorDetail


class RouteError(Exception):
    """An answer that is an error. retry_after: seconds, for its header."""

    def __init__(self, status: int, message: str, *, param: str | None = None, retry_after: int | None = None) -> None:
        super().__init__(message)
        self.status, self.param, self.retry_after = status, param, retry_after


@contextmanager
def told_of_changes() -> Iterator[None]:
    """What keeps a change of the served names from being made, as an answer: 409, or 503 where it may pass."""
    try:
        yield
    except ArtifactUnavailable as error:
        raise RouteError(503 if error.retry else 409, str(error), retry_after=error.retry_after) from None
    except UserInputError as error:
        raise RouteError(409, str(error), param="name") from None
    except ControlError as error:
        raise RouteError(503, str(error), retry_after=error.retry_after) from None


async def _answer(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, RouteError)
    kind = HTTPStatus(error.status).phrase
    detail = ErrorDetail(message=str(error), type=kind, param=error.param, code=error.status)
    headers = {"retry-after": str(error.retry_after)} if error.retry_after is not None else None
    return JSONResponse({"error": detail.model_dump()}, error.status, headers)


def answer_errors(app: FastAPI) -> None:
    """Let `app` answer RouteError."""
    app.add_exception_handler(RouteError, _answer)


def errors(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """`responses` of a route that may answer with these; a body or parameter that is not understood is a 400."""
    named: dict[int | str, dict[str, Any]] = {
        status: {"model": ErrorAnswer, "description": HTTPStatus(status).phrase} for status in statuses
    }
    return {400: {"model": ErrorAnswer, "description": "The request is not understood"}, **named}
