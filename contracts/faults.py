"""What ends a case early: the server's fault, or ours.

- `Failed`: the server did not do what a clause says.
- `Unreachable`: no TCP connection came up; that says nothing of the server's conduct.
- `Untrusted`: the same of a server that cannot prove who it is.
- `Misused`: the case asks for what cannot be done.
- `NotUndone`: what the case broke on purpose stays broken.
- `TargetUnusable`: no case can be run at all.
"""

from __future__ import annotations


class Failed(Exception):
    """The server did otherwise than expected.

    Args:
        expected: what should have come, as a phrase: "MESSAGE about bob, within 3 s".
        actual: what came instead.
    """

    def __init__(self, expected: str, actual: str) -> None:
        super().__init__(f"expected {expected}; {actual}")
        self.expected = expected
        self.actual = actual


class Unreachable(Exception):
    """No TCP connection can be made."""

    @classmethod
    def after(cls, error: OSError, url: str, limit: float) -> Unreachable:
        """What came of the attempt to connect to a URL, for which there was a limit (s)."""
        late = isinstance(error, TimeoutError) and not error.strerror
        reason = f"no TCP connection within {limit:g} s" if late else error.strerror or error
        return cls(f"{url}: {reason}")


class Untrusted(Unreachable):
    """The server's certificate is not one that the target file trusts."""

    def __init__(self, url: str, reason: str) -> None:
        super().__init__(f"{url}: its certificate is not trusted: {reason}; see ca in the target file")


class Misused(Exception):
    """A fault of the case itself."""


class NotUndone(Exception):
    """A hook that brings back what a case took away has failed: one line."""


class TargetUnusable(Exception):
    """The target is down, no presence server, or refuses our tokens: one line."""
