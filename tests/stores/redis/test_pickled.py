"""What travels to another process has no password, and finds it there in the environment."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
import redis

import dspy_prod
from dspy_prod.testing import Provider
from tests.stores.redis.servers import started_valkey

PASSWORD = "correct-horse"
ASKS = """
import pickle, sys
from pathlib import Path
made = pickle.loads(Path(sys.argv[1]).read_bytes())
print(len(made.ledger.records()), made.ledger)
"""


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    """Of a server that wants a password."""
    server = started_valkey()
    with closing(redis.Redis(port=server.port)) as client:
        client.config_set("requirepass", PASSWORD)
    yield f"redis://:{PASSWORD}@127.0.0.1:{server.port}/0"
    server.stop()


@pytest.mark.parametrize("kind", ["LM", "Embedder"])
@pytest.mark.parametrize("variable", ["DSPY_PROD_STORE", "DSPY_PROD__STORE"])
def test_a_pickle_finds_the_password_of_its_server(kind: str, variable: str, url: str, tmp_path: Path) -> None:
    with Provider() as provider:
        made = getattr(dspy_prod, kind)(
            "openai/text-embedding-3-small", api_base=provider.url, api_key="test", namespace=f"{kind} {variable}",
            store=f"{url}?lease=7",
        )  # fmt: skip
        made("hello")
        assert made.pipeline.store.flush(10)
        file = tmp_path / "made.pickle"
        file.write_bytes(pickle.dumps(made))
        made.pipeline.store.close()
    assert PASSWORD.encode() not in file.read_bytes()
    environment = {name: value for name, value in os.environ.items() if not name.startswith("DSPY_PROD_")}
    told = subprocess.run(
        [sys.executable, "-c", ASKS, str(file)], env={**environment, variable: url, "OPENAI_API_KEY": "test"},
        capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert told.stdout.startswith("1 "), told.stderr
    assert PASSWORD not in told.stdout
