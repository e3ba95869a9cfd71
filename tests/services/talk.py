"""A few words with a Kafka or a Cassandra, for the tests of the services."""

from __future__ import annotations

import asyncio
import uuid

from aiokafka import AIOKafkaConsumer, AIOKafkaProducer, TopicPartition
from aiokafka.admin import AIOKafkaAdminClient, NewTopic
from cassandra.cluster import EXEC_PROFILE_DEFAULT, Cluster, ExecutionProfile, Session
from cassandra.policies import ConstantReconnectionPolicy, WhiteListRoundRobinPolicy


async def make_topic(url: str) -> str:
    topic = f"topic-{uuid.uuid4().hex[:8]}"
    admin = AIOKafkaAdminClient(bootstrap_servers=url)
    await admin.start()
    try:
        await admin.create_topics([NewTopic(topic, num_partitions=2, replication_factor=1)])
    finally:
        await admin.close()
    return topic


async def send(url: str, topic: str, *values: bytes) -> None:
    producer = AIOKafkaProducer(bootstrap_servers=url, acks="all", request_timeout_ms=2000)
    await producer.start()
    try:
        for value in values:
            await producer.send_and_wait(topic, value, key=b"user")
    finally:
        await producer.stop()


async def received(url: str, topic: str, count: int) -> list[bytes]:
    consumer = AIOKafkaConsumer(bootstrap_servers=url, auto_offset_reset="earliest")
    await consumer.start()
    try:
        consumer.assign([TopicPartition(topic, number) for number in range(2)])
        found: list[bytes] = []
        async with asyncio.timeout(10):
            while len(found) < count:
                for records in (await consumer.getmany(timeout_ms=200)).values():
                    found += [bytes(record.value or b"") for record in records]
    finally:
        await consumer.stop()
    return found


def session(url: str) -> Session:
    host, _, port = url.rpartition(":")
    profile = ExecutionProfile(WhiteListRoundRobinPolicy([host]), request_timeout=10)
    return Cluster(
        [host],
        port=int(port),
        protocol_version=5,
        execution_profiles={EXEC_PROFILE_DEFAULT: profile},
        reconnection_policy=ConstantReconnectionPolicy(0.1, max_attempts=None),
    ).connect()


def make_table(db: Session) -> str:
    keyspace = f"test_{uuid.uuid4().hex[:8]}"
    replication = "{'class': 'SimpleStrategy', 'replication_factor': 1}"
    db.execute(f"CREATE KEYSPACE {keyspace} WITH replication = {replication}")
    db.execute(f"CREATE TABLE {keyspace}.t (a int PRIMARY KEY)")
    return f"{keyspace}.t"
