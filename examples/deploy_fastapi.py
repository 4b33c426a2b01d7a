"""A small service over a bundle: health check, several texts a request, limits on what comes in.

Make a bundle:   setfit-kd export runs/newswire --output-dir bundle
Install:         pip install '.[serve,onnx]'   (in the clone)
Run:             python examples/deploy_fastapi.py bundle --port 8000
Ask:             curl localhost:8000/predict -H 'content-type: application/json' -d '{"texts": ["..."]}'

The process loads no torch. One process runs requests side by side in threads; start several behind a balancer for more.
"""

from typing import Annotated, Any

import click
import uvicorn
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel, Field

from setfit_kd.runtime import Classifier

MOST_TEXTS = 256
MOST_CHARACTERS = 10_000
MOST_BYTES = 4_000_000
"""Of a request: the limits above are checked on what has been parsed, this one on what has not."""


class Texts(BaseModel):
    """What is asked: up to `MOST_TEXTS` texts, answered together."""

    texts: list[Annotated[str, Field(max_length=MOST_CHARACTERS)]] = Field(min_length=1, max_length=MOST_TEXTS)


class Answer(BaseModel):
    """What is said of one text."""

    label: str
    probabilities: dict[str, float]


def make_app(bundle: str, *, threads: int | None = None) -> FastAPI:
    """A service over the bundle in a folder."""
    classifier = Classifier(bundle, threads=threads)
    app = FastAPI(title="Text classifier")

    @app.middleware("http")
    async def refuse_large_requests(request: Request, call_next: Any) -> Any:
        length = request.headers.get("content-length")
        if request.method == "POST" and length is None:
            return JSONResponse({"detail": "content-length is missing"}, status_code=411)
        if int(length or 0) > MOST_BYTES:  # the server has refused what is no number
            return JSONResponse({"detail": f"a request holds {MOST_BYTES:,} bytes at most"}, status_code=413)
        return await call_next(request)

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
