"""Cassandra for the adapters' tests: a keyspace for a module, and sessions on it."""

from __future__ import annotations

import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest_asyncio

from presence.adapters.cassandra import DIRECTORY_TABLES, HISTORY_TABLES, CassandraSession

ONE_NODE = {"class": "SimpleStrategy", "replication_factor": 1}


@asynccontextmanager
async def cassandra_session(url: str, **options: Any) -> AsyncIterator[CassandraSession]:
    """A session that is not connected yet, on all tables."""
    session = CassandraSession([url], **{"tables": HISTORY_TABLES + DIRECTORY_TABLES} | options)
    try:
        yield session
    finally:
        await session.close()


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def keyspace(cassandra) -> str:
    """One with all tables, shared by the tests of a module, each with its own users."""
    name = f"t{uuid.uuid4().hex[:12]}"
    async with cassandra_session(cassandra.url, keyspace=name) as session:
        await session.create_schema(ONE_NODE)
    return name


@pytest_asyncio.fixture
async def session(cassandra, keyspace) -> AsyncIterator[CassandraSession]:
    """A connected one."""
    async with cassandra_session(cassandra.url, keyspace=keyspace) as one:
        await one.connect()
        yield one
