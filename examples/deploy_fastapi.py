"""A small web service for a bundle: health check, several texts per request, request limits.

Export a bundle: setfit-kd export runs/newswire --output-dir bundle
Install:         pip install '.[serve,onnx]'   (in the clone)
Run:             python examples/deploy_fastapi.py bundle --port 8000
Request:         curl localhost:8000/predict -H 'content-type: application/json' -d '{"texts": ["..."]}'

The process does not load torch and handles requests in parallel threads. For more throughput, start several processes
behind a load balancer.
"""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Annotated, Any

import anyio
import click
import uvicorn
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel, Field
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from setfit_kd.runtime.classify import Classifier, has_text

MAX_TEXTS = 256
MAX_CHARACTERS = 10_000
MAX_BYTES = 4_000_000
"""Size limit of a request. It is checked before parsing; the limits above are checked after parsing."""
MAX_SECONDS = 30
"""Time limit for receiving a request."""
MAX_CONCURRENT_REQUESTS = 4
"""Requests classified in parallel; further requests wait. Each needs tens of megabytes, which are then reused."""


class Texts(BaseModel):
    """Request: up to `MAX_TEXTS` texts."""

    texts: list[Annotated[str, Field(max_length=MAX_CHARACTERS)]] = Field(min_length=1, max_length=MAX_TEXTS)


class Prediction(BaseModel):
    """Prediction for one text, with a list of labels if multi-label; null for a text without visible characters."""

    label: str | list[str] | None = None
    probabilities: dict[str, float] | None = None


class LimitRequests:
    """ASGI middleware that enforces the size and time limits before a request reaches the app."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the complete request to the app, or reject it."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        length = dict(scope["headers"]).get(b"content-length", b"0")  # the server has already rejected invalid numbers
        body, is_complete = bytearray(), False
        with anyio.move_on_after(MAX_SECONDS):
            while not is_complete and max(int(length), len(body)) <= MAX_BYTES:
                message = await receive()
                if message["type"] == "http.disconnect":
                    return
                body += message.get("body", b"")
                is_complete = not message.get("more_body", False)
        if max(int(length), len(body)) > MAX_BYTES:
            await reject(413, f"request must not exceed {MAX_BYTES:,} bytes")(scope, receive, send)
        elif not is_complete:
            await reject(408, f"request must arrive within {MAX_SECONDS} seconds")(scope, receive, send)
        else:
            messages = iter([{"type": "http.request", "body": bytes(body)}])

            async def replay() -> Message:
                return next(messages, None) or await receive()

            await self.app(scope, replay, send)


def reject(status: int, detail: str) -> JSONResponse:
    """Create an error response that closes the connection, so that the rest of the request is not read."""
    return JSONResponse({"detail": detail}, status, headers={"connection": "close"})


@asynccontextmanager
async def limit_threads(app: FastAPI) -> AsyncIterator[None]:
    anyio.to_thread.current_default_thread_limiter().total_tokens = MAX_CONCURRENT_REQUESTS
    yield


def make_app(bundle: str, *, threads: int | None = None) -> FastAPI:
    """Create the service for the bundle in a folder."""
    classifier = Classifier(bundle, threads=threads)
    app = FastAPI(title="Text classifier", lifespan=limit_threads)
    app.add_middleware(LimitRequests)

    @app.exception_handler(RequestValidationError)
    async def handle_validation_error(request: Request, error: RequestValidationError) -> JSONResponse:
        # Leave out the input itself: it may be large or not valid Unicode.
        problems = [{"where": problem["loc"], "what": problem["msg"]} for problem in error.errors()]
        return JSONResponse({"detail": problems}, status_code=422)

    @app.get("/health")
    def health() -> dict[str, Any]:
        classifier.predict_proba(["ready?"])
        return {"status": "ok", "labels": classifier.labels}

    @app.post("/predict")
    def predict(request: Texts) -> list[Prediction]:
        # A plain function, not a coroutine: FastAPI runs it in a thread, so it does not block other requests.
        rows = classifier.predict_proba(request.texts)
        return [
            Prediction(
                label=classifier.decide(text, row)[1],
                probabilities=dict(zip(classifier.labels, row.tolist(), strict=True)),
            )
            if has_text(text)
            else Prediction()
            for text, row in zip(request.texts, rows, strict=True)
        ]

    return app


@click.command()
@click.argument("bundle", type=click.Path(exists=True, file_okay=False))
@click.option("--host", default="127.0.0.1")
@click.option("--port", default=8000, type=click.IntRange(0, 65535))
@click.option("--threads", default=None, type=click.IntRange(1), help="Maximum number of threads per request.")
def main(bundle: str, host: str, port: int, threads: int | None) -> None:
    uvicorn.run(make_app(bundle, threads=threads), host=host, port=port, log_level="warning")


if __name__ == "__main__":
    main()
