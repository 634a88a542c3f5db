"""Requests of every kind for every RPC, and what came of them.

A request is made from its descriptor alone: most fields say by their names what belongs in them,
and now and then one gets what belongs nowhere. The world that requests talk about grows with what
is accepted and is refilled, since deleting and purging are among the calls. Calls follow one
another, so that the same seed makes the same run, but for ids and times.
"""

from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from random import Random
from typing import Any
from uuid import UUID

import grpc
from google.api import field_behavior_pb2
from google.protobuf import text_format
from google.protobuf.descriptor import FieldDescriptor, MethodDescriptor
from google.protobuf.message import DecodeError
from google.protobuf.message import Message as ProtoMessage
from google.protobuf.message_factory import GetMessageClass
from google.protobuf.struct_pb2 import Struct, Value

from parley.v1.access_pb2 import Access
from service.access import access_of
from service.masks import FIXED
from service.server import MAX_REQUEST_BYTES

from .make import USER, Client, Conversation, Message, Participant, User, failure_of

ALLOWED = {
    "OK",
    "INVALID_ARGUMENT",
    "NOT_FOUND",
    "ALREADY_EXISTS",
    "FAILED_PRECONDITION",
    "ABORTED",
    "OUT_OF_RANGE",
    "PERMISSION_DENIED",
    "RESOURCE_EXHAUSTED",
}
TIMEOUT_SECONDS, STREAM_SECONDS = 20.0, 0.5
# A new room after so many calls; requests talk about the newest.
REFILL_CALLS = 40
MAX_USERS, MAX_ROOMS, MAX_KEPT = 24, 12, 32
# How often an RPC is called, where not as often as any other.
WEIGHTS = {"Delete": 0.3, "Purge": 0.2, "SetPassword": 0.3, "VerifyPassword": 0.3, "Watch": 0.3}
UNSERVED_WEIGHT = 0.1
# What grpc.aio makes of a status that comes while it still sends; no word of it is the server's.
OVER = "Internal error from Core"
# What an update is of.
RESOURCES = ("user", "conversation", "message", "participant")
# Not required by the contract, yet few requests mean anything without them; and such oneofs.
OFTEN = (*RESOURCES, "content", "role", "sender_id", "creator_id", "user_id")
NEEDED = ("key", "scope", "login", "frame", "record")

WORDS = (
    "hello", "world", "the", "quick", "brown", "fox", "żółw", "李雷", "schön", "can't", "e-mail",
    "foo_bar", "42", "🚀",
)  # fmt: skip
LINES = (
    " ", "\0", "a\0b", "\u202egnp.exe", "\u2066x", "👩\u200d👩\u200d👧", "e" + "\u0301" * 300,
    "\u200b", "\ufeff", "\U0010ffff", "\ud7ff", "\r\n", "\u2028", "x" * 63, "x" * 65, "x" * 257,
    "x" * 5_000, "é" * 513, "../..", "' OR 1=1 --", "%", "_", "\\", "\\u0000", "null", "*", "0",
    "-1", "1e309", "a.b", '"', "(((", "foo & | !", "-" * 40, "or " * 40, "AAAA", "0-00000000",
    "00000000-0000-0000-0000-000000000000", "ffffffff-ffff-ffff-ffff-ffffffffffff",
    "019a000000007000800000000000000a", "{019a0000-0000-7000-8000-00000000000a}",
    "019A0000-0000-7000-8000-00000000000A", "019a0000-0000-7000-8000-00000000000",
    "ada@example.org", "9999999999-ffffffff",
)  # fmt: skip
BOOKS = ("x" * 262_144, "é" * 131_073, "w" * 200_000 + " end", "\u0301" * 90_000)
NUMBERS = (0, 1, -1, 2, 50, 1_000, 1_001, 2**31 - 1, -(2**31), 2**53, 2**63 - 1, -(2**63))
DOUBLES = (0.0, -0.0, 1.5, 2.0**53 + 2, 1e308, -1e308, 5e-324, float("nan"), float("inf"))
SECONDS = (0, 1, -62_135_596_800, -62_135_596_801, 253_402_300_799, 2**63 - 1, -(2**63), 10**10)
NANOS = (0, 1, 999, 999_999_999, 10**9, -1, 2**31 - 1)

# A FieldDescriptor, of whichever implementation of protobuf.
Field = Any

INTEGERS = {
    FieldDescriptor.CPPTYPE_INT32: (-(2**31), 2**31 - 1),
    FieldDescriptor.CPPTYPE_INT64: (-(2**63), 2**63 - 1),
    FieldDescriptor.CPPTYPE_UINT32: (0, 2**32 - 1),
    FieldDescriptor.CPPTYPE_UINT64: (0, 2**64 - 1),
}


@dataclass
class Room:
    """A conversation, and what may be named of it."""

    id: str
    slug: str
    last_sequence: int = 0
    members: deque[str] = field(default_factory=partial(deque, maxlen=8))
    messages: deque[str] = field(default_factory=partial(deque, maxlen=MAX_KEPT))


@dataclass(frozen=True)
class Asked:
    """A request as it went out, for whom, and what a stream says next."""

    raw: bytes
    actor: str | bytes | None
    then: tuple[bytes, ...] = ()


@dataclass(frozen=True)
class Defect:
    """A call that was answered as none may be."""

    method: MethodDescriptor
    asked: Asked
    code: str
    details: str

    def __str__(self) -> str:
        head = f"{self.method.full_name} for {self.asked.actor!r}: {self.code}: {self.details}"
        kind = GetMessageClass(self.method.input_type)
        return "\n".join(
            [head, *(_text_of(kind, raw) for raw in (self.asked.raw, *self.asked.then))]
        )


class World:
    """What a request may name: the newest users and rooms, and what earlier answers held."""

    def __init__(self) -> None:
        self.users: dict[str, User] = {}
        self.rooms: dict[str, Room] = {}
        # Of users, conversations and messages by id, of participants by two.
        self.etags: dict[str, str] = {}
        self.deleted: set[str] = set()
        self.tokens: deque[str] = deque(["AAAA"], maxlen=MAX_KEPT)
        self.request_ids: deque[str] = deque(["again"], maxlen=MAX_KEPT)

    def learn(self, response: ProtoMessage) -> None:
        """Remember what an answer tells; new users and rooms only where it is about one."""
        for found, value in response.ListFields():
            if found.name in ("next_page_token", "previous_page_token", "cursor"):
                self.tokens.append(value)
            elif found.message_type is not None and not _is_map(found):
                for item in value if found.is_repeated else [value]:
                    self._meet(item, is_new=not found.is_repeated)
                    if not isinstance(item, Struct):
                        self.learn(item)

    def _meet(self, item: ProtoMessage, *, is_new: bool) -> None:
        if isinstance(item, User | Conversation | Message):
            (self.deleted.add if item.HasField("delete_time") else self.deleted.discard)(item.id)
        if isinstance(item, User) and item.id and (is_new or item.id in self.users):
            self.users.pop(item.id, None)
            self.users[item.id] = item
            _shorten(self.users, MAX_USERS)
        if isinstance(item, Conversation) and item.id and (is_new or item.id in self.rooms):
            room = self.rooms.pop(item.id, Room(item.id, item.slug))
            self.rooms[item.id] = room
            room.slug, room.last_sequence = item.slug, max(item.last_sequence, room.last_sequence)
            if item.creator_id:
                room.members.append(item.creator_id)
            _shorten(self.rooms, MAX_ROOMS)
        if isinstance(item, Message) and (of := self.rooms.get(item.conversation_id)):
            of.last_sequence = max(item.sequence, of.last_sequence)
            if item.id in of.messages:
                of.messages.remove(item.id)
            of.messages.append(item.id)
        if isinstance(item, Participant):
            if of := self.rooms.get(item.conversation_id):
                of.members.append(item.user_id)
            self.etags[item.conversation_id + item.user_id] = item.etag
        elif (id := getattr(item, "id", "")) and (etag := getattr(item, "etag", "")):
            self.etags[id] = etag


class Maker:
    """One request: a room, an actor, a user and a message, and fields that talk of them."""

    def __init__(self, random: Random, world: World, method: MethodDescriptor) -> None:
        self._random = random
        self._world = world
        self._method = method
        self._hostility = random.choice((0, 0, 0, 0.03, 0.1, 0.5))
        self._seeks_deleted = method.name.startswith(("Undelete", "Purge")) and self._chance(0.7)
        self._room = self._choose_room()
        self._actor = self._choose_actor()
        self._user = self._choose_user()
        self._names: dict[str, Callable[[], Any]] = {
            "conversation_id": lambda: self._room.slug if self._chance(0.2) else self._room.id,
            "username": lambda: f"{random.choice(WORDS)}-{random.getrandbits(32)}",
            "slug": lambda: f"room-{random.getrandbits(random.choice((4, 32)))}",
            "email": lambda: f"{random.getrandbits(random.choice((4, 32)))}@example.org",
            "content": self._text,
            "query": self._text,
            "password": lambda: random.choice(("secret", "s3cr3t", "geheim")),
            "etag": self._etag,
            "page_token": lambda: random.choice(world.tokens),
            "resume_cursor": lambda: random.choice(world.tokens),
            "request_id": self._request_id,
            "order_by": lambda: random.choice(("sequence", "sequence desc", "create_time")),
            "external_id": lambda: f"x-{random.getrandbits(16)}",
            "page_size": lambda: random.randint(1, 5),
            "expected_last_sequence": lambda: self._room.last_sequence,
            "validate_only": lambda: self._chance(0.2),
        }

    def make(self) -> tuple[ProtoMessage, str | bytes | None]:
        request = GetMessageClass(self._method.input_type)()
        self._fill(request)
        return request, self._actor

    def spoil(self, request: ProtoMessage) -> None:
        """Change one field of a request that was good, however deep it lies."""
        present = [name for name, _ in request.ListFields() if name.message_type is not None]
        if present and self._chance(0.5):
            inner = getattr(request, self._random.choice(present).name)
            if isinstance(inner, ProtoMessage) and not isinstance(inner, Struct):
                return self.spoil(inner)
        fields: Any = request.DESCRIPTOR.fields
        if fields:
            chosen = self._random.choice(fields)
            request.ClearField(chosen.name)
            self._hostility = self._random.choice((0, 1))
            if self._chance(0.8):
                self._set(request, chosen)

    def _chance(self, probability: float) -> bool:
        return self._random.random() < probability

    def _one_of(self, things: Iterable[str]) -> str:
        """Any of them; one that is deleted, where that is sought and there is one."""
        known = list(things)
        deleted = [id for id in known if id in self._world.deleted] if self._seeks_deleted else []
        return self._random.choice(deleted or known or [""])

    def _choose_room(self) -> Room:
        rooms, deleted = self._world.rooms, self._world.deleted
        if self._method.name == "UndeleteMessage":
            found = [room for room in rooms.values() if not deleted.isdisjoint(room.messages)]
            return self._random.choice(found or list(rooms.values()))
        return rooms[self._one_of(rooms)]

    def _choose_actor(self) -> str | bytes | None:
        kind = self._random.random()
        refused = access_of(self._method).rule != Access.ACTOR_OPTIONAL
        if kind < (0.8 if refused else 0.4):
            return None
        if kind < 0.8 and self._room.members:
            return self._random.choice(self._room.members)
        user = self._random.choice(list(self._world.users.values()))
        if kind < 0.95:
            return user.id if self._chance(0.5) else user.username.encode()
        return self._random.choice(LINES).encode()

    def _choose_user(self) -> str:
        """Somebody here, the actor itself often; seldom somebody from elsewhere."""
        if isinstance(self._actor, str) and self._chance(0.3):
            return self._actor
        here = (
            self._room.members
            if self._chance(0.7) and not self._seeks_deleted
            else self._world.users
        )
        return self._one_of(here or self._world.users)

    def _fill(self, message: ProtoMessage, depth: int = 0) -> None:
        if isinstance(message, Struct):
            return self._fill_struct(message)
        if message.DESCRIPTOR.full_name in (
            "google.protobuf.Timestamp",
            "google.protobuf.Duration",
        ):
            return self._fill_time(message)
        if message.DESCRIPTOR.full_name == "google.protobuf.FieldMask":
            return self._fill_mask(message)
        descriptor: Any = message.DESCRIPTOR
        oneofs = {of.name: self._random.choice(of.fields).name for of in descriptor.oneofs}
        for each in descriptor.fields:
            of = each.containing_oneof
            if of and oneofs[of.name] != each.name:
                continue
            if self._chance(0.98 if of and of.name in NEEDED else self._wanted(each)):
                self._set(message, each, depth)

    def _wanted(self, each: Field) -> float:
        """How likely a field is filled."""
        behavior = _behavior(each)
        if field_behavior_pb2.REQUIRED in behavior:
            return 0.98
        if field_behavior_pb2.OUTPUT_ONLY in behavior:
            return 0.02
        if each.name in OFTEN:
            return 0.8
        return 0.05 if each.name in ("page_token", "resume_cursor") else 0.2

    def _set(self, message: ProtoMessage, each: Field, depth: int = 0) -> None:
        if each.is_repeated:
            many = 600 if self._chance(self._hostility / 20) else self._random.randint(1, 4)
            for _ in range(many):
                if each.message_type is not None:
                    self._fill(getattr(message, each.name).add(), depth + 1)
                else:
                    getattr(message, each.name).append(self._value(each))
        elif each.message_type is not None:
            getattr(message, each.name).SetInParent()
            self._fill(getattr(message, each.name), depth + 1)
        else:
            setattr(message, each.name, self._value(each))

    def _value(self, each: Field) -> Any:
        return self._odd(each) if self._chance(self._hostility) else self._sensible(each)

    def _odd(self, each: Field) -> Any:
        """What belongs nowhere, or elsewhere."""
        random = self._random
        if each.cpp_type == FieldDescriptor.CPPTYPE_STRING:
            if self._chance(0.03):
                return random.choice(BOOKS)
            if self._chance(0.2):
                return str(UUID(int=random.getrandbits(128)))
            if self._chance(0.2):
                return str(random.choice(list(self._names.values()))())  # another field's
            return random.choice(("", *LINES))
        if each.cpp_type == FieldDescriptor.CPPTYPE_ENUM:
            return random.choice((0, 99, -1, 2**31 - 1, -(2**31)))
        if each.cpp_type == FieldDescriptor.CPPTYPE_BOOL:
            return self._chance(0.5)
        if each.cpp_type in INTEGERS:
            low, high = INTEGERS[each.cpp_type]
            return random.choice([number for number in NUMBERS if low <= number <= high])
        return random.choice(DOUBLES)

    def _sensible(self, each: Field) -> Any:
        """What the field's name asks for."""
        random, name = self._random, each.name.removesuffix("s")
        if each.cpp_type == FieldDescriptor.CPPTYPE_STRING:
            value = self._names[name]() if name in self._names else self._named(name)
            return str(value)
        if name in self._names:
            return self._names[name]()
        if each.cpp_type == FieldDescriptor.CPPTYPE_ENUM:
            return random.choice(each.enum_type.values[1:]).number
        if each.cpp_type == FieldDescriptor.CPPTYPE_BOOL:
            return self._chance(0.7)
        if each.cpp_type in INTEGERS:
            return random.randint(1, max(1, self._room.last_sequence))
        return random.choice(DOUBLES)

    def _named(self, name: str) -> str:
        if name.endswith("message_id"):
            return self._one_of(self._room.messages)
        if name == "user_id":
            return self._whoever(self._user)
        if name.endswith("_id"):
            # The caller itself, more often than not, and else somebody who is here.
            if isinstance(self._actor, str) and self._chance(0.6):
                return self._actor
            return self._whoever(self._random.choice(self._room.members or [self._user]))
        return self._random.choice(WORDS)

    def _whoever(self, id: str) -> str:
        """A user, by id or username."""
        user = self._world.users.get(id)
        return user.username if user and self._chance(0.2) else id

    def _text(self) -> str:
        return " ".join(self._random.choices(WORDS, k=self._random.randint(1, 6)))

    def _etag(self) -> str:
        """One of what the request is about, if its etags are known."""
        etags = self._world.etags
        of = [
            self._room.id,
            self._user,
            self._room.id + self._user,
            *list(self._room.messages)[-1:],
        ]
        return self._random.choice([etags[id] for id in of if id in etags] or ["1-00000000"])

    def _request_id(self) -> str:
        if self._chance(0.3):
            return self._random.choice(self._world.request_ids)
        new = f"r-{self._random.getrandbits(48)}"
        self._world.request_ids.append(new)
        return new

    def _fill_struct(self, struct: Struct, depth: int = 1) -> None:
        """Small mostly; else too deep, too wide, too long, or of what JSON does not know."""
        odd = self._chance(self._hostility)
        keys = ["a", "b", "$where", "__proto__", "é"]
        if odd:
            keys += [*self._random.choices(LINES, k=3), "", "k" * 129]
        many = 65 if odd and self._chance(0.1) else self._random.randint(0, 3)
        for number in range(many):
            key = f"k{number}" if many > 3 else self._random.choice(keys)
            self._fill_item(struct.fields[key], depth, odd=odd)
        if odd and depth == 1 and self._chance(0.2):
            inner = struct
            for _ in range(self._random.choice((14, 15, 16, 17, 40))):
                inner = inner.fields["deep"].struct_value
            inner.fields["end"].null_value = 0  # type: ignore[assignment]

    def _fill_item(self, value: Value, depth: int, *, odd: bool) -> None:
        kind = self._random.randrange(7 if depth < 4 else 5)
        if kind == 0:
            value.string_value = self._random.choice(LINES if odd else WORDS)
        elif kind == 1:
            value.number_value = self._random.choice(DOUBLES if odd else (0, 1, -2.5, 1e20))
        elif kind == 2:
            value.bool_value = self._chance(0.5)
        elif kind == 3:
            value.null_value = 0  # type: ignore[assignment]
        elif kind == 5:
            value.list_value.SetInParent()
            for _ in range(self._random.randint(0, 3)):
                self._fill_item(value.list_value.values.add(), depth + 1, odd=odd)
        elif kind == 6:
            value.struct_value.SetInParent()
            self._fill_struct(value.struct_value, depth + 1)

    def _fill_time(self, time: Any) -> None:
        if self._chance(self._hostility):
            time.seconds, time.nanos = self._random.choice(SECONDS), self._random.choice(NANOS)
        elif time.DESCRIPTOR.name == "Timestamp":
            # In this century and past: whenever the run is.
            time.seconds = self._random.randint(946_684_800, 1_700_000_000)
            time.nanos = self._random.choice((0, 123_456_000))
        else:
            time.seconds = self._random.randint(1, 60)

    def _fill_mask(self, mask: Any) -> None:
        fields: Any = self._method.input_type.fields
        resources = [each.message_type for each in fields if each.name in RESOURCES]
        names = [
            each.name
            for resource in resources
            for each in resource.fields
            if self._chance(0.02) or not FIXED & _behavior(each)
        ] or ["x"]
        for _ in range(self._random.randint(1, 3)):
            odd = self._chance(self._hostility)
            path = self._random.choice(LINES) if odd else self._random.choice([*names, "*"])
            mask.paths.append(path)


class Fuzzer:
    """Calls RPCs at random, counts the answers and keeps those that none may give."""

    def __init__(self, parley: Client, methods: Sequence[MethodDescriptor], seed: str) -> None:
        self._parley = parley
        self._methods = methods
        self._random = Random(seed)
        self._unserved: set[str] = set()
        self._accepted: dict[str, deque[Asked]] = defaultdict(partial(deque, maxlen=MAX_KEPT))
        self._pages: dict[str, deque[Asked]] = defaultdict(partial(deque, maxlen=8))
        self.world = World()
        self.counts: Counter[tuple[str, str]] = Counter()
        # The name of an RPC, a status and a reason that came together.
        self.refusals: set[tuple[str, str, str]] = set()
        self.defects: list[Defect] = []

    async def run(self, calls: int) -> None:
        for method in self._methods:
            await self._probe(method)
        for number in range(calls):
            if number % REFILL_CALLS == 0:
                await self._refill()
            (method,) = self._random.choices(
                self._methods, [self._weight(m) for m in self._methods]
            )
            asked = self._raw(method) if self._random.random() < 0.2 else self._request(method)
            if method.client_streaming:
                others = range(self._random.randrange(4))
                asked = replace(asked, then=tuple(self._request(method).raw for _ in others))
            await self._call(method, asked)

    def _weight(self, method: MethodDescriptor) -> float:
        if method.full_name in self._unserved:
            return UNSERVED_WEIGHT
        found = (weight for name, weight in WEIGHTS.items() if method.name.startswith(name))
        return next(found, 1.0)

    async def _refill(self) -> None:
        """A new room with new people: two who talk, two who are invited."""
        number = self._random.getrandbits(48)
        people = [await self._parley.user(f"{name}-{number}") for name in ("a", "żółw", "李", "g")]
        self.world.users |= {user.id: user for user in people}
        owner, member, *guests = people
        room = await self._parley.conversation(
            owner, member, invited=guests, slug=f"fuzz-{number}", first="first"
        )
        self.world.rooms[room.id] = known = Room(room.id, room.slug, room.last_sequence)
        known.members.extend(user.id for user in people)
        for sender in (owner, member):
            sent = await self._parley.message(room, sender, " ".join(WORDS), role=USER)
            known.messages.append(sent.id)
            known.last_sequence = sent.sequence
        _shorten(self.world.users, MAX_USERS)
        _shorten(self.world.rooms, MAX_ROOMS)

    def _request(self, method: MethodDescriptor) -> Asked:
        """A new request, a spoilt one that was good, or the next page of one."""
        maker, kind = Maker(self._random, self.world, method), self._random.random()
        if kind < 0.2 and (pages := self._pages[method.full_name]):
            return self._random.choice(pages)
        if kind < 0.4 and (accepted := self._accepted[method.full_name]):
            asked = self._random.choice(accepted)
            request: Any = GetMessageClass(method.input_type).FromString(asked.raw)
            maker.spoil(request)
            return Asked(request.SerializeToString(), asked.actor)
        request, actor = maker.make()
        return Asked(request.SerializeToString(), actor)

    def _raw(self, method: MethodDescriptor) -> Asked:
        """Bytes of no kind, or a request's with a few of them changed."""
        random = self._random
        asked = self._request(method)
        raw = bytearray(asked.raw[:20_000])
        if random.random() < 0.2 or not raw:
            return Asked(random.randbytes(random.choice((1, 2, 7, 100, 5_000))), asked.actor)
        for _ in range(random.randint(1, 4)):
            at, to = sorted(random.randrange(len(raw) + 1) for _ in range(2))
            match random.randrange(6):
                case 0:
                    raw[at:at] = random.randbytes(random.randint(1, 4))
                case 1:
                    del raw[at:to]
                case 2:
                    raw[at:at] = raw[at:to]
                case 3 if at < len(raw):
                    raw[at] ^= 1 << random.randrange(8)
                case 4:
                    # A varint without end, a length beyond it, a group, no UTF-8.
                    raw[at:at] = random.choice(
                        (b"\xff" * 11, b"\x0a\xff\xff\x03", b"\x0b", b"\xed\xa0")
                    )
                case _:
                    raw += self._request(random.choice(self._methods)).raw[:5_000]
            raw = raw or bytearray(b"\0")
        return Asked(bytes(raw), asked.actor)

    async def _probe(self, method: MethodDescriptor) -> None:
        """Learn whether the RPC is served: one that is not says so to an empty request."""
        try:
            await self._answers(method, Asked(b"", None))
        except grpc.aio.AioRpcError as error:
            if failure_of(error).reason == "NOT_IMPLEMENTED":
                self._unserved.add(method.full_name)

    async def _call(self, method: MethodDescriptor, asked: Asked) -> None:
        try:
            answers = await self._answers(method, asked)
        except grpc.aio.AioRpcError as error:
            code = self._judge(method, asked, error)
        else:
            code = "OK"
            self._learn(method, asked, answers)
        self.counts[method.full_name, code] += 1

    def _judge(self, method: MethodDescriptor, asked: Asked, error: grpc.aio.AioRpcError) -> str:
        told = failure_of(error)
        self.refusals.add((method.name, told.code, told.reason))
        allowed = told.code in ALLOWED
        if method.full_name in self._unserved:
            allowed |= told.reason == "NOT_IMPLEMENTED"
        if method.server_streaming and told.code == "DEADLINE_EXCEEDED":
            return "(quiet)"  # A stream may have nothing to say yet.
        if len(asked.raw) > MAX_REQUEST_BYTES and told.code == "RESOURCE_EXHAUSTED":
            return told.code  # Refused by the library, before anything of ours has seen it.
        if method.client_streaming and told.message == OVER:
            return "(over)"
        # Without a reason it is the library's: an answer too large, or trailers that were dropped.
        if not allowed or not told.reason:
            self.defects.append(Defect(method, asked, told.code, told.message))
        return told.code

    def _learn(self, method: MethodDescriptor, asked: Asked, answers: Iterable[bytes]) -> None:
        kind = GetMessageClass(method.output_type)
        if len(asked.raw) < 10_000:
            self._accepted[method.full_name].append(asked)
        for raw in answers:
            response: Any = kind.FromString(raw)
            self.world.learn(response)
            for told, name in (("next_page_token", "page_token"), ("cursor", "resume_cursor")):
                if token := getattr(response, told, ""):
                    request: Any = GetMessageClass(method.input_type).FromString(asked.raw)
                    setattr(request, name, token)
                    page = replace(asked, raw=request.SerializeToString())
                    self._pages[method.full_name].append(page)

    async def _answers(self, method: MethodDescriptor, asked: Asked) -> list[bytes]:
        """The answer; of a stream, the first ones."""
        parley = self._parley
        metadata = (parley.acting_as(asked.actor) if asked.actor else parley).metadata
        path = f"/{method.containing_service.full_name}/{method.name}"
        channel: Any = parley.channel
        if not method.server_streaming:
            unary = channel.unary_unary(path)
            return [await unary(asked.raw, metadata=metadata, timeout=TIMEOUT_SECONDS)]
        options = {"metadata": metadata, "timeout": STREAM_SECONDS}
        if method.client_streaming:
            call = channel.stream_stream(path)(iter([asked.raw, *asked.then]), **options)
        else:
            call = channel.unary_stream(path)(asked.raw, **options)
        answers: list[bytes] = []
        # A stream of events goes on for ever.
        limit = 5 if method.client_streaming else 1
        try:
            while len(answers) < limit and (answer := await call.read()) is not grpc.aio.EOF:
                answers.append(answer)
        except grpc.aio.AioRpcError as error:
            if not answers or error.code() is not grpc.StatusCode.DEADLINE_EXCEEDED:
                raise
        finally:
            call.cancel()
        return answers

    @property
    def accepted(self) -> int:
        """How many calls were answered with what they asked for."""
        return sum(count for (_, code), count in self.counts.items() if code == "OK")

    def table(self) -> str:
        """How often each RPC was answered with what."""
        codes = sorted({code for _, code in self.counts})
        names = sorted({name for name, _ in self.counts})
        width = max(map(len, names)) - len("parley.v1.")
        heads = " ".join(code[:9].rjust(9) for code in codes)
        lines = [f"{'':{width}} {heads}"]
        for name in names:
            cells = " ".join(f"{self.counts[name, code] or '·':>9}" for code in codes)
            lines.append(f"{name.removeprefix('parley.v1.'):{width}} {cells}")
        sums = " ".join(
            f"{sum(n for (_, of), n in self.counts.items() if of == code):>9}" for code in codes
        )
        return "\n".join([*lines, f"{'':{width}} {sums}"])


def _text_of(kind: type[ProtoMessage], raw: bytes) -> str:
    """The request in text format, or its bytes in hexadecimal."""
    try:
        return text_format.MessageToString(kind.FromString(raw), as_utf8=True)
    except DecodeError:
        return f"no {kind.DESCRIPTOR.name}: {raw.hex()}"


def _behavior(each: Field) -> set[int]:
    return set(each.GetOptions().Extensions[field_behavior_pb2.field_behavior])


def _is_map(found: Field) -> bool:
    return bool(found.message_type.GetOptions().map_entry)


def _shorten(things: dict[str, Any], limit: int) -> None:
    """Forget the oldest."""
    for key in list(things)[: max(0, len(things) - limit)]:
        del things[key]
