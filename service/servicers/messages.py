import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any
from uuid import UUID

from parley.v1 import message_pb2 as pb
from parley.v1 import message_pb2_grpc
from service import masks, paging, wire
from service.domain import MessageRole, MessageStatus
from service.errors import NotFound
from service.fields import Fields
from service.identity import Call, checks_actor
from service.ids import lock_of
from service.lookups import Lookups, require_reader
from service.pages import Pages, Part
from service.paging import PageTokens, Position
from service.repositories.base import Row
from service.repositories.messages import Stretch
from service.repositories.search import Place, Wanted
from service.rules import deletion, edits
from service.rules.messages import Append, Draft, Replayed
from service.rules.requests import RequestId
from service.rules.rights import (
    require_may_delete,
    require_may_edit,
    require_writable,
    user_not_found,
)
from service.rules.search import LONG_TEXT, Query
from service.sending import Sender
from service.store import Store, Transaction

MAX_BATCH_MESSAGES = 500
MAX_BATCH_BYTES = 3 << 20
MAX_WINDOW, DEFAULT_WINDOW = 500, 25
NEWEST_FIRST, OLDEST_FIRST = ORDERS = ("sequence desc", "sequence")


# What says where a list begins, and counts on its first page only.
WINDOW = (
    "around_sequence", "around_message_id", "around_first_unread", "before_count", "after_count",
)  # fmt: skip

# Which messages to list.
Filters = dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Window:
    """Around which message a list begins (None: the first unread one), and with how many."""

    key: UUID | int | None
    before: int
    after: int


@dataclass(frozen=True, slots=True)
class Page:
    """Messages, the lowest sequence first, as items of a list; beyond `below` and `above`, where
    given, are others.
    """

    items: list[bytes]
    below: int | None = None
    above: int | None = None
    anchor: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """What every call that changes one message asks for."""

    # The conversation as named, and as what.
    conversation: str
    reference: UUID | str
    key: UUID | int
    etag: str
    request: RequestId | None
    dry_run: bool = False


# What a call does to a message of a conversation that is locked and seen by the caller; None where
# there is no message that it may read. Returns its id, or None where there was nothing to do.
Deed = Callable[[Transaction, Row, Row | None], Awaitable[UUID | None]]

# A message to append, and its sender as named: an id, or a username still to be looked up.
Named = tuple[Draft, UUID | str | None]


class MessageServicer(message_pb2_grpc.MessageServiceServicer):
    """What is said in a conversation."""

    def __init__(
        self, store: Store, lookups: Lookups, sender: Sender, page_tokens: PageTokens
    ) -> None:
        self._store = store
        self._lookups = lookups
        self._sender = sender
        self._page_tokens = page_tokens
        self._pages = Pages(lookups)

    @checks_actor
    async def SendMessage(
        self, request: pb.SendMessageRequest, call: Call
    ) -> pb.SendMessageResponse:
        with Fields() as fields:
            reference = fields.conversation("conversation_id", request.conversation_id)
            expected = fields.count("expected_last_sequence", request, "expected_last_sequence")
            drafts = [wire.draft(fields, request, actor=call.actor)]
            request_id = fields.request_id(call, request)

        item = Append(
            conversation=request.conversation_id,
            conversation_id=await self._lookups.conversation_id(request.conversation_id, reference),
            actor=call.actor,
            drafts=await self._with_senders(drafts),
            expected_last_sequence=expected,
            request=request_id,
            dry_run=request.validate_only,
        )
        (message,) = await self._append(item, call)

        return pb.SendMessageResponse(message=message)

    @checks_actor
    async def BatchSendMessages(
        self, request: pb.BatchSendMessagesRequest, call: Call
    ) -> pb.BatchSendMessagesResponse:
        with Fields() as fields:
            reference = fields.conversation("conversation_id", request.conversation_id)
            expected = fields.count("expected_last_sequence", request, "expected_last_sequence")
            if not request.messages:
                fields.reject("REQUIRED", "messages")
            if len(request.messages) > MAX_BATCH_MESSAGES:
                fields.reject("TOO_MANY_ITEMS", "messages", limit=MAX_BATCH_MESSAGES)
            if request.ByteSize() > MAX_BATCH_BYTES:
                fields.reject("FIELD_TOO_LONG", "messages", limit=MAX_BATCH_BYTES, unit="bytes")
            drafts = [
                wire.draft(fields, message, actor=call.actor, at=f"messages[{n}].")
                for n, message in enumerate(request.messages[:MAX_BATCH_MESSAGES])
            ]
            request_id = fields.request_id(call, request)

        item = Append(
            conversation=request.conversation_id,
            conversation_id=await self._lookups.conversation_id(request.conversation_id, reference),
            actor=call.actor,
            drafts=await self._with_senders(drafts),
            expected_last_sequence=expected,
            request=request_id,
            dry_run=request.validate_only,
        )
        messages = await self._append(item, call)

        return pb.BatchSendMessagesResponse(sent_messages=map(wire.sent_message, messages))

    @checks_actor
    async def GetMessage(self, request: pb.GetMessageRequest, call: Call) -> pb.GetMessageResponse:
        with Fields() as fields:
            reference = fields.conversation("conversation_id", request.conversation_id)
            key = fields.message_key(request)

        row = await self._lookups.message(request.conversation_id, reference, key, call)

        return pb.GetMessageResponse(message=wire.message(row))

    @checks_actor
    async def BatchGetMessages(
        self, request: pb.BatchGetMessagesRequest, call: Call
    ) -> pb.BatchGetMessagesResponse:
        with Fields() as fields:
            reference = fields.conversation("conversation_id", request.conversation_id)
            count = len(request.message_ids) + len(request.sequences)
            if not count:
                fields.reject("REQUIRED", "message_ids")
            if count > MAX_BATCH_MESSAGES:
                field = "message_ids" if request.message_ids else "sequences"
                fields.reject("TOO_MANY_ITEMS", field, limit=MAX_BATCH_MESSAGES)
            ids = {
                name: fields.id(f"message_ids[{n}]", name)
                for n, name in enumerate(request.message_ids[:MAX_BATCH_MESSAGES])
            }
            sequences = fields.sequences("sequences", request.sequences[:MAX_BATCH_MESSAGES])

        view = await self._lookups.live_view(request.conversation_id, reference, call)
        async with self._store.snapshot() as snapshot:
            found = await snapshot.messages.find_many(
                view,
                ids=list(ids.values()),
                sequences=sequences,
                byte_limit=paging.MAX_RESPONSE_BYTES,
            )

        messages = paging.cut(map(wire.message, found.rows))
        return pb.BatchGetMessagesResponse(
            messages=messages,
            missing_message_ids=[name for name, id in ids.items() if id not in found.ids],
            missing_sequences=[each for each in sequences if each not in found.sequences],
            truncated=len(messages) < len(found.ids),
        )

    @checks_actor
    async def ListMessages(  # type: ignore[override]  # as good as a ListMessagesResponse
        self, request: pb.ListMessagesRequest, call: Call
    ) -> wire.Spliced:
        with Fields() as fields:
            reference = fields.conversation("conversation_id", request.conversation_id)
            limit = fields.page_size(request.page_size)
            order = request.order_by or NEWEST_FIRST
            if order not in ORDERS:
                fields.reject("INVALID_ORDER_BY", "order_by", allowed=", ".join(ORDERS))
            sender = fields.user("sender_id", request.sender_id, required=False)
            filters = _filters(fields, request)
            window = _window(fields, request, call)

        view = await self._lookups.live_view(request.conversation_id, reference, call)
        require_reader(view)
        binding = paging.binding(call, request, view["id"], free=WINDOW)
        position = self._page_tokens.open(request.page_token, binding)
        if sender:
            user = await self._lookups.user(sender)
            if not user:
                raise user_not_found("sender_id", request.sender_id)
            filters["sender_id"] = user["id"]
        if window and position is None:
            page = await self._around(view, window, filters, call)
        else:
            start, backwards = _place(position)
            down = (order == NEWEST_FIRST) != backwards
            page = await self._beyond(view, start, filters, down=down, limit=limit)

        forth, back = page.above, page.below
        if order == NEWEST_FIRST:
            page.items.reverse()
            forth, back = back, forth
        response = pb.ListMessagesResponse(anchor_sequence=page.anchor)
        if forth is not None:
            response.next_page_token = self._page_tokens.seal([forth, "next"], binding)
        if back is not None:
            response.previous_page_token = self._page_tokens.seal([back, "previous"], binding)
        return wire.Spliced(b"".join(page.items), response)

    async def _beyond(
        self, view: Row, start: int | None, filters: Filters, *, down: bool, limit: int
    ) -> Page:
        """The page that lies beyond `start`, or at the end of the window: downwards, or upwards."""
        stretch = Stretch.beyond(view, start, descending=down, limit=limit)
        part = await self._part(view, stretch, filters, down=down)
        if not part.items:
            return Page([])
        # Before the very first page there is nothing yet; behind any other there is.
        near = part.items[0][0] if start is not None else None
        far = part.items[-1][0] if part.more else None
        items = [item for _, item in part.items]
        if down:
            return Page(items[::-1], below=far, above=near)
        return Page(items, below=near, above=far)

    async def _around(self, view: Row, window: Window, filters: Filters, call: Call) -> Page:
        """The messages around one of them, which is among them if it passes the filters."""
        anchor = await self._anchor(view, window.key, call)
        if anchor is None:
            return Page([])
        half = paging.MAX_RESPONSE_BYTES // 2
        lower = Stretch.beyond(view, anchor, descending=True, limit=window.before)
        below = await self._part(view, lower, filters, down=True, byte_limit=half)
        # The anchor, where it passes, and those after it.
        upper = Stretch.beyond(view, anchor - 1, descending=False, limit=window.after + 1)
        above = await self._part(view, upper, filters, down=False, byte_limit=half)
        if not (above.items and above.items[0][0] == anchor):
            above = above.first(window.after)
        return Page(
            [item for _, item in (*below.items[::-1], *above.items)],
            below=_end(below, anchor) if below.more else None,
            above=_end(above, anchor) if above.more else None,
            anchor=anchor,
        )

    async def _part(
        self,
        view: Row,
        stretch: Stretch,
        filters: Filters,
        *,
        down: bool,
        byte_limit: int = paging.MAX_RESPONSE_BYTES,
    ) -> Part:
        """The messages of a stretch, as many as fit."""
        if not filters:
            return await self._pages.read(view, stretch, descending=down, byte_limit=byte_limit)
        async with self._store.long_snapshot() as snapshot:
            rows, more = await snapshot.messages.list(
                stretch, descending=down, byte_limit=byte_limit, **filters
            )
        return Part.of(rows, more=more, byte_limit=byte_limit)

    async def _anchor(self, view: Row, key: UUID | int | None, call: Call) -> int | None:
        """The sequence of the message to list around; None where there is none at all."""
        if key is not None:
            message = await self._lookups.message(str(view["id"]), view["id"], key, call)
            return int(message["sequence"])
        async with self._store.snapshot() as snapshot:
            unread = await snapshot.messages.first_unread(view)
        newest: int = view["final_sequence"]
        return unread or (newest if newest >= view["first_sequence"] else None)

    async def SearchMessages(
        self, request: pb.SearchMessagesRequest, call: Call
    ) -> pb.SearchMessagesResponse:
        with Fields() as fields:
            query = fields.query("query", request.query)
            reference = (
                fields.conversation("conversation_id", request.conversation_id)
                if request.conversation_id
                else None
            )
            sender = fields.user("sender_id", request.sender_id, required=False)
            roles = fields.enums("roles", request.roles, MessageRole)
            created_after, created_before = fields.span(
                request, after="created_after", before="created_before"
            )
            limit = fields.page_size(request.page_size)

        view = None
        if reference:
            view = await self._lookups.live_view(request.conversation_id, reference, call)
            require_reader(view)
        binding = paging.binding(call, request, view["id"] if view else None)
        position = self._page_tokens.open(request.page_token, binding)
        user = await self._lookups.user(sender) if sender else None
        if sender and not user:
            raise user_not_found("sender_id", request.sender_id)
        wanted = Wanted(
            query=str(query),
            actor_id=call.actor_id,
            view=view,
            sender_id=user["id"] if user else None,
            roles=roles,
            created_after=created_after,
            created_before=created_before,
        )
        async with self._store.long_snapshot() as snapshot:
            rows, more = await snapshot.search.find(
                wanted,
                after=_found_place(position),
                limit=limit,
                byte_limit=paging.MAX_RESPONSE_BYTES,
            )

        results = await _results(rows, query)
        response = pb.SearchMessagesResponse(results=results)
        if more or len(results) < len(rows):
            last = rows[len(results) - 1]
            place = [*paging.place(last["created_at"], last["conversation_id"]), last["sequence"]]
            response.next_page_token = self._page_tokens.seal(place, binding)
        return response

    async def UpdateMessage(
        self, request: pb.UpdateMessageRequest, call: Call
    ) -> pb.UpdateMessageResponse:
        with Fields() as fields:
            asked = _asked(fields, request, call, etag=_given_etag(request))
            if request.update_mask.paths and not request.HasField("message"):
                fields.reject("REQUIRED", "message")
            values = _values(fields, request.message, masks.paths(fields, request, "message"))
            patch = fields.metadata("metadata_patch", request.metadata_patch)

        async def update(transaction: Transaction, view: Row, row: Row | None) -> UUID:
            _require_may_edit(view, row["sender_id"] if row else call.actor_id, asked, call)
            row = edits.require_editable(row, name=asked.key)
            with Fields() as fields:
                metadata = wire.patched(fields, {**row, **values}["metadata"], patch)
            wanted = {**values, "metadata": metadata}
            changes = edits.edit(row, wanted, etag=asked.etag, by_actor=call.actor is not None)
            if changes:
                await transaction.messages.edit(
                    row, changes, after_version=view["version"], actor_id=call.actor_id
                )
            return _id(row)

        row = await self._change(asked, call, update)
        assert row is not None

        message = wire.message(row)
        return pb.UpdateMessageResponse(
            message=wire.unmade(message) if request.validate_only else message
        )

    @checks_actor
    async def ListMessageRevisions(
        self, request: pb.ListMessageRevisionsRequest, call: Call
    ) -> pb.ListMessageRevisionsResponse:
        with Fields() as fields:
            reference = fields.conversation("conversation_id", request.conversation_id)
            key = fields.message_key(request)
            limit = fields.page_size(request.page_size)

        message = await self._lookups.message(request.conversation_id, reference, key, call)
        binding = paging.binding(call, request, message["conversation_id"])
        position = self._page_tokens.open(request.page_token, binding)
        async with self._store.snapshot() as snapshot:
            rows, more = await snapshot.messages.revisions(
                message,
                after=int(position[0]) if position else None,
                limit=limit,
                byte_limit=paging.MAX_RESPONSE_BYTES,
            )

        revisions = paging.cut(map(wire.revision, rows))
        response = pb.ListMessageRevisionsResponse(revisions=revisions)
        if more or len(revisions) < len(rows):
            last = revisions[-1].revision
            response.next_page_token = self._page_tokens.seal([last], binding)
        return response

    async def DeleteMessage(
        self, request: pb.DeleteMessageRequest, call: Call
    ) -> pb.DeleteMessageResponse:
        with Fields() as fields:
            asked = _asked(fields, request, call)

        async def delete(transaction: Transaction, view: Row, row: Row | None) -> UUID | None:
            _require_may_delete(view, row["sender_id"] if row else call.actor_id, asked, call)
            if not deletion.delete(
                row,
                kind="message",
                name=asked.key,
                etag=asked.etag,
                allow_missing=request.allow_missing,
            ):
                return None
            assert row is not None
            await transaction.messages.delete(
                row, after_version=view["version"], actor_id=call.actor_id
            )
            return _id(row)

        row = await self._change(asked, call, delete)

        return pb.DeleteMessageResponse(message=wire.message(row) if row else None)

    async def UndeleteMessage(
        self, request: pb.UndeleteMessageRequest, call: Call
    ) -> pb.UndeleteMessageResponse:
        with Fields() as fields:
            asked = _asked(fields, request, call)

        async def undelete(transaction: Transaction, view: Row, row: Row | None) -> UUID:
            owner_id = deletion.deleter_or_sender(row) if row else call.actor_id
            _require_may_delete(view, owner_id, asked, call)
            deletion.undelete(row, kind="message", name=asked.key, etag=asked.etag)
            assert row is not None
            await transaction.messages.undelete(
                row, after_version=view["version"], actor_id=call.actor_id
            )
            return _id(row)

        row = await self._change(asked, call, undelete)
        assert row is not None

        return pb.UndeleteMessageResponse(message=wire.message(row))

    async def _change(self, asked: Asked, call: Call, do: Deed) -> Row | None:
        """Do it under the conversation's lock; the message then, if anything was done."""
        id = await self._lookups.conversation_id(asked.conversation, asked.reference)

        async with self._store.transaction(lock=lock_of(id)) as transaction:
            transaction.dry_run = asked.dry_run
            if done := await transaction.requests.find(asked.request, id):
                call.mark_replayed()
                return await _replay(transaction, asked, call, done)
            (view,) = await transaction.conversations.views([(id, call.actor_id)])
            if view is None:
                raise NotFound("conversation", asked.conversation)
            (row,) = await transaction.messages.find([(id, call.actor_id, asked.key)])
            message_id = await do(transaction, view, row)
            await transaction.requests.record(
                asked.request, conversation_id=id, subject_id=message_id
            )
            if message_id is None:
                return None
            (row,) = await transaction.messages.find([(id, call.actor_id, message_id)])
        return row

    async def _with_senders(self, drafts: list[Named]) -> tuple[Draft, ...]:
        """The drafts, with the users behind the usernames that name their senders."""
        names = list({sender for _, sender in drafts if isinstance(sender, str)})
        if not names:
            return tuple(draft for draft, _ in drafts)
        rows = await self._lookups.users(names)
        ids = {name: row["id"] for name, row in zip(names, rows, strict=True) if row}
        return tuple(
            replace(draft, sender_id=ids.get(sender)) if isinstance(sender, str) else draft
            for draft, sender in drafts
        )

    async def _append(self, item: Append, call: Call) -> list[pb.Message]:
        """The messages appended, or those that the same request appended before."""
        appended = await self._sender.append(item, call)
        if not isinstance(appended, Replayed):
            return [wire.appended(message, created_at) for message, created_at in appended]
        call.mark_replayed()
        # What somebody sent is its own, and stays whole for it wherever it is now.
        keys = [(item.conversation_id, None, appended.sequence + n) for n in range(appended.count)]
        return [wire.message(row) for row in await self._lookups.repeated(keys)]


def _filters(fields: Fields, request: pb.ListMessagesRequest) -> Filters:
    """Those that are given; all but the sender, who has to be looked up."""
    created_after, created_before = fields.span(
        request, after="created_after", before="created_before"
    )
    filters = {
        "external_id": fields.external_id("external_id", request.external_id),
        "roles": fields.enums("roles", request.roles, MessageRole),
        "statuses": fields.enums("statuses", request.statuses, MessageStatus),
        "created_after": created_after,
        "created_before": created_before,
        "metadata_contains": fields.metadata("metadata_contains", request.metadata_contains),
    }
    return {name: value for name, value in filters.items() if value and value != "{}"}


def _end(part: Part, anchor: int) -> int:
    """The sequence of the last message that is shown; the anchor's, where none is."""
    return part.items[-1][0] if part.items else anchor


def _window(fields: Fields, request: pb.ListMessagesRequest, call: Call) -> Window | None:
    before = fields.within("before_count", request.before_count, low=0, high=MAX_WINDOW)
    after = fields.within("after_count", request.after_count, low=0, high=MAX_WINDOW)
    if not before and not after:
        before = after = DEFAULT_WINDOW
    around = request.WhichOneof("around")
    if around is None:
        return None
    if around != "around_first_unread":
        key = fields.optional_message_key(request, "around")
        return Window(key=key, before=before, after=after)
    if not request.around_first_unread:
        return None
    if not call.actor:
        rule = "only an actor has unread messages: name one in x-parley-actor"
        fields.reject("INVALID_VALUE", around, rule=rule)
    return Window(key=None, before=before, after=after)


def _asked(
    fields: Fields,
    request: pb.UpdateMessageRequest | pb.DeleteMessageRequest | pb.UndeleteMessageRequest,
    call: Call,
    etag: tuple[str, str] | None = None,
) -> Asked:
    return Asked(
        conversation=request.conversation_id,
        reference=fields.conversation("conversation_id", request.conversation_id),
        key=fields.message_key(request),
        etag=fields.etag(*(etag or ("etag", request.etag))),
        request=fields.request_id(call, request),
        dry_run=isinstance(request, pb.UpdateMessageRequest) and request.validate_only,
    )


def _given_etag(request: pb.UpdateMessageRequest) -> tuple[str, str]:
    """The request's own etag, or the one inside the resource, and the field that holds it."""
    if request.etag:
        return "etag", request.etag
    return "message.etag", request.message.etag


def _values(fields: Fields, message: pb.Message, names: set[str]) -> dict[str, Any]:
    """Those of the values that clients may change which are asked for."""
    read: dict[str, Callable[[], Any]] = {
        "content": lambda: fields.content("message.content", message.content),
        "metadata": lambda: fields.metadata("message.metadata", message.metadata),
        "model": lambda: fields.line("message.model", message.model, limit=128),
        **{
            name: partial(fields.count, f"message.{name}", message, name)
            for name in ("tokens_used", "input_tokens", "output_tokens")
        },
    }
    return {name: value() for name, value in read.items() if name in names}


def _require_may_edit(view: Row, sender_id: UUID | None, asked: Asked, call: Call) -> None:
    """Raise unless the caller may edit the sender's message here and now."""
    if call.actor:
        require_may_edit(view, sender_id, actor_id=call.actor.id, conversation=asked.conversation)
    require_writable(view)


def _require_may_delete(view: Row, owner_id: UUID | None, asked: Asked, call: Call) -> None:
    """Raise unless the caller may delete or undelete the owner's message here and now."""
    if call.actor:
        require_may_delete(view, owner_id, actor_id=call.actor.id, conversation=asked.conversation)
    require_writable(view)


async def _replay(transaction: Transaction, asked: Asked, call: Call, done: Row) -> Row | None:
    """The message as it stands, if the actor still may read it; its own it always may."""
    if done["subject_id"] is None:
        return None
    id = done["conversation_id"]
    (row,) = await transaction.messages.find([(id, None, done["subject_id"])])
    if row and call.actor and row["sender_id"] != call.actor.id:
        (row,) = await transaction.messages.look_for([(id, call.actor.id, done["subject_id"])])
        if row is None:
            raise NotFound("conversation", asked.conversation)
        row = row if row["id"] else None
    if row is None:
        raise NotFound("message", asked.key)
    return row


def _id(message: Row) -> UUID:
    id: UUID = message["id"]
    return id


def _place(position: Position | None) -> tuple[int | None, bool]:
    """The sequence beyond which a page lies, and whether it lies on the side of the first page."""
    return (int(position[0]), position[1] == "previous") if position else (None, False)


async def _results(rows: Sequence[Row], query: Query) -> list[pb.SearchResult]:
    """As many of the messages as fit into one response, and where they match."""

    def make() -> list[pb.SearchResult]:
        return paging.cut(wire.search_result(row, query) for row in rows)

    if sum(len(row["content"]) for row in rows) < LONG_TEXT:
        return make()
    return await asyncio.to_thread(make)


def _found_place(position: Position | None) -> Place | None:
    """The message beyond which a page of search results lies."""
    place = paging.time_and_id(position)
    return (*place, int(position[2])) if place and position else None
