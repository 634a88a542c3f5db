"""What people really wrote: the texts that are sent, and the conversations that are imported."""

import gzip
import json
from collections.abc import Iterator
from itertools import cycle, islice
from pathlib import Path
from random import Random
from typing import Any

ROOT = Path(__file__).parent.parent
# 400,000 real messages, where they lie beside the project; else the few that come with it.
LARGE = ROOT.parent / "shared" / "data" / "large.jsonl.gz"
SMALL = ROOT / "examples" / "conversations.jsonl"
# Of the large file, one conversation in so many.
STRIDE = 16

Conversation = dict[str, Any]


def name() -> str:
    return "422,525 real messages" if LARGE.exists() else "the messages of examples/"


def bodies(count: int) -> list[str]:
    """So many texts of messages, the same each time."""
    found = [
        message["content"]
        for conversation in _conversations()
        for message in conversation["messages"]
        if message["content"]
    ]
    Random(1).shuffle(found)
    return list(islice(cycle(found), count))


def write_import(path: Path, *, messages: int, mark: str) -> int:
    """Write a file to import with at least so many messages; returns how many it has.

    `mark` makes its users and conversations new ones: it leads their external ids and usernames.
    """
    stored = 0
    with path.open("w") as file:
        for number, conversation in enumerate(cycle(_conversations())):
            if stored >= messages:
                break
            file.write(json.dumps(_marked(conversation, mark, number)) + "\n")
            stored += len(conversation["messages"])
    return stored


def _marked(conversation: Conversation, mark: str, number: int) -> Conversation:
    def renamed(username: str) -> str:
        return f"{mark}.{username}"[:64]

    return conversation | {
        "source": mark,
        "source_id": str(number),
        "participants": [
            person | {"username": renamed(person["username"])}
            for person in conversation["participants"]
        ],
        "messages": [
            message | {"sender": renamed(message["sender"])} for message in conversation["messages"]
        ],
    }


def _conversations() -> list[Conversation]:
    """The conversations, shuffled."""
    found = [json.loads(line) for line in _lines()]
    Random(1).shuffle(found)
    return found


def _lines() -> Iterator[bytes]:
    if LARGE.exists():
        with gzip.open(LARGE) as file:
            yield from islice(file, 0, None, STRIDE)
    else:
        yield from SMALL.open("rb")
