"""An answer whose head and the beginning of a large body arrive together is read, whatever came before of the head."""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest

from tests.e2e.support import ask, records
from tests.e2e.test_dialects import TOLD, dumps, lm_at
from tests.e2e.test_unusable import WAYS
from tests.listening import Listening, Silent


class Server(Listening):
    """Sends the first byte of an answer, and a moment later all else at once."""

    def __init__(self) -> None:
        self.status = 200
        self.text = "hello"
        outer = self

        class Handler(Silent):
            def do_POST(self) -> None:
                self.rfile.read(int(self.headers.get("content-length", 0)))
                choice = {"index": 0, "message": {"role": "assistant", "content": outer.text}, "finish_reason": "stop"}
                usage = {"prompt_tokens": 11, "completion_tokens": 7, "total_tokens": 18}
                answer = {"id": "x", "object": "chat.completion", "created": 1, "model": "m", "choices": [choice]}
                body = dumps({**answer, "usage": usage} if outer.status == 200 else {"error": {"message": outer.text}})
                head = (
                    f"HTTP/1.1 {outer.status} Status\r\nContent-Type: application/json\r\nContent-Length: {len(body)}"
                )
                self.wfile.write(b"H")
                self.wfile.flush()
                time.sleep(0.05)  # it is read alone
                self.wfile.write(head[1:].encode() + b"\r\n\r\n" + body)

        super().__init__(Handler)


@pytest.fixture
def server() -> Iterator[Server]:
    server = Server()
    yield server
    server.stop()


@pytest.mark.parametrize("way", WAYS)
def test_a_body_is_no_part_of_the_head_before_it(server: Server, way: str) -> None:
    """It was measured with the head: whatever was answered, it was a broken connection, charged and tried again."""
    server.text = 50_000 * "hello "
    lm = lm_at(server.url, "groq", "lm15")
    assert ask(lm, way) == [server.text]
    [record] = records(lm)
    assert (record.outcome, record.cost_nano, record.estimated) == ("ok", TOLD, False)
    lm.close()


@pytest.mark.parametrize("way", WAYS)
def test_a_refusal_with_a_long_page_costs_nothing(server: Server, way: str) -> None:
    server.status, server.text = 400, 150_000 * "x"
    lm = lm_at(server.url, "groq", "lm15")
    assert "xxx" in str(ask(lm, way))
    assert {(record.outcome, record.cost_nano, record.status) for record in records(lm)} == {("error", 0, 400)}
    lm.close()
