"""The cases, read from `cases/*.toml` and checked (`cases/README.md` says what they mean)."""

from __future__ import annotations

import hashlib
import json
import re
import tomllib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from jsonschema import Draft202012Validator
from jsonschema.exceptions import ValidationError

from contracts.match import NAMED
from contracts.model import Case, Class, Clause, Level
from contracts.target import SECRETLESS

FOLDER = Path(__file__).parent / "cases"
SCHEMA = FOLDER / "case.schema.json"

MOST_IDS = 6000
"""`"$ids N"`: more than any limit asks for."""
_OPENING = ("connect", "open", "connect-refused")
_CONNECTED = frozenset(
    [
        "disconnect",
        "close",
        "cut",
        "freeze",
        "thaw",
        "closed",
        "still-open",
        "ping",
        "send",
        "raw",
        "watch",
        "unwatch",
        "beat",
        "keep-beating",
        "stop-beating",
        "expect",
        "expect-nothing",
        "expect-none-ever",
        "drain",
        "expect-heart-beat",
    ]
)
"""The verbs of an actor with a connection."""
_NAME = re.compile(r"[a-z][a-z0-9-]*")
_ITEM = re.compile(r"\$\{i\}")
_PLACE = re.compile(r"\$\{(?!i\})[^}*]+\}|\$ids .*")
"""An id that the runner makes from a name."""
_REPEATED = re.compile(r"\$\{(\d+)\*([^}]+)\}")
_CANARIES = 4
"""Canaries of each actor that the fixture of a directory knows."""


class CaseError(Exception):
    """A case is not as `cases/README.md` says: one line with the file, the case's id and the field."""


def load_cases(clauses: Mapping[str, Clause], folder: Path = FOLDER) -> list[Case]:
    """All cases, in the order of the files and of their text.

    Raises:
        CaseError: one is malformed, two have one id, or a clause does not exist.
    """
    checker = _Checker()
    cases: dict[str, Case] = {}
    for path in sorted(folder.glob("*.toml")):
        try:
            raw = tomllib.loads(path.read_text(encoding="utf-8"))
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise CaseError(f"{path.name}: {error}") from error
        if wrong := checker.fault(raw):
            raise CaseError(f"{path.name}: {wrong}")
        for one in raw["case"]:
            try:
                case = _case(one, path.stem, clauses)
            except ValueError as fault:
                raise CaseError(f"{path.name}: {one['id']}: {fault}") from fault
            if case.id in cases:
                raise CaseError(f"{path.name}: {case.id}: the id is taken by a case of {cases[case.id].file}.toml")
            cases[case.id] = case
    return list(cases.values())


def fixture(cases: Sequence[Case]) -> dict[str, dict[str, list[str]]]:
    """The directory of all cases, to be loaded into a server: "friends" and "conversations", lists of ids by id."""
    found = _directory(cases)
    user, friend, conversation = marks(cases)
    found["friends"] |= {user: [friend], friend: [user]}
    found["conversations"] |= {conversation: [user, friend]}
    return found


def marks(cases: Sequence[Case]) -> tuple[str, str, str]:
    """Two friends and their conversation, who are in the fixture of these cases and in no other.

    With them a server shows that it has this one loaded, and not that of another version of the suite.
    """
    text = json.dumps(_directory(cases), sort_keys=True)
    user = f"directory.{hashlib.sha256(text.encode()).hexdigest()[:8]}"
    return user, f"{user}.friend", f"{user}.conversation"


def _directory(cases: Sequence[Case]) -> dict[str, dict[str, list[str]]]:
    friends: dict[str, list[str]] = {}
    conversations: dict[str, list[str]] = {}
    for case in cases:
        for name, others in case.friends.items():
            friends[user_id(case, name)] = [user_id(case, other) for other in others]
        for name, members in case.conversations.items():
            conversations[user_id(case, name)] = [user_id(case, member) for member in members]
        if has_directory(case):
            # Who lists X as a friend is seen by X, whatever the policy; X's own friends are not changed by it.
            for canary, actor in canaries(case).items():
                friends[user_id(case, canary)] = [user_id(case, actor)]
    return {"friends": friends, "conversations": conversations}


def has_directory(case: Case) -> bool:
    """Whether the case's users are in the directory."""
    return bool(case.friends or case.conversations)


def canaries(case: Case) -> dict[str, str]:
    """The canaries that a directory knows, by name, each with the user who may see it."""
    users = {
        step[verb]: step.get("user", step[verb])
        for step in case.steps
        if (verb := next(iter(step))) in {"connect", "open"} and "$" not in step.get("user", step[verb])
    }
    return {f"canary-{actor}-{n}": user for actor, user in users.items() for n in range(1, _CANARIES + 1)}


def user_id(case: Case, name: str, run: str = "") -> str:
    """The id of a case's user or conversation.

    Args:
        run: what makes it this run's own; a directory is loaded once for all runs, so its users' ids stay.
    """
    return f"{case.id}.{name}" if has_directory(case) else f"{case.id}.{name}.{run}"


def has_other_ids(case: Case) -> bool:
    """Whether the case is about ids of a form of their own: where all ids are UUIDs it says nothing."""
    return any(_other_ids(step) for step in case.steps)


def _other_ids(step: Mapping[str, Any]) -> list[str]:
    """Ids of a step that the server has to take, and that are more than names: they are text for its own sake."""
    if "connect-refused" in step or re.search(r"\b4\d\d\b", str(step.get("status"))):
        return []
    named = [step[key] for key in ("connect", "user", "as") if key in step and (key != "connect" or "user" not in step)]
    named += step["users"] if isinstance(step.get("users"), list) else []
    in_names = [one for one in named if not _NAME.fullmatch(_ITEM.sub("", one))]
    return [one for one in [*in_names, *_ids_as_sent(step)] if not _PLACE.fullmatch(one)]


def _ids_as_sent(step: Mapping[str, Any]) -> Iterator[str]:
    """The ids within a path, and those within JSON."""
    if "get" in step and (found := re.match(r"/api/presence/(?:check|conversation)/([^/?]*)", step["get"])):
        yield found[1]
    body = step["json"] if "json" in step else _literal(step.get("body"))
    listed = body.get("userIds") if isinstance(body, Mapping) else body if "post" in step else None
    if "text" in step and str(body).startswith("$ids "):
        yield step["text"]  # the answer's text can tell of such ids only by what they are made of
    if isinstance(listed, list):
        yield from (one for one in listed if isinstance(one, str))


def _literal(body: str | None) -> Any:
    """A body that is written out, as JSON; None: it is none."""
    try:
        return json.loads(_REPEATED.sub(lambda found: found[2], body or ""))
    except ValueError:
        return None


def _case(raw: Mapping[str, Any], file: str, clauses: Mapping[str, Clause]) -> Case:
    for clause in raw["clauses"]:
        if clause not in clauses:
            raise ValueError(f"clauses: there is no {clause}")
    levels = {clauses[clause].level for clause in raw["clauses"]}
    case = Case(
        id=raw["id"],
        title=raw["title"],
        clauses=tuple(raw["clauses"]),
        conformance=Class(raw["class"]),
        level=next(level for level in Level if level in levels),
        steps=tuple(raw["steps"]),
        file=file,
        needs=frozenset(raw.get("needs", ())),
        features=frozenset(raw.get("features", ())),
        policy=raw.get("policy", "anyone"),
        friends=raw.get("friends", {}),
        conversations=raw.get("conversations", {}),
        alone=raw.get("alone", False),
    )
    if case.alone and any(step.get("idle") for step in case.steps):
        raise ValueError("alone: a case that is idle cannot have the target for itself")
    for number, step in enumerate(case.steps, 1):
        for fault in (*_faults(step, case), *_forward_references(step, case.steps[: number - 1])):
            raise ValueError(f"steps[{number}]: {fault}")
    if has_directory(case) and "directory" not in case.needs:
        raise ValueError("needs: 'directory' is missing, as the case has friends or conversations")
    return case


def _faults(step: Mapping[str, Any], case: Case) -> Iterator[str]:
    """What a schema cannot say."""
    verb = next(iter(step))
    for what, need in _needs(step):
        if need not in case.needs:
            yield f"{what} needs {need!r} among the case's needs"
    if step.get("at-least", 0) > step.get("at-once", 1):
        yield "at-least: is more than at-once"
    for name in ("save", "save-as"):
        if name in step and "at-once" in step:
            yield f"{name}: of which answer, with at-once?"
    for text in _texts(step):
        if re.fullmatch(r"\$[a-z-]+", text) and text not in NAMED and text != "$exactly":
            yield f"{verb}: {text!r} is no matcher"
        if text.startswith(("~ ", "!~ ")):
            try:
                re.compile(re.sub(r"\$\{[^}]*\}", "x", text.partition(" ")[2]))
            except re.error as error:
                yield f"{verb}: {text!r} is no regular expression: {error}"
        if (ids := re.fullmatch(r"\$ids (\d+)(?: from \d+)?", text)) and int(ids[1]) > MOST_IDS:
            yield f"{verb}: {text!r} asks for more than {MOST_IDS}"


def _needs(step: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """What of a step needs what of the target."""
    verb = next(iter(step))
    kind = step.get("token", "valid")
    if kind not in SECRETLESS:
        yield f"token: {kind!r}", "secret"
    if kind.startswith("other-"):
        yield f"token: {kind!r}", f"claim:{kind.removeprefix('other-')}"
    if step.get("instance", 1) > 1:
        yield "instance:", "instances"
    if verb == "hook":
        yield "hook:", f"hook:{step[verb]}"


def _forward_references(step: Mapping[str, Any], before: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """What a step speaks of though no step before it has made it."""
    verb = next(iter(step))
    marks = {one["mark"] for one in before if "mark" in one}
    if "since" in step and step["since"] not in marks:
        yield f"since: there is no mark {step['since']!r} before it"
    connected = {one[opening] for one in before for opening in _OPENING if next(iter(one)) == opening}
    if (
        verb in _CONNECTED
        and step[verb] not in connected
        and not any("${i}" in one for one in (step[verb], *connected))
    ):
        yield f"{verb}: {step[verb]} has no connection before it"
    if step.get("idle"):
        for name in _left_connected(before):
            yield f"idle: {name} is connected, and others may break what it is connected to"


def _left_connected(steps: Sequence[Mapping[str, Any]]) -> Sequence[str]:
    """The actors that these steps leave with a connection."""
    found: dict[str, None] = {}
    for step in steps:
        verb = next(iter(step))
        if verb in {"connect", "open"} and "refused" not in step:
            found[step[verb]] = None
        elif verb in {"disconnect", "close", "cut", "closed"}:
            found.pop(step[verb], None)
    return list(found)


def _texts(value: Any) -> Iterator[str]:
    """All text within a step."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for name, one in value.items():
            yield name
            yield from _texts(one)
    elif isinstance(value, Sequence):
        for one in value:
            yield from _texts(one)


class _Checker:
    """The schema. A step is held against the rules of its verb alone: that is faster, and says what is wrong."""

    def __init__(self) -> None:
        schema = json.loads(SCHEMA.read_text(encoding="utf-8"))
        definitions = schema["$defs"]
        self._verbs = {
            name.removeprefix("step:"): Draft202012Validator({"$ref": f"#/$defs/{name}", "$defs": definitions})
            for name in definitions
            if name.startswith("step:")
        }
        definitions["case"]["properties"]["steps"]["items"] = {"type": "object", "minProperties": 1}
        self._file = Draft202012Validator(schema)

    def fault(self, raw: Mapping[str, Any]) -> str | None:
        """What is wrong with a file: the case's id, the field, and why, in one line."""
        error = next(self._file.iter_errors(raw), None)
        if error is not None:
            path = list(error.absolute_path)
            case = raw["case"][path[1]] if len(path) > 1 else {}
            name = case.get("id", f"case {path[1] + 1}") if isinstance(case, dict) and case else ""
            return _one_line(name, _place(path[2:]), error)
        for case in raw["case"]:
            for number, step in enumerate(case["steps"], 1):
                verb = next(iter(step))
                if verb not in self._verbs:
                    return f"{case['id']}: steps[{number}]: the first key, {verb!r}, is no verb"
                error = next(self._verbs[verb].iter_errors(step), None)
                if error is not None:
                    return _one_line(case["id"], f"steps[{number}]{_place(error.absolute_path, inner=True)}", error)
        return None


def _place(path: Iterable[str | int], *, inner: bool = False) -> str:
    """Where a fault is: "steps[2].within"; arrays count from 1."""
    text = "".join(f"[{one + 1}]" if isinstance(one, int) else f".{one}" for one in path)
    return text if inner else text.lstrip(".")


def _one_line(name: object, place: str, error: ValidationError) -> str:
    return ": ".join(filter(None, [str(name), place, " ".join(error.message.split())]))
