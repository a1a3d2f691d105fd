"""The server's app: OpenAI's routes, health, metrics, and a page that shows the canvas."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator
from importlib import resources
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.background import BackgroundTask
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from transformers import PreTrainedTokenizerBase

from dsb_runtime.config import check_int
from dsb_runtime.doors.openai.answers import ANSWERS, END, INTERNAL, Completions, server_sent
from dsb_runtime.doors.openai.asked import CHAT, TEXT, Reader, read_object
from dsb_runtime.doors.openai.errors import BodyError
from dsb_runtime.doors.server import MAX_QUEUE
from dsb_runtime.doors.server.decoding import Decoding, Service
from dsb_runtime.doors.server.errors import FAULT, ApiError, body_error
from dsb_runtime.doors.server.gate import Gate, Traffic, shown_path
from dsb_runtime.engine.batch import BatchEngine
from dsb_runtime.families import check_model
from dsb_runtime.fields import shown

MOST_BYTES = 2**20  # of a body, many times what any prompt has
INDEX = "index.html"
PAGE = {
    INDEX: "text/html", "page.css": "text/css", "page.js": "text/javascript",
    "events.js": "text/javascript",
}  # fmt: skip
# The page loads nothing from elsewhere, and nobody may frame it.
PAGE_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; "
    "connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff", "Referrer-Policy": "no-referrer",
}  # fmt: skip
STREAM_HEADERS = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}  # proxies keep nothing
ROUTES = ("/health", "/metrics", "/v1/models", "/v1/models/{id}", TEXT, CHAT)
READ = ["GET", "HEAD"]


class Server:
    """What the routes share: the engine with its queue, the model's name."""

    def __init__(self, service: Service, model_name: str) -> None:
        self.service, self.model_name, self.created = service, model_name, int(time.time())
        self.reader = Reader(service.model, service.tokenizer, model_name)

    def model(self) -> dict[str, Any]:
        """The model as /v1/models lists it."""
        return {
            "id": self.model_name, "object": "model", "created": self.created, "owned_by": "dsb",
            "max_model_len": self.service.model.config.max_position_embeddings,
        }  # fmt: skip

    async def complete(self, request: Request, url: str) -> Response:
        """Answer a completion request. Its rows are freed whenever the client goes away."""
        try:
            asked = self.reader.read(url, await body_of(request))
        except ClientDisconnect:
            return Response(status_code=499)  # which nobody reads
        service = self.service
        mask_id = check_model(service.model).mask_id
        answers = ANSWERS[url](self.model_name, service.tokenizer, mask_id)
        decoding = Decoding(service, asked)
        if asked.stream:

            async def cancel() -> None:  # also where the stream has not begun
                decoding.cancel()

            return StreamingResponse(
                chunks(decoding, answers), media_type="text/event-stream", headers=STREAM_HEADERS,
                background=BackgroundTask(cancel),
            )  # fmt: skip
        try:
            if not await finished(request, decoding):
                return Response(status_code=499)  # which nobody reads
        finally:
            decoding.cancel()
        # Log-probabilities of many tokens take long to write, while others wait for the loop.
        body = await run_in_threadpool(answers.answer, decoding.answers, asked.samples)
        return JSONResponse(body)


async def body_of(request: Request) -> dict[str, Any]:
    """The JSON object that is the body. Another content type is refused: pages of other origins may
    send that without asking.

    Raises:
        BodyError: the body is none.
        ClientDisconnect: the client has gone away.
    """
    text = await request.body()
    kind = request.headers.get("content-type", "")
    if kind.partition(";")[0].strip().lower() != "application/json":
        said = f"the header Content-Type is {shown(kind)}; expected application/json"
        raise BodyError(said)
    return read_object("the body", text)


async def finished(request: Request, decoding: Decoding) -> bool:
    """Wait until every row has ended, or the client has gone away. Returns whether they have."""

    async def consume() -> None:
        async for _ in decoding.events():
            pass

    async def gone() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    tasks = [asyncio.ensure_future(consume()), asyncio.ensure_future(gone())]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        if not tasks[0].done():
            return False
        tasks[0].result()  # raises what a row has failed of
        return True
    finally:
        for task in tasks:
            task.cancel()


async def chunks(decoding: Decoding, answers: Completions) -> AsyncIterator[bytes]:
    """The server-sent events of a stream."""
    asked = decoding.asked
    try:
        for answer in decoding.answers:
            yield answers.first(answer)
        async for event in decoding.events():
            if event.answer.ended:  # as above
                yield await run_in_threadpool(answers.event, event)
            else:
                yield answers.event(event)
        if asked.usage:
            yield answers.last(decoding.answers, asked.samples)
    except ApiError as error:
        yield server_sent(error.body())
    finally:
        decoding.cancel()
    yield END


def create_app(
    engine: BatchEngine,
    tokenizer: PreTrainedTokenizerBase,
    model_name: str,
    *,
    api_key: str | None = None,
    max_queue: int = MAX_QUEUE,
    most_bytes: int = MOST_BYTES,
) -> FastAPI:
    """The server as an ASGI app. `app.state.traffic` counts its open requests and says whether it
    drains.

    Args:
        engine: what decodes. The app is its only user.
        tokenizer: of the engine's model.
        model_name: what `/v1/models` calls the model.
        api_key: what requests to `/v1/` must bring as `Authorization: Bearer KEY`.
        max_queue: how many rows may wait, beside those that are decoded.
        most_bytes: how long a body may be.

    Raises:
        TypeError, ValueError: an argument is not accepted.
    """
    check_int("max_queue", max_queue, 0)
    check_int("most_bytes", most_bytes, 1)
    if api_key is not None and not api_key:
        raise ValueError("api_key='': expected some text")
    service = Service(engine, tokenizer, max_queue)
    traffic = Traffic(service.unfinished)

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        for request in list(service.unfinished):
            request.cancel()

    # No pages of FastAPI's own: they load scripts from other hosts.
    app = FastAPI(title="dsb serve", openapi_url=None, lifespan=lifespan, redirect_slashes=False)
    paths = (*map(page_path, PAGE), *ROUTES)
    app.state.traffic = traffic
    app.add_middleware(
        Gate, traffic=traffic, metrics=service.metrics, api_key=api_key, most_bytes=most_bytes,
        paths=paths,
    )  # fmt: skip
    add_errors(app)
    add_routes(app, Server(service, model_name))
    add_page(app)
    return app


def add_errors(app: FastAPI) -> None:
    """Every error has OpenAI's shape."""

    async def api_error(_: Request, error: Any) -> Response:
        return error.response()

    async def invalid(_: Request, error: Any) -> Response:
        return body_error(error).response()

    async def http_error(request: Request, error: Any) -> Response:
        said = f"{request.method} {shown_path(request.scope['path'])}: {error.detail}"
        if error.status_code == 404:
            said += f"; expected one of {', '.join(ROUTES)}"
        elif error.status_code == 405:
            said += f"; expected {' or '.join(sorted(error.headers['Allow'].split(', ')))}"
        return ApiError(error.status_code, said, headers=error.headers).response()

    async def fault(_: Request, error: Any) -> Response:  # its traceback is in the log
        return ApiError(500, FAULT, code=INTERNAL).response()

    app.add_exception_handler(ApiError, api_error)
    app.add_exception_handler(BodyError, invalid)
    app.add_exception_handler(HTTPException, http_error)
    app.add_exception_handler(Exception, fault)


def add_routes(app: FastAPI, server: Server) -> None:
    @app.post(CHAT)
    async def chat(request: Request) -> Response:
        return await server.complete(request, CHAT)

    @app.post(TEXT)
    async def completions(request: Request) -> Response:
        return await server.complete(request, TEXT)

    @app.api_route("/v1/models", methods=READ)
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [server.model()]}

    @app.api_route("/v1/models/{name:path}", methods=READ)
    async def model(name: str) -> dict[str, Any]:
        server.reader.check_name(name)
        return server.model()

    @app.api_route("/health", methods=READ)
    async def health() -> dict[str, str]:
        return {"status": "ok"}

    @app.api_route("/metrics", methods=READ)
    async def metrics() -> Response:
        return Response(server.service.metrics.text(), media_type=CONTENT_TYPE_LATEST)


def page_path(name: str) -> str:
    return "/" if name == INDEX else f"/{name}"


def add_page(app: FastAPI) -> None:
    """The files of `page/`, which are read once."""
    folder = resources.files(__package__) / "page"

    def add(name: str, media_type: str) -> None:
        content = (folder / name).read_bytes()

        async def file() -> Response:
            return Response(content, media_type=media_type, headers=PAGE_HEADERS)

        app.add_api_route(page_path(name), file, methods=READ)

    for name, media_type in PAGE.items():
        add(name, media_type)
