"""An outside Cassandra of one node, with data that outlives it."""

from __future__ import annotations

import asyncio
import contextlib
from pathlib import Path

from tests.support import jvm
from tests.support.process import Process, free_port
from tests.support.waiting import wait_until

# Without `initial_token` it would wait half a minute for a ring; with a commit log that is not written before the
# answer (`periodic`) a kill would lose what was acknowledged.
CONFIGURATION = """\
cluster_name: test
num_tokens: 1
initial_token: 0
auto_bootstrap: false
partitioner: org.apache.cassandra.dht.Murmur3Partitioner
endpoint_snitch: SimpleSnitch
seed_provider:
  - class_name: org.apache.cassandra.locator.SimpleSeedProvider
    parameters:
      - seeds: "127.0.0.1:{storage_port}"
listen_address: 127.0.0.1
storage_port: {storage_port}
rpc_address: {listen}
broadcast_rpc_address: 127.0.0.1
native_transport_port: {port}
commitlog_sync: batch
commitlog_segment_size: 8MiB
data_file_directories:
  - {root}/data/data
commitlog_directory: {root}/data/commitlog
saved_caches_directory: {root}/data/saved_caches
hints_directory: {root}/data/hints
cdc_raw_directory: {root}/data/cdc_raw
disk_failure_policy: die
commit_failure_policy: die
auto_snapshot: false
memtable_heap_space: 64MiB
memtable_offheap_space: 64MiB
key_cache_size: 4MiB
counter_cache_size: 0MiB
file_cache_size: 32MiB
concurrent_reads: 8
concurrent_writes: 8
concurrent_compactors: 1
native_transport_max_threads: 16
hinted_handoff_enabled: false
"""

LOGGING = """\
<configuration>
  <appender name="out" class="ch.qos.logback.core.ConsoleAppender">
    <encoder><pattern>%date{ISO8601} %-5level [%thread] %logger{0} - %msg%n</pattern></encoder>
  </appender>
  <root level="WARN"><appender-ref ref="out"/></root>
</configuration>
"""

# What it looks into, of the JDK's own (its conf/jvm17-server.options).
EXPORTS = [
    "java.base/jdk.internal.misc",
    "java.base/java.lang.ref",
    "java.management.rmi/com.sun.jmx.remote.internal.rmi",
    "java.rmi/sun.rmi.registry",
    "java.rmi/sun.rmi.server",
    "java.sql/java.sql",
    "jdk.unsupported/sun.misc",
]
OPENS = [
    *(
        f"java.base/{package}"
        for package in [
            "java.lang.module",
            "jdk.internal.loader",
            "jdk.internal.ref",
            "jdk.internal.reflect",
            "jdk.internal.math",
            "jdk.internal.module",
            "jdk.internal.util.jar",
            "sun.nio.ch",
            "java.io",
            "java.nio",
            "java.lang",
            "java.lang.reflect",
            "java.util",
            "java.util.concurrent",
            "java.util.concurrent.atomic",
        ]
    ),
    "jdk.management/com.sun.management.internal",
]


class CassandraProcess(Process):
    """A Cassandra node; `url` is its contact point. Each write is in its commit log before it is answered.

    Args:
        options: further lines of its configuration, ``name: value``.
    """

    def __init__(self, *options: str) -> None:
        super().__init__()
        self.port = free_port()
        self.url = f"127.0.0.1:{self.port}"
        self.version = version()
        files = configuration(self.root, "127.0.0.1", self.port, free_port(), options)
        for name, text in files.items():
            (self.root / name).write_text(text)
        self._serve = command(jvm.jars("cassandra"), self.root)

    async def start(self, timeout: float = 120.0) -> CassandraProcess:
        """Start it, also again after it was killed, with its data."""
        self.spawn(self._serve)

        async def serves() -> bool:
            assert self.running, f"Cassandra ended:\n{self.log}"
            return await answers(self.url)

        await wait_until(serves, timeout, what=f"Cassandra to answer\n{self.log}", every=0.05)
        return self

    async def restart(self) -> CassandraProcess:
        """Kill it and start it again, with its data."""
        await self.kill9()
        return await self.start()


def version() -> str:
    """Of the jars at hand."""
    return jvm.version("cassandra", "cassandra-all")


def configuration(root: Path, listen: str, port: int, storage_port: int, options: tuple[str, ...]) -> dict[str, str]:
    """The files of a node in ``root``: name → text."""
    text = CONFIGURATION.format(root=root, listen=listen, port=port, storage_port=storage_port)
    return {"cassandra.yaml": "\n".join([text, *options, ""]), "logback.xml": LOGGING}


def command(jars: Path, root: Path) -> list[str]:
    """The command that is the node. The name of one jar must be known, so ``jars`` has those of this machine."""
    (agent,) = jvm.jars("cassandra").glob("jamm-*.jar")
    return jvm.command(
        jars,
        root,
        *("-Xms64m", "-Xmx512m", "-Xss512k", "-Djdk.attach.allowAttachSelf=true"),
        *(f"--add-exports={package}=ALL-UNNAMED" for package in EXPORTS),
        *(f"--add-opens={package}=ALL-UNNAMED" for package in OPENS),
        f"-javaagent:{jars}/{agent.name}",
        f"-Djna.tmpdir={root}",
        "-Dio.netty.tryReflectionSetAccessible=true",
        "-Dcassandra-foreground=yes",
        "-Dcassandra.skip_wait_for_gossip_to_settle=0",
        "-Dcassandra.ring_delay_ms=0",
        "-Dcassandra.superuser_setup_delay_ms=0",
        "-Dcassandra.load_ring_state=false",
        "-Dcassandra.consistent.rangemovement=false",
        "-Dcassandra.shutdown_announce_in_ms=0",
        f"-Dcassandra.config=file://{root}/cassandra.yaml",
        f"-Dlogback.configurationFile={root}/logback.xml",
        f"-Dcassandra.storagedir={root}/data",
        f"-Dcassandra.logdir={root}/data/logs",
        "org.apache.cassandra.service.CassandraDaemon",
    )


async def answers(url: str) -> bool:
    """The node answers the first frame of CQL: OPTIONS with SUPPORTED (of version 4)."""
    host, _, port = url.rpartition(":")
    try:
        async with asyncio.timeout(2):
            reader, writer = await asyncio.open_connection(host, int(port))
            try:
                writer.write(bytes([0x04, 0, 0, 0, 0x05, 0, 0, 0, 0]))
                frame = await reader.readexactly(9)
            finally:
                writer.close()
                with contextlib.suppress(OSError):
                    await writer.wait_closed()
    except (OSError, EOFError, TimeoutError):
        return False
    return frame[4] == 0x06
