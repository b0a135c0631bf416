# SPDX-License-Identifier: Apache-2.0
"""The line between API processes and workers: JSON lines over Unix sockets, beside vLLM's engine loop.

Every worker serves one socket in a private folder; every API process (or offline program) keeps one connection to each.
Requests are `{"id", "op", …}`, answers `{"id", "result"}` or `{"id", "error": {"kind", "message"}}`, and a worker also sends
events, `{"event", …}`, on its own. A closed connection ends the session and with it everything the session held.
Nothing here passes through vLLM's engine loop, so no message ever makes a running request wait.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import logging
import os
import tempfile
import threading
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, Protocol

from vllm_merge.errors import MergeError
from vllm_merge.serving.worker.alarm import Watch, alarm_path

logger = logging.getLogger("vllm_merge.control")

RUNTIME_DIR_VARIABLE = "VLLM_MERGE_RUNTIME_DIR"
MAX_LINE = 32 << 20  # bytes; a plan of thousands of adapters is far below
MAX_UNREAD = 1 << 20  # bytes that wait for a process, beyond which it is told no more news

Message = dict[str, Any]


class ControlError(MergeError):
    """An error that travels over the line. `kind` is one of: failed, busy, conflict, disconnected.

    retry_after: seconds after which asking again may help, where that is known.
    """

    def __init__(self, kind: str, message: str, retry_after: int | None = None) -> None:
        super().__init__(message)
        self.kind, self.retry_after = kind, retry_after


class Session:
    """One connection at the worker's side."""

    def __init__(self, writer: asyncio.StreamWriter) -> None:
        self._writer = writer

    def tell(self, message: Message) -> None:
        """`send`, unless too much waits already for a process that does not read: what need not arrive is left out."""
        if self._writer.transport.get_write_buffer_size() < MAX_UNREAD:
            self.send(message)

    def send(self, message: Message) -> None:
        if not self._writer.is_closing():
            self._writer.write(encode(message))


class Handler(Protocol):
    """What a worker does with requests; runs on the server's own event loop."""

    async def handle(self, session: Session, op: str, message: Message) -> Message: ...

    def closed(self, session: Session) -> None: ...


def encode(message: Message) -> bytes:
    return json.dumps(message, separators=(",", ":")).encode() + b"\n"


def runtime_dir(create: bool = False) -> Path | None:
    """The folder of the sockets, named by an environment variable that child processes inherit.

    Created (private to the user) by the first process of a server that asks for it.
    """
    if name := os.environ.get(RUNTIME_DIR_VARIABLE):
        path = Path(name)
        if create:
            path.mkdir(mode=0o700, parents=True, exist_ok=True)
            status = path.stat()
            if status.st_uid != os.getuid() or status.st_mode & 0o022:
                raise ControlError(
                    "failed", f"{RUNTIME_DIR_VARIABLE}={path} is not this user's alone; give a private folder"
                )
        return path
    if not create:
        return None
    # A socket's path may have 107 bytes: a long TMPDIR would not do.
    base = tempfile.gettempdir() if len(tempfile.gettempdir()) < 60 else "/tmp"
    path = Path(tempfile.mkdtemp(prefix="vllm-merge-", dir=base))
    os.environ[RUNTIME_DIR_VARIABLE] = str(path)
    return path


class ControlServer:
    """Serves one socket from a thread of its own, whose event loop is `loop`."""

    loop: asyncio.AbstractEventLoop

    def __init__(self, path: Path, handler: Handler) -> None:
        self.path = path
        self._handler = handler
        self._stopping: asyncio.Event
        self._started = threading.Event()
        self._failure: Exception | None = None
        self._thread = threading.Thread(
            target=lambda: asyncio.run(self._main()), name="vllm-merge-control", daemon=True
        )

    def start(self) -> None:
        """Returns once the socket takes connections. Raises OSError if it cannot be made."""
        self._thread.start()
        self._started.wait()
        if self._failure is not None:
            raise self._failure

    def stop(self) -> None:
        if self._thread.is_alive():
            self.loop.call_soon_threadsafe(self._stopping.set)
            self._thread.join(timeout=5)

    async def _main(self) -> None:
        self.loop, self._stopping = asyncio.get_running_loop(), asyncio.Event()
        try:
            self.path.unlink(missing_ok=True)
            server = await asyncio.start_unix_server(self._serve, path=str(self.path), limit=MAX_LINE)
            self.path.chmod(0o600)
        except Exception as error:
            self._failure = ControlError(
                "failed", f"cannot listen at {self.path} ({error}); {RUNTIME_DIR_VARIABLE} may be long"
            )
            return
        finally:
            self._started.set()
        await self._stopping.wait()  # the tasks of open connections are cancelled when this returns
        server.close()
        self.path.unlink(missing_ok=True)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        session = Session(writer)
        tasks: set[asyncio.Task[None]] = set()
        try:
            while line := await reader.readline():
                task = asyncio.create_task(self._answer(session, json.loads(line)))
                tasks.add(task)
                task.add_done_callback(tasks.discard)
        except (ConnectionError, ValueError) as error:
            logger.warning("closing a control connection: %s", error)
        except asyncio.CancelledError:
            if not self._stopping.is_set():
                raise
            # The server stops. asyncio's streams would report a handler that ends as cancelled as an error.
        finally:
            for task in tasks:
                task.cancel()
            self._handler.closed(session)
            writer.close()

    async def _answer(self, session: Session, message: Message) -> None:
        answer: Message = {"id": message.get("id")}
        try:
            answer["result"] = await self._handler.handle(session, str(message.get("op")), message)
            encode(answer)  # what cannot be sent is an error, not silence
        except ControlError as error:
            answer["error"] = {"kind": error.kind, "message": str(error), "retry_after": error.retry_after}
        except Exception as error:
            logger.exception("control request failed: %s", message.get("op"))
            answer.pop("result", None)
            answer["error"] = {"kind": "failed", "message": f"{type(error).__name__}: {error}"}
        session.send(answer)


class WorkerLink:
    """The API side of one connection."""

    def __init__(self, path: Path, on_event: Callable[[Message], None]) -> None:
        self.path = path
        self.facts: Message = {}  # the worker's answer to `hello`
        self.on_connect: Callable[[], Awaitable[None]] | None = None  # the line serves nothing else before it is done
        self.on_lost: Callable[[], None] = lambda: None  # called when the worker's side has closed the connection
        self._on_event = on_event
        self._watch: Watch | None = None
        self._ids = itertools.count(1)
        self._waiting: dict[int, asyncio.Future[Message]] = {}
        self._writer: asyncio.StreamWriter | None = None
        self._reading: asyncio.Task[None] | None = None
        self._introduced = False

    async def connect(self) -> None:
        if self._writer is not None:
            self._writer.close()  # of a connection that was lost
        reader, self._writer = await asyncio.open_unix_connection(str(self.path), limit=MAX_LINE)
        if self._watch is None:
            with contextlib.suppress(FileNotFoundError):  # whoever serves this socket promises nothing
                self._watch = Watch(alarm_path(self.path))
        self._introduced = False
        self._reading = asyncio.create_task(self._read(reader))
        if self.on_connect is not None:
            try:
                await self.on_connect()
            except ControlError as error:
                await self.close()
                raise ConnectionError(str(error)) from error
        self._introduced = True

    @property
    def connected(self) -> bool:
        return self._introduced and self._open

    @property
    def _open(self) -> bool:
        return self._reading is not None and not self._reading.done()

    @property
    def alarms(self) -> int:
        """How many promises the worker has broken so far."""
        return self._watch.count if self._watch is not None else 0

    async def call(self, op: str, **fields: Any) -> Message:
        """Send a request and wait for its answer. Raises ControlError, of kind `disconnected` if the worker is gone."""
        if not self.connected:
            raise ControlError("disconnected", f"the worker at {self.path.name} is gone")
        return await self.introduce(op, **fields)

    async def introduce(self, op: str, **fields: Any) -> Message:
        """`call`, also from `on_connect`."""
        if self._writer is None or not self._open:
            raise ControlError("disconnected", f"the worker at {self.path.name} is gone")
        number = next(self._ids)
        future: asyncio.Future[Message] = asyncio.get_running_loop().create_future()
        self._waiting[number] = future
        try:
            self._writer.write(encode({"id": number, "op": op, **fields}))
            await self._writer.drain()
            return await future
        except ConnectionError as error:
            raise ControlError("disconnected", f"the worker at {self.path.name} is gone: {error}") from error
        finally:
            self._waiting.pop(number, None)
            if future.done() and not future.cancelled():
                future.exception()  # it was looked at, even if what was raised is another error

    def post(self, op: str, **fields: Any) -> None:
        """Send a request whose answer nobody waits for."""
        if self._writer is not None and self._open:
            self._writer.write(encode({"id": next(self._ids), "op": op, **fields}))

    async def close(self) -> None:
        if self._reading is not None:
            self._reading.cancel()
        if self._writer is not None:
            self._writer.close()
            with contextlib.suppress(ConnectionError):
                await self._writer.wait_closed()

    async def _read(self, reader: asyncio.StreamReader) -> None:
        try:
            while line := await reader.readline():
                message = json.loads(line)
                if "event" in message:
                    try:
                        self._on_event(message)
                    except Exception:
                        logger.exception("an event of the worker at %s was lost", self.path.name)
                elif (future := self._waiting.get(message.get("id"))) is not None and not future.done():
                    if error := message.get("error"):
                        future.set_exception(ControlError(error["kind"], error["message"], error.get("retry_after")))
                    else:
                        future.set_result(message["result"])
        except (ConnectionError, ValueError) as error:
            logger.error("lost the worker at %s: %s", self.path.name, error)
        finally:
            for future in self._waiting.values():
                if not future.done():
                    future.set_exception(ControlError("disconnected", f"the worker at {self.path.name} is gone"))
        if self._introduced:  # else whoever connects learns it
            self.on_lost()
