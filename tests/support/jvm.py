"""Java servers out of the jars that Maven fetched (`java/`)."""

from __future__ import annotations

import shutil
from pathlib import Path

JAVA = Path(__file__).parent / "java"
LEAN = ("-XX:+UseSerialGC", "-XX:TieredStopAtLevel=1", "-Xshare:auto", "-XX:-UsePerfData")
"""For a server that starts fast and is small."""


def jars(server: str) -> Path:
    """The folder of the server's jars."""
    return JAVA / server / "target/lib"


def lacking(server: str) -> str | None:
    """Why the server cannot be started here, or None."""
    if shutil.which("java") is None:
        return "there is no Java (a JDK, 17 or newer)"
    if not (JAVA / server / "target/installed").exists():
        return "its jars are not there: `make test` gets them where there are a JDK (17 or newer) and Maven"
    return None


def version(server: str, artifact: str) -> str:
    """The version in the name of the server's main jar."""
    (jar,) = jars(server).glob(f"{artifact}-[0-9]*[0-9].jar")
    return jar.stem.removeprefix(f"{artifact}-")


def command(jars: Path, scratch: Path, *arguments: str) -> list[str]:
    """The command line for a main class in ``jars``; native libraries are unpacked in ``scratch``."""
    return ["java", *LEAN, f"-Djava.io.tmpdir={scratch}", "-cp", f"{jars}/*", *arguments]
