"""A small service over a bundle: health check, several texts a request, limits on what comes in.

Make a bundle:   setfit-kd export runs/newswire --output-dir bundle
Install:         pip install '.[serve,onnx]'   (in the clone)
Run:             python examples/deploy_fastapi.py bundle --port 8000
Ask:             curl localhost:8000/predict -H 'content-type: application/json' -d '{"texts": ["..."]}'

The process loads no torch. One process runs requests side by side in threads; start several behind a balancer for more.
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

from setfit_kd.runtime import Classifier

MOST_TEXTS = 256
MOST_CHARACTERS = 10_000
MOST_BYTES = 4_000_000
"""Of a request: the limits above are checked on what has been parsed, this one on what has not."""
MOST_SECONDS = 30
"""For a request to arrive."""
MOST_AT_ONCE = 4
"""Requests classified at once; others wait. Each takes tens of megabytes, which the process keeps for later ones."""


class Texts(BaseModel):
    """What is asked: up to `MOST_TEXTS` texts, answered together."""

    texts: list[Annotated[str, Field(max_length=MOST_CHARACTERS)]] = Field(min_length=1, max_length=MOST_TEXTS)


class Answer(BaseModel):
    """What is said of one text."""

    label: str
    probabilities: dict[str, float]


class LimitRequests:
    """ASGI middleware that reads a request within the limits of size and time before the app sees it."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Hand the request on in one piece, or refuse it."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        length = dict(scope["headers"]).get(b"content-length", b"0")  # the server has refused what is no number
        body, is_whole = bytearray(), False
        with anyio.move_on_after(MOST_SECONDS):
            while not is_whole and max(int(length), len(body)) <= MOST_BYTES:
                message = await receive()
                if message["type"] == "http.disconnect":
                    return
                body += message.get("body", b"")
                is_whole = not message.get("more_body", False)
        if max(int(length), len(body)) > MOST_BYTES:
            await refuse(413, f"a request holds {MOST_BYTES:,} bytes at most")(scope, receive, send)
        elif not is_whole:
            await refuse(408, f"a request arrives within {MOST_SECONDS} seconds")(scope, receive, send)
        else:
            messages = iter([{"type": "http.request", "body": bytes(body)}])

            async def replay() -> Message:
                return next(messages, None) or await receive()

            await self.app(scope, replay, send)


def refuse(status: int, detail: str) -> JSONResponse:
    """Answer, and close the connection: what is left of the request is not read."""
    return JSONResponse({"detail": detail}, status, headers={"connection": "close"})


@asynccontextmanager
async def limit_threads(app: FastAPI) -> AsyncIterator[None]:
    anyio.to_thread.current_default_thread_limiter().total_tokens = MOST_AT_ONCE
    yield


def make_app(bundle: str, *, threads: int | None = None) -> FastAPI:
    """A service over the bundle in a folder."""
    classifier = Classifier(bundle, threads=threads)
    app = FastAPI(title="Text classifier", lifespan=limit_threads)
    app.add_middleware(LimitRequests)

    @app.exception_handler(RequestValidationError)
    async def tell_what_is_wrong(request: Request, error: RequestValidationError) -> JSONResponse:
        # Without the input itself, which may be large, or no valid text.
        problems = [{"where": problem["loc"], "what": problem["msg"]} for problem in error.errors()]
        return JSONResponse({"detail": problems}, status_code=422)

    @app.get("/health")
    def health() -> dict[str, Any]:
        classifier.predict_proba(["ready?"])
        return {"status": "ok", "labels": classifier.labels}

    @app.post("/predict")
    def predict(asked: Texts) -> list[Answer]:
        # A plain function: FastAPI runs it in a thread of its own, so that other requests are not held up.
        return [
            Answer(
                label=classifier.labels[int(row.argmax())],
                probabilities=dict(zip(classifier.labels, row.tolist(), strict=True)),
            )
            for row in classifier.predict_proba(asked.texts)
        ]

    return app


@click.command()
@click.argument("bundle", type=click.Path(exists=True, file_okay=False))
@click.option("--host", default="127.0.0.1")
@click.option("--port", default=8000, type=click.IntRange(0, 65535))
@click.option("--threads", default=None, type=click.IntRange(1), help="Most threads that a request takes.")
def main(bundle: str, host: str, port: int, threads: int | None) -> None:
    uvicorn.run(make_app(bundle, threads=threads), host=host, port=port, log_level="warning")


if __name__ == "__main__":
    main()
