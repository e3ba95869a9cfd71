"""An outside Kafka of one node, broker and controller in one, with data that outlives it."""

from __future__ import annotations

import asyncio
import logging
from pathlib import Path

from aiokafka.admin import AIOKafkaAdminClient
from aiokafka.errors import KafkaError

from tests.support import jvm
from tests.support.process import Process, free_port
from tests.support.waiting import wait_until

logging.getLogger("aiokafka").setLevel(logging.CRITICAL)  # what it says of brokers that are away fills the reports

CONFIGURATION_FILE = "server.properties"
FORMATTED = "data/meta.properties"
CONFIGURATION = """\
process.roles=broker,controller
node.id=1
controller.quorum.voters=1@127.0.0.1:{controller_port}
listeners=PLAINTEXT://{listen},CONTROLLER://127.0.0.1:{controller_port}
advertised.listeners=PLAINTEXT://{url}
controller.listener.names=CONTROLLER
inter.broker.listener.name=PLAINTEXT
listener.security.protocol.map=PLAINTEXT:PLAINTEXT,CONTROLLER:PLAINTEXT
log.dirs={root}/data
auto.create.topics.enable=false
num.partitions=6
offsets.topic.num.partitions=1
offsets.topic.replication.factor=1
transaction.state.log.num.partitions=1
transaction.state.log.replication.factor=1
transaction.state.log.min.isr=1
share.coordinator.state.topic.num.partitions=1
share.coordinator.state.topic.replication.factor=1
share.coordinator.state.topic.min.isr=1
group.initial.rebalance.delay.ms=0
num.network.threads=1
num.io.threads=2
log.cleaner.dedupe.buffer.size=4194304
broker.session.timeout.ms=1000
broker.heartbeat.interval.ms=200
"""
"""Topics are made by who needs them, never by asking for one. After a kill a broker is taken back at once."""


class KafkaProcess(Process):
    """A Kafka broker; `url` is its bootstrap address.

    Args:
        options: further lines of its configuration, ``name=value``.
    """

    def __init__(self, *options: str) -> None:
        super().__init__()
        self.port = free_port()
        self.url = f"127.0.0.1:{self.port}"
        self.version = version()
        text = configuration(self.root, self.url, self.url, free_port(), options)
        (self.root / CONFIGURATION_FILE).write_text(text)
        self._format, self._serve = commands(jvm.jars("kafka"), self.root)

    async def start(self, timeout: float = 120.0) -> KafkaProcess:
        """Start it, also again after it was killed, with its data; wait until it serves all its partitions."""
        if not (self.root / FORMATTED).exists():
            await self._prepare()
        self.spawn(self._serve)

        async def serves() -> bool:
            assert self.running, f"Kafka ended:\n{self.log}"
            return await answers(self.url)

        await wait_until(serves, timeout, what=f"Kafka to answer\n{self.log}", every=0.05)
        return self

    async def restart(self) -> KafkaProcess:
        """Kill it and start it again, with its data."""
        await self.kill9()
        return await self.start()

    async def _prepare(self) -> None:
        with self.log_file.open("ab") as log:
            process = await asyncio.create_subprocess_exec(*self._format, stdout=log, stderr=log, cwd=self.root)
        try:
            code = await asyncio.wait_for(process.wait(), 60)
        finally:
            if process.returncode is None:
                process.kill()
                await process.wait()
        assert code == 0, f"Kafka's data folder cannot be prepared:\n{self.log}"


def version() -> str:
    """Of the jars at hand."""
    return jvm.version("kafka", "kafka_2.13")


def configuration(root: Path, listen: str, url: str, controller_port: int, options: tuple[str, ...]) -> str:
    """For a broker in ``root`` that listens on one address and tells its clients another."""
    text = CONFIGURATION.format(root=root, listen=listen, url=url, controller_port=controller_port)
    return "\n".join([text, *options, ""])


def commands(jars: Path, root: Path) -> tuple[list[str], list[str]]:
    """Two commands: the first prepares the data folder, as a broker demands it, and the second is the broker."""
    file, log = str(root / CONFIGURATION_FILE), "-Dorg.slf4j.simpleLogger.defaultLogLevel=warn"
    tool = ("-Xmx128m", log, "kafka.tools.StorageTool", "format", "-t", "MkU3OEVBNTcwNTJENDM2Qg", "-c", file)
    broker = ("-Xms256m", "-Xmx256m", log, "kafka.Kafka", file)
    return jvm.command(jars, root, *tool), jvm.command(jars, root, *broker)


async def answers(url: str) -> bool:
    """The broker is there, and each partition of each topic has its leader."""
    admin = AIOKafkaAdminClient(bootstrap_servers=url, request_timeout_ms=2000)
    try:
        async with asyncio.timeout(3):
            await admin.start()
            cluster = await admin.describe_cluster()
            topics = await admin.describe_topics()
        partitions = [partition for topic in topics for partition in topic["partitions"]]
        return bool(cluster["brokers"]) and all(partition["leader"] >= 0 for partition in partitions)
    except (KafkaError, OSError, TimeoutError):
        return False
    finally:
        await admin.close()
