"""Triage of support requests as a service: guarded, for each tenant within its budget, and streamed on demand.

    uvicorn app:app --workers 4 --timeout-graceful-shutdown 10
"""

import os
from pathlib import Path
from typing import Literal

import dspy
from fastapi import FastAPI
from pydantic import BaseModel, Field

import dspy_prod
from dspy_prod import asgi


class Sort(dspy.Signature):
    """Sort a support request, and draft a first answer."""

    request: str = dspy.InputField()
    queue: Literal["billing", "technical", "other"] = dspy.OutputField()
    answer: str = dspy.OutputField()


class Request(BaseModel):
    text: str = Field(min_length=1, max_length=8_000)


class Triaged(BaseModel):
    queue: str | None
    answer: str
    status: str


config = dspy_prod.from_config(os.environ.get("TRIAGE_CONFIG") or Path(__file__).with_name("prod.toml"))
dspy.configure(lm=config.lm)
triage = config.production(dspy.Predict(Sort))

app = FastAPI(title="Triage")
asgi.install(app, headers={"user": "X-User", "tenant": "X-Tenant"}, deadline=30)


@app.post("/triage")
async def sort(request: Request) -> Triaged:
    found = await triage.acall(request=request.text)
    return Triaged(queue=found.queue, answer=found.answer, status=dspy_prod.call_report(found).status)


@app.post("/triage/stream")
async def stream(request: Request) -> asgi.EventStream:
    listeners = [dspy.streaming.StreamListener("answer")]  # they keep state, so each request has its own
    program = dspy.streamify(triage, stream_listeners=listeners, is_async_program=True)
    return asgi.EventStream(program(request=request.text))
