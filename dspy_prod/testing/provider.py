"""An OpenAI-compatible provider on loopback, with latency, faults, rate limits, streaming and a bill.

It is the truth that tests compare a cost ledger, a limiter or a breaker with: what arrived when, what was refused,
what was generated, and what that cost to the nano-USD. `python -m dspy_prod.testing` runs one in a process of its
own.
"""

from __future__ import annotations

import asyncio
import random
import time
import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

from dspy_prod.testing.answers import AnswerSource, Reply, UsageSource, compose
from dspy_prod.testing.bill import Bill
from dspy_prod.testing.calls import Api, Call, CallView, busiest_window, parse_object
from dspy_prod.testing.dialects import ID_PREFIXES
from dspy_prod.testing.exchange import Exchange
from dspy_prod.testing.faults import Fault, Hang, Reset, Status
from dspy_prod.testing.pages import serve_page
from dspy_prod.testing.plans import Chooser, FaultPlan
from dspy_prod.testing.quota import Quota
from dspy_prod.testing.server import LoopbackServer
from dspy_prod.testing.wire import Connection, HttpRequest, response

if TYPE_CHECKING:
    from typing_extensions import Self

Latency = float | tuple[float, float] | Callable[[CallView], float]
FaultSource = FaultPlan | Fault | Iterable[Fault | None] | Chooser | None

_ENDPOINTS: dict[str, Api] = {
    "/chat/completions": "chat",
    "/responses": "responses",
    "/completions": "completions",
    "/embeddings": "embeddings",
}


class Provider:
    """An OpenAI-compatible HTTP server on 127.0.0.1; a context manager.

    It answers POST /v1/chat/completions, /v1/responses and /v1/completions (plain and streamed), POST /v1/embeddings
    (vectors that depend on the text alone), GET /v1/models and /health, and shows GET /_bill and /_calls as JSON to
    other processes. The server runs in one daemon thread;
    callables given to it run there and must not block.

    What is billed: a request refused with an HTTP error is free. A plain answer is generated whole before its first
    byte, so a client that leaves early is billed in full. A stream whose client leaves is billed for all input and the
    chunks sent. Faults say for themselves.

    Args:
        latency: seconds before an answer (a stream's first byte), a (low, high) to draw from, or a callable of a call.
        answer: the text; or a mapping (a message with `content`/`tool_calls`, else sent as JSON); or a list of
            those, one per choice; or a callable of the call that returns any of them. None suits the request: fields
            that a DSPy adapter asks for, JSON that satisfies a schema, else "ok".
        prices: model (with or without "openai/") → (input, output[, cached input]) in USD per million tokens.
        price: the same for models not in `prices`.
        usage: (input, output[, cached, reasoning]) tokens, or a callable of the call. None counts a token per 4
            characters, at least 1. Output never exceeds `n * max_tokens`.
        faults: a FaultPlan, a fault for every call, a list (an entry a call, then healthy), or a callable of the call.
        rpm: requests accepted in any 60 s; more are answered 429 with Retry-After. The limits are in `quota`, where
            they can be changed while it runs. A refused request takes nothing.
        tpm: likewise for tokens: real usage, counted at arrival.
        per_second: likewise for requests in any 1 s.
        concurrency: likewise for requests in flight.
        ratelimit_headers: send `x-ratelimit-*` headers.
        chunks: a stream sends each text in at most this many chunks.
        chunk_delay: seconds before each of them.
        call_tools: call the first offered tool (unless the last message is a tool's result) when `answer` is None.
        bill_abandoned: whether a call whose client leaves during `latency` is billed: a plain one in full, a stream
            for its input.
        port: 0 takes a free one.
        seed: of the latency draw.

    Example:
        ```python
        with testing.Provider(latency=0.05, rpm=500) as provider:
            lm = dspy_prod.LM("openai/gpt-4o-mini", api_base=provider.url, api_key="test", store="memory://")
            lm("hello")
            assert lm.ledger.records()[0].cost_nano == provider.bill.nano
        ```
    """

    def __init__(
        self,
        *,
        latency: Latency = 0.0,
        answer: AnswerSource = None,
        prices: Mapping[str, Sequence[float]] | None = None,
        price: Sequence[float] = (0.15, 0.60),
        usage: UsageSource = None,
        faults: FaultSource = None,
        rpm: int | None = None,
        tpm: int | None = None,
        per_second: int | None = None,
        concurrency: int | None = None,
        ratelimit_headers: bool = False,
        chunks: int = 5,
        chunk_delay: float = 0.0,
        call_tools: bool = False,
        bill_abandoned: bool = True,
        port: int = 0,
        seed: int = 0,
    ) -> None:
        self.latency = latency
        self.answer = answer
        self.usage = usage
        self.quota = Quota(rpm, tpm, per_second, concurrency)
        self.ratelimit_headers = ratelimit_headers
        self.chunks = max(1, chunks)
        self.chunk_delay = chunk_delay
        self.call_tools = call_tools
        self.bill_abandoned = bill_abandoned
        self.bill = Bill(prices or {}, price)
        self.errors: list[Exception] = []
        """What callables of the test raised; their clients got a 500."""
        self.in_flight = 0
        """Accepted calls not yet answered."""
        self.max_in_flight = 0
        self.stopping = False
        self._calls: list[Call] = []
        self._random = random.Random(seed)
        self._mark = uuid.uuid4().hex[:8]
        self._created = int(time.time())
        self.down_fault: Fault | None = None
        """What `down` set."""
        self._port = port
        self._held: asyncio.Event | None = None
        self._server: LoopbackServer | None = None
        self.faults = faults

    # -- life

    def start(self) -> None:
        """Listen. Idempotent."""
        if self._server is None:
            self._server = LoopbackServer(self._serve, self._port)
            self._port = self._server.port
            self.stopping = False

    def stop(self) -> None:
        """Break off every call, close every socket, end the thread. Idempotent; what was recorded stays readable."""
        if self._server is not None:
            server, self._server = self._server, None
            self.stopping = True
            server.stop()

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def __repr__(self) -> str:
        return f"Provider({self.url if self._server else 'stopped'}, {len(self._calls)} calls, {self.bill.usd} USD)"

    @property
    def url(self) -> str:
        """The base URL, e.g. "http://127.0.0.1:40123/v1": `api_base` of an LM."""
        if not self._port:
            raise RuntimeError("the provider is not started; use `with Provider() as p:`")
        return f"http://127.0.0.1:{self._port}/v1"

    # -- what a test reads

    @property
    def calls(self) -> list[Call]:
        """A copy of the list of all calls, in order of arrival; refused ones included."""
        return list(self._calls)

    def requests_in_window(self, seconds: float = 60.0) -> int:
        """The most calls accepted in any sliding window of this length, by time of arrival.

        Accepted is what was not refused: status 200, or a call that hung, was reset, or whose client left.
        """
        return busiest_window([(c.received_at, 1) for c in self._calls if c.accepted], seconds)

    def tokens_in_window(self, seconds: float = 60.0, weights: Literal["billed", "bound"] = "billed") -> int:
        """The most tokens of accepted calls in any sliding window: real usage, or "bound", input + n * max_tokens."""
        return busiest_window([(c.received_at, c.weight(weights)) for c in self._calls if c.accepted], seconds)

    @property
    def _running(self) -> LoopbackServer:
        if self._server is None:
            raise RuntimeError("the provider is not running; use `with Provider() as p:`")
        return self._server

    def wait_until(self, condition: Callable[[Provider], object], timeout: float = 30.0) -> None:
        """Wait until `condition(provider)` is true; TimeoutError after `timeout` seconds."""
        deadline = time.monotonic() + timeout
        while not condition(self):
            if time.monotonic() > deadline:
                raise TimeoutError(f"not so after {timeout} s: {self.in_flight} in flight, {len(self._calls)} calls")
            time.sleep(0.001)

    # -- what a test sets

    @property
    def faults(self) -> FaultPlan:
        """The plan in force. Setting one begins it with the next call."""
        return self._plan[0]

    @faults.setter
    def faults(self, faults: FaultSource) -> None:
        # One assignment, so that the server thread never sees a new plan with an old beginning.
        self._plan = FaultPlan.of(faults), len(self._calls)

    def reset(self) -> None:
        """Forget calls, bill and used quota, and begin the fault plan anew. Calls in flight are still billed."""
        self._running.run(self._forget())

    def down(self, how: int | Literal["hang", "refuse", "reset"] | Fault = 500) -> None:
        """Until `up`: every request gets this status, hangs, is reset, or connections are refused."""
        if how == "refuse":
            self._running.run(self._running.refuse())
            return
        kinds: dict[object, Fault] = {"hang": Hang(), "reset": Reset("before")}
        fault = how if isinstance(how, Fault) else Status(how) if isinstance(how, int) else kinds.get(how)
        if fault is None:
            raise ValueError(f'down is a status, "hang", "refuse", "reset" or a fault, not {how!r}')
        self.down_fault = fault

    def up(self) -> None:
        """End `down`. Requests that hang go on hanging."""
        self.down_fault = None
        self._running.run(self._running.listen())

    def hold(self) -> None:
        """Let calls arrive and be accepted, and keep their answers back until `release`."""
        self._running.run(self._hold())

    def release(self) -> None:
        """Send the answers held back."""
        self._running.run(self._release())

    # -- for Exchange, on the server's thread

    async def generate(self, call: Call) -> Reply:
        """The reply to a call, however long it takes to make."""
        return compose(call, self.answer, self.usage, call_tools=self.call_tools, created=self._created)

    def draw_latency(self, call: Call) -> float:
        """Seconds that this call takes."""
        latency = self.latency
        if callable(latency):
            return latency(call)
        return self._random.uniform(*latency) if isinstance(latency, tuple) else latency

    def enter(self) -> None:
        """A call was accepted."""
        self.in_flight += 1
        self.max_in_flight = max(self.max_in_flight, self.in_flight)

    def leave(self) -> None:
        """An accepted call has ended."""
        self.in_flight -= 1

    def blame(self, call: Call, error: Exception) -> Status:
        """A callable of the test raised: keep the error for the test to see, and give the client a 500."""
        call.error = f"{type(error).__name__}: {error}"
        self.errors.append(error)
        return Status(500, f"a callable given to the provider raised {call.error}")

    async def released(self) -> None:
        """Wait while answers are held back."""
        if self._held is not None:
            await self._held.wait()

    # -- serving

    async def _serve(self, connection: Connection, request: HttpRequest) -> None:
        path = request.path.removeprefix("/v1")
        api = _ENDPOINTS.get(path) if request.method == "POST" else None
        if api is None:
            await serve_page(connection, request.method, path, bill=self.bill, calls=self._calls, down=self.down_fault)
            return
        received_at = time.monotonic()
        body = parse_object(request.body)
        if body is None:
            connection.write(response(400, Status(400, "The body is not a JSON object.").error()))
            return
        call = self._record(request, api, body, received_at)
        plan, beginning = self._plan
        fault = self.down_fault
        if fault is None:
            try:
                fault = plan.pick(call.index - beginning, call)
            except Exception as error:
                fault = self.blame(call, error)
        await Exchange(self, connection, call, fault).run()

    def _record(self, request: HttpRequest, api: Api, body: dict[str, Any], received_at: float) -> Call:
        index = len(self._calls)
        call = Call(
            index=index,
            call_id=f"{ID_PREFIXES[api]}-{self._mark}{uuid.uuid4().hex[:12]}",
            api=api,
            path=request.path,
            model=str(body.get("model", "")),
            headers=request.headers,
            body=body,
            stream=api != "embeddings" and bool(body.get("stream")),
            received_at=received_at,
            in_flight=self.in_flight + 1,
        )
        self._calls.append(call)
        return call

    async def _forget(self) -> None:
        self._calls = []
        self.bill.clear()
        self.quota.clear()
        self.errors.clear()
        self.max_in_flight = self.in_flight
        self._plan = self._plan[0], 0

    async def _hold(self) -> None:
        self._held = self._held or asyncio.Event()

    async def _release(self) -> None:
        if self._held is not None:
            self._held.set()
            self._held = None
