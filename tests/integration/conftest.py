"""Fixtures of the end-to-end tests, those of `tests/e2e`."""

from __future__ import annotations

from tests.e2e.conftest import connect, serve, sqlite_url, store_url

__all__ = ["connect", "serve", "sqlite_url", "store_url"]
