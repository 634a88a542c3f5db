"""The look-ups that nearly every call begins with, gathered: many callers, one statement."""

from collections.abc import Sequence
from functools import partial
from itertools import chain, islice
from uuid import UUID

from service.batcher import Batcher
from service.errors import (
    FailedPrecondition,
    InvalidArgument,
    NotFound,
    PermissionDenied,
)
from service.fields import Fields
from service.identity import Actor, Call
from service.paging import MAX_RESPONSE_BYTES
from service.repositories import conversations, messages
from service.repositories.base import Row
from service.repositories.messages import Page, Stretch
from service.store import Store

# How many messages of repeated requests are read at once: as many as one may hold.
MAX_REPEATED = 500


class Lookups:
    """Finds users, conversations and messages by whatever a request names them by."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._users = Batcher(self._find_users, max_items=256, name="find users")
        self._views = Batcher(self._find_views, max_items=256, name="find conversations")
        self._slugs = Batcher(self._find_slugs, max_items=256, name="find slugs")
        self._messages = Batcher(self._find_messages, max_items=64, name="find messages")
        self._repeated = Batcher(
            self._find_repeated, weigh=len, max_weight=MAX_REPEATED, name="find repeated"
        )
        # Pages are heavy: few at a time, so that nobody waits long for others' to be read.
        self._newest, self._oldest = (
            Batcher(
                partial(self._find_pages, descending=descending),
                max_items=8,
                concurrency=2,
                name="find pages",
            )
            for descending in (True, False)
        )

    async def actor(self, reference: str, *, presume: bool = False) -> Actor:
        """The user that a caller acts for: exists, is active, is not deleted. With `presume`,
        whoever has that id, where it is an id.
        """
        try:
            with Fields() as fields:
                named = fields.user("x-parley-actor", reference)
        except InvalidArgument as error:
            raise InvalidArgument("INVALID_ACTOR", field="x-parley-actor") from error
        if presume and isinstance(named, UUID):
            return Actor(named)
        row = await self.user(named) if named else None
        if row is None:
            raise FailedPrecondition(
                "USER_NOT_FOUND",
                resource=("user", reference),
                field="x-parley-actor",
                name=reference,
            )
        if not row["is_active"] or row["deleted_at"] is not None:
            raise PermissionDenied("ACTOR_NOT_ALLOWED", rule="the user is deactivated or deleted")
        return Actor(row["id"])

    async def user(self, reference: UUID | str) -> Row | None:
        return await self._users.submit(reference)

    async def user_by_email(self, email: str) -> Row | None:
        async with self._store.snapshot() as snapshot:
            return await snapshot.users.find_by_email(email)

    async def user_id(self, reference: UUID | str | None) -> UUID | None:
        """The id by which to filter: one that nobody has, where nobody has that name."""
        if reference is None or isinstance(reference, UUID):
            return reference
        row = await self.user(reference)
        return row["id"] if row else UUID(int=0)

    async def own_id(self, user: UUID | str | None, call: Call, *, of: str) -> UUID | None:
        """Whom a call about oneself is about: the actor; from the system, whoever it names, if
        there is somebody of that name.
        """
        if call.actor:
            if user and await self.user_id(user) != call.actor.id:
                raise PermissionDenied("PERMISSION_DENIED", rule=f"an actor sees its own {of} only")
            return call.actor.id
        row = await self.user(user) if user else None
        return row["id"] if row else None

    async def users(self, references: Sequence[UUID | str]) -> list[Row | None]:
        """The users behind many references of one call, in order."""
        async with self._store.snapshot() as snapshot:
            return await snapshot.users.find(references)

    async def view(self, named: str, reference: UUID | str, call: Call) -> Row:
        """What the caller may see of a conversation: NOT_FOUND where missing or hidden."""
        row = await self._views.submit((reference, call.actor_id))
        if row is None:
            raise NotFound("conversation", named)
        return row

    async def live_view(self, named: str, reference: UUID | str, call: Call) -> Row:
        """The same, of a conversation that is not deleted: what a deleted one holds is not read."""
        row = await self.view(named, reference, call)
        if row["deleted_at"] is not None:
            raise FailedPrecondition("CONVERSATION_DELETED")
        return row

    async def conversation_id(self, named: str, reference: UUID | str) -> UUID:
        """The id behind an id or slug. An id is not looked up: whoever uses it finds out."""
        if isinstance(reference, UUID):
            return reference
        id = await self._slugs.submit(reference)
        if id is None:
            raise NotFound("conversation", named)
        return id

    async def message(self, named: str, reference: UUID | str, key: UUID | int, call: Call) -> Row:
        """A message that the caller may read: NOT_FOUND where it or its conversation is missing or
        hidden.
        """
        row = await self._messages.submit((reference, call.actor_id, key))
        if row is None:
            raise NotFound("conversation", named)
        if row["conversation_deleted_at"] is not None:
            raise FailedPrecondition("CONVERSATION_DELETED")
        if row["id"] is None:
            raise NotFound("message", key)
        return row

    async def repeated(self, keys: Sequence[messages.Key]) -> list[Row]:
        """What a request stored that has come again. Many come at once, where many calls were
        answered late.
        """
        return await self._repeated.submit(keys)

    async def page(self, stretch: Stretch, *, descending: bool) -> Page:
        """A page of messages, as many as fit into one response."""
        return await (self._newest if descending else self._oldest).submit(stretch)

    async def _find_pages(self, stretches: list[Stretch], *, descending: bool) -> list[Page]:
        async with self._store.snapshot() as snapshot:
            return await snapshot.messages.pages(
                stretches, descending=descending, byte_limit=MAX_RESPONSE_BYTES
            )

    async def _find_users(self, references: list[UUID | str]) -> list[Row | None]:
        async with self._store.snapshot() as snapshot:
            return await snapshot.users.find(references)

    async def _find_views(self, keys: list[conversations.Key]) -> list[Row | None]:
        async with self._store.snapshot() as snapshot:
            return await snapshot.conversations.views(keys)

    async def _find_slugs(self, slugs: list[str]) -> list[UUID | None]:
        async with self._store.snapshot() as snapshot:
            return await snapshot.conversations.resolve(slugs)

    async def _find_messages(self, keys: list[messages.Key]) -> list[Row | None]:
        async with self._store.snapshot() as snapshot:
            return await snapshot.messages.look_for(keys)

    async def _find_repeated(self, requests: list[Sequence[messages.Key]]) -> list[list[Row]]:
        async with self._store.snapshot() as snapshot:
            rows = iter(await snapshot.messages.find(list(chain.from_iterable(requests))))
        return [[row for row in islice(rows, len(keys)) if row] for keys in requests]


def require_reader(view: Row) -> None:
    """Raise for somebody who is only invited: it sees the invitation's message and no list."""
    if view["actor_id"] is not None and view["joined_at"] is None:
        raise PermissionDenied("NOT_A_PARTICIPANT", field="x-parley-actor")
