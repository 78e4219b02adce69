"""What MLflow or its driver says is told without the secrets it may repeat."""

from __future__ import annotations

from typing import Any

import pytest

from dspy_prod.registry import server as module
from dspy_prod.registry.errors import RegistryUnavailableError
from dspy_prod.registry.server import Server


@pytest.mark.parametrize("text", ["{uri} is down", "user me with horsebattery refused", "via http://p:proxypass@proxy"])
def test_an_error_of_the_registry_repeats_no_password(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    """A driver told the URI it could not reach, and it stood in the log and the event of a stale registry."""
    uri = "postgresql://me:horsebattery@there/db"
    monkeypatch.setattr(module, "_client", lambda *_: None)

    def fails(client: Any) -> None:
        raise OSError(text.format(uri=uri))

    with pytest.raises(RegistryUnavailableError) as caught:
        Server(uri).read(fails)
    assert "MLflow at postgresql://there/db: OSError: " in str(caught.value)
    assert not [secret for secret in ("horsebattery", "proxypass") if secret in str(caught.value)]
