"""The image of the container-backed tests, made of this machine's own files: `python -m tests.support.images`.

It needs no registry: it holds a shell, a Java runtime, the jars of Kafka and Cassandra, a Redis server, and the
libraries they need. What runs in a container, and with which configuration, is said when it is started (`containers`).
"""

from __future__ import annotations

import functools
import hashlib
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
from pathlib import Path
from typing import Any

import click

from tests.support import jvm
from tests.support.store import valkey_binary

REPOSITORY = "presence-test"
SHELL = "/bin/sh"
JAVA = "/opt/java"
REDIS = "/bin/redis-server"
ROOT = Path("/srv")
"""Of a service's files in its container."""

MODULES = [
    "java.base",
    "java.instrument",
    "java.logging",
    "java.management",
    "java.management.rmi",
    "java.naming",
    "java.rmi",
    "java.scripting",
    "java.security.jgss",
    "java.security.sasl",
    "java.sql",
    "java.xml",
    "jdk.attach",
    "jdk.compiler",
    "jdk.crypto.ec",
    "jdk.jdi",
    "jdk.management",
    "jdk.management.agent",
    "jdk.naming.dns",
    "jdk.net",
    "jdk.unsupported",
    "jdk.zipfs",
    "java.desktop",
]
OPENED_BY_NAME = ("libstdc++.so.6", "libgcc_s.so.1", "libnss_files.so.2", "libm.so.6", "librt.so.1", "libdl.so.2")
"""Libraries that the native parts of the jars ask for."""


def jars(server: str) -> Path:
    """The folder of the server's jars in the image."""
    return Path("/opt") / server


@functools.cache
def name() -> str:
    """The name of the image: another one for other jars, another Redis, another Java or another recipe."""
    parts = [Path(__file__).read_bytes(), Path(valkey_binary()).read_bytes()]
    parts += [(jvm.JAVA / server / "pom.xml").read_bytes() for server in ("kafka", "cassandra")]
    java = shutil.which("java")
    parts.append(str(Path(java).resolve() if java else None).encode())
    return f"{REPOSITORY}:{hashlib.sha256(b''.join(parts)).hexdigest()[:12]}"


def build(client: Any) -> None:
    """Make the image in the engine of ``client``."""
    with tempfile.TemporaryDirectory(prefix="ps-image-") as scratch:
        runtime = Path(scratch) / "java"
        subprocess.run(
            ["jlink", "--add-modules", ",".join(MODULES), "--strip-debug", "--no-header-files", "--no-man-pages",
             "--output", str(runtime)], check=True, timeout=300,
        )  # fmt: skip
        # Its archive of classes: a server starts the faster.
        subprocess.run([runtime / "bin/java", "-Xshare:dump"], check=True, timeout=120, stdout=subprocess.DEVNULL)
        archive = Path(scratch) / "image.tar"
        with tarfile.open(archive, "w") as tar:
            _fill(tar, runtime)
        repository, _, tag = name().partition(":")
        client.api.import_image_from_file(str(archive), repository=repository, tag=tag)


def _fill(tar: tarfile.TarFile, runtime: Path) -> None:
    for folder, mode in (
        ("tmp", 0o1777),
        ("srv", 0o755),
        ("root", 0o700),
        ("proc", 0o755),
        ("sys", 0o755),
        ("dev", 0o755),
    ):
        entry = tarfile.TarInfo(folder)
        entry.type, entry.mode = tarfile.DIRTYPE, mode
        tar.addfile(entry)
    programs = {SHELL: Path(SHELL), REDIS: Path(valkey_binary())}
    natives = [*programs.values(), runtime / "bin/java", *runtime.glob("lib/**/*.so")]
    for target, source in (programs | _libraries(natives)).items():
        tar.add(source.resolve(), target)
    tar.add(runtime, JAVA)
    for server in ("kafka", "cassandra"):
        tar.add(jvm.jars(server), str(jars(server)))
    with tempfile.NamedTemporaryFile("w", suffix=".passwd") as passwd:
        passwd.write("root:x:0:0:root:/root:/bin/sh\n")
        passwd.flush()
        tar.add(passwd.name, "/etc/passwd")


def _libraries(programs: list[Path]) -> dict[str, Path]:
    """The libraries that the programs load, and their loader, by the paths at which they are looked for."""
    found = {}
    for program in programs:
        # Of the runtime's libraries some belong to a desktop that is not there.
        told = subprocess.run(["ldd", program], capture_output=True, text=True, timeout=20, check=False).stdout
        for word in told.split():
            if word.startswith("/") and not Path(word).is_relative_to(programs[-1].parents[3]):
                found[word] = Path(word)
    known = subprocess.run(["/sbin/ldconfig", "-p"], capture_output=True, text=True, timeout=20, check=False).stdout
    for line in known.splitlines():
        library, _, path = line.partition(" => ")
        if library.split(" ")[0].strip() in OPENED_BY_NAME:
            found.setdefault(path, Path(path))
    return found


def main() -> int:
    """Make the image, unless it is there; say what was done."""
    from tests.support import containers

    if reason := containers.no_engine():
        click.echo(f"no image: {reason}")
        return 1
    for server in ("kafka", "cassandra"):
        if reason := jvm.lacking(server):
            click.echo(f"no image, {server}: {reason}")
            return 1
    if shutil.which("jlink") is None:
        click.echo("no image: there is no jlink (of a JDK, 17 or newer)")
        return 1
    client = containers.engine()
    if containers.has_image():
        click.echo(f"the image {name()} is there")
        return 0
    begun = time.monotonic()
    build(client)
    size = client.images.get(name()).attrs["Size"] // 1_000_000
    click.echo(f"made the image {name()}, {size} MB, in {time.monotonic() - begun:.1f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
