import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any
from uuid import UUID

from parley.v1 import user_pb2 as pb
from parley.v1 import user_pb2_grpc
from service import masks, paging, wire
from service.domain import UserKind
from service.errors import Aborted, NotFound, ParleyError, Unavailable
from service.fields import Fields
from service.identity import Call
from service.ids import lock_of
from service.lookups import Lookups
from service.making import Maker, found
from service.paging import PageTokens
from service.passwords import Hasher
from service.repositories.base import Row
from service.repositories.conversations import Purged
from service.rules import deletion, users
from service.rules.etags import current_etag, require_etag
from service.rules.requests import RequestId
from service.rules.users import NewUser, Parting
from service.store import Store, Transaction
from service.verifying import Verifier

MAX_BATCH_USERS = 500
# What one PurgeUser takes on: so many conversations, and none that it would begin later than that.
PURGE_STEP = 100
PURGE_SECONDS = 3.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """What every call that changes a user asks for."""

    # The user as named, and as what.
    user: str
    reference: UUID | str
    etag: str
    request: RequestId | None = None
    dry_run: bool = False


# What a call does to a user that is locked, None where there is none. Returns its id, or None where
# there was nothing to do.
Deed = Callable[[Transaction, Row | None], Awaitable[UUID | None]]


class UserServicer(user_pb2_grpc.UserServiceServicer):
    """Who takes part in conversations."""

    def __init__(
        self,
        store: Store,
        lookups: Lookups,
        page_tokens: PageTokens,
        hasher: Hasher,
        verifier: Verifier,
    ) -> None:
        self._store = store
        self._lookups = lookups
        self._page_tokens = page_tokens
        self._hasher = hasher
        self._verifier = verifier
        self._maker = Maker(store, _make, _show, name="create users")

    async def CreateUser(self, request: pb.CreateUserRequest, call: Call) -> pb.CreateUserResponse:
        with Fields() as fields:
            if not request.HasField("user"):
                fields.reject("REQUIRED", "user")
            new = _new_user(fields, request, call)

        row = await self._maker.make(new, call)

        return pb.CreateUserResponse(user=_answer(row, call, dry_run=request.validate_only))

    async def GetUser(self, request: pb.GetUserRequest, call: Call) -> pb.GetUserResponse:
        with Fields() as fields:
            reference = fields.user("user_id", request.user_id)
        assert reference is not None

        row = await self._lookups.user(reference)

        if row is None:
            raise NotFound("user", request.user_id)
        return pb.GetUserResponse(user=wire.user(row, call.actor))

    async def BatchGetUsers(
        self, request: pb.BatchGetUsersRequest, call: Call
    ) -> pb.BatchGetUsersResponse:
        with Fields() as fields:
            if not request.user_ids:
                fields.reject("REQUIRED", "user_ids")
            if len(request.user_ids) > MAX_BATCH_USERS:
                fields.reject("TOO_MANY_ITEMS", "user_ids", limit=MAX_BATCH_USERS)
            named = {
                name: fields.user(f"user_ids[{n}]", name) for n, name in enumerate(request.user_ids)
            }

        rows = await self._lookups.users([each for each in named.values() if each is not None])

        # Two names may be the same user's.
        found = {row["id"]: row for row in rows if row is not None}
        users = paging.cut(wire.user(row, call.actor) for row in found.values())
        return pb.BatchGetUsersResponse(
            users=users,
            missing_user_ids=[name for name, row in zip(named, rows, strict=True) if row is None],
            truncated=len(users) < len(found),
        )

    async def ListUsers(self, request: pb.ListUsersRequest, call: Call) -> pb.ListUsersResponse:
        with Fields() as fields:
            limit = fields.page_size(request.page_size)
            prefix = fields.line("username_prefix", request.username_prefix, limit=64)
            email = fields.email("email", request.email)
            external_id = fields.external_id("external_id", request.external_id)
            name = fields.line("full_name_contains", request.full_name_contains, limit=256)
            created_after, created_before = fields.span(
                request, after="created_after", before="created_before"
            )
            metadata = fields.metadata("metadata_contains", request.metadata_contains)
        binding = paging.binding(call, request)
        position = self._page_tokens.open(request.page_token, binding)

        async with self._store.long_snapshot() as snapshot:
            rows = await snapshot.users.list(
                show_deleted=request.show_deleted,
                username_prefix=prefix,
                email=email,
                external_id=external_id,
                full_name_contains=name,
                is_active=request.is_active if request.HasField("is_active") else None,
                created_after=created_after,
                created_before=created_before,
                metadata_contains=metadata,
                after=paging.time_and_id(position),
                limit=limit + 1,
            )

        found = paging.cut(wire.user(row, call.actor) for row in rows[:limit])
        response = pb.ListUsersResponse(users=found)
        if len(found) < len(rows):
            last = rows[len(found) - 1]
            response.next_page_token = self._page_tokens.seal(
                paging.place(last["created_at"], last["id"]), binding
            )
        return response

    async def UpdateUser(self, request: pb.UpdateUserRequest, call: Call) -> pb.UpdateUserResponse:
        with Fields() as fields:
            asked = _asked(fields, request, call)
            if request.update_mask.paths and not request.HasField("user"):
                fields.reject("REQUIRED", "user")
            taken = masks.paths(fields, request, "user")
            values = _values(fields, request.user, taken)
            patch = fields.metadata("metadata_patch", request.metadata_patch)

        async def update(transaction: Transaction, user: Row | None) -> UUID:
            user = users.require_self(user, actor_id=call.actor_id, name=asked.user)
            with Fields() as fields:
                metadata = wire.patched(fields, {**user, **values}["metadata"], patch)
            wanted = {**values, "metadata": metadata}
            changes = users.update(user, wanted, by_itself=call.actor is not None)
            require_etag(asked.etag, current_etag(user))
            if changes:
                await transaction.users.update(user, changes)
            return _id(user)

        row = await self._change(asked, call, update)
        assert row is not None

        return pb.UpdateUserResponse(user=_answer(row, call, dry_run=request.validate_only))

    async def DeleteUser(self, request: pb.DeleteUserRequest, call: Call) -> pb.DeleteUserResponse:
        with Fields() as fields:
            asked = _asked(fields, request, call)

        async def delete(transaction: Transaction, user: Row | None) -> UUID | None:
            if not deletion.delete(
                user,
                kind="user",
                name=asked.user,
                etag=asked.etag,
                allow_missing=request.allow_missing,
            ):
                return None
            assert user is not None
            await transaction.users.delete(user)
            return _id(user)

        row = await self._change(asked, call, delete)

        return pb.DeleteUserResponse(user=wire.user(row, call.actor) if row else None)

    async def UndeleteUser(
        self, request: pb.UndeleteUserRequest, call: Call
    ) -> pb.UndeleteUserResponse:
        with Fields() as fields:
            asked = _asked(fields, request, call)

        async def undelete(transaction: Transaction, user: Row | None) -> UUID:
            deletion.undelete(user, kind="user", name=asked.user, etag=asked.etag)
            assert user is not None
            await transaction.users.undelete(user)
            return _id(user)

        row = await self._change(asked, call, undelete)
        assert row is not None

        return pb.UndeleteUserResponse(user=wire.user(row, call.actor))

    async def PurgeUser(self, request: pb.PurgeUserRequest, call: Call) -> pb.PurgeUserResponse:
        with Fields() as fields:
            asked = _asked(fields, request, call)

        user_id, erased = await self._erase(asked)
        done = pb.PurgeUserResponse()
        error: ParleyError | None = None
        settled = 0
        until = time.monotonic() + PURGE_SECONDS
        async with self._store.snapshot() as snapshot:
            tied = await snapshot.conversations.tied_to(user_id, limit=PURGE_STEP + 1)
        for number, conversation_id in enumerate(tied[:PURGE_STEP]):
            if number and (time.monotonic() > until or not call.is_wanted()):
                break
            try:
                parting, purged = await self._part(
                    user_id, conversation_id, delete_shared=request.delete_shared_conversations
                )
            except (Aborted, Unavailable) as caught:
                error = caught
            else:
                _count(done, parting, purged)
                settled += 1
        # An error says that nothing was done. What was is told, and the rest left for another call.
        if error and not erased and not settled:
            raise error

        done.done = settled == len(tied)
        return done

    async def SetPassword(
        self, request: pb.SetPasswordRequest, call: Call
    ) -> pb.SetPasswordResponse:
        with Fields() as fields:
            asked = _asked(fields, request, call)
            password = fields.password("password", request.password)
        # Who is refused need not wait for a hash, nor anybody for theirs.
        _require_own(await self._lookups.user(asked.reference), asked, call)
        password_hash = await self._hasher.hash(password)

        async def set_password(transaction: Transaction, user: Row | None) -> UUID:
            user = _require_own(user, asked, call)
            await transaction.users.set_password(user, password_hash)
            return _id(user)

        await self._change(asked, call, set_password)

        return pb.SetPasswordResponse()

    async def VerifyPassword(
        self, request: pb.VerifyPasswordRequest, call: Call
    ) -> pb.VerifyPasswordResponse:
        with Fields() as fields:
            email = fields.email("email", request.email)
            reference = fields.user("user_id", request.user_id, required=email is None)
            password = fields.password("password", request.password)

        if email is None:
            assert reference is not None
            row = await self._lookups.user(reference)
        else:
            row = await self._lookups.user_by_email(email)
        login = str(reference) if email is None else email.lower()
        verified = await self._verifier.verify(login, row, password, call)

        user = wire.user(row, call.actor) if row and verified else None
        return pb.VerifyPasswordResponse(verified=verified, user=user)

    async def _change(self, asked: Asked, call: Call, do: Deed) -> Row | None:
        """Do it under the user's lock; the user then, if anything was done."""
        lock = asked.request.lock if asked.request else None
        async with self._store.transaction(lock=lock) as transaction:
            transaction.dry_run = asked.dry_run
            if done := await transaction.requests.find(asked.request):
                call.mark_replayed()
                user_id = done["subject_id"]
            else:
                user_id = await do(transaction, await _locked(transaction, asked))
                await transaction.requests.record(asked.request, subject_id=user_id)
            if user_id is None:
                return None
            (row,) = await transaction.users.find([user_id])
        if row is None:
            raise NotFound("user", asked.user)
        return row

    async def _erase(self, asked: Asked) -> tuple[UUID, bool]:
        """The id of the user, who is nobody from now on; and whether it was somebody until now."""
        async with self._store.transaction() as transaction:
            user = await _locked(transaction, asked, even_purged=True)
            if user and user["purged_at"]:
                return _id(user), False
            deletion.purge(user, kind="user", name=asked.user, etag=asked.etag, allow_missing=False)
            assert user is not None
            await transaction.users.erase(user)
        return _id(user), True

    async def _part(
        self, user_id: UUID, conversation_id: UUID, *, delete_shared: bool
    ) -> tuple[Parting, Purged]:
        """Take the user out of one conversation, or the conversation away with it."""
        async with self._store.transaction(lock=lock_of(conversation_id)) as transaction:
            conversation = await transaction.conversations.find(conversation_id)
            if conversation is None:
                return Parting(), Purged()
            people = await transaction.participants.present(conversation_id)
            parting = users.part(user_id, conversation, people, delete_shared=delete_shared)
            if parting.purges:
                return parting, await transaction.conversations.purge(conversation)
            version = conversation["version"]
            await transaction.participants.change({conversation_id: parting.changes})
            if parting.creator_id:
                await transaction.conversations.update(
                    {**conversation, "version": version + len(parting.changes)},
                    {"creator_id": parting.creator_id},
                    actor_id=None,
                )
        return parting, Purged()


# Parse

Request = (
    pb.UpdateUserRequest
    | pb.DeleteUserRequest
    | pb.UndeleteUserRequest
    | pb.PurgeUserRequest
    | pb.SetPasswordRequest
)


def _asked(fields: Fields, request: Request, call: Call) -> Asked:
    reference = fields.user("user_id", request.user_id)
    etag = ("etag", request.etag)
    if isinstance(request, pb.UpdateUserRequest) and not request.etag:
        etag = ("user.etag", request.user.etag)
    # What can be repeated as it is has no request_id.
    plain = isinstance(request, pb.PurgeUserRequest | pb.SetPasswordRequest)
    return Asked(
        user=request.user_id,
        reference=reference or "",
        etag=fields.etag(*etag),
        request=None if plain else fields.request_id(call, request),
        dry_run=isinstance(request, pb.UpdateUserRequest) and request.validate_only,
    )


def _new_user(fields: Fields, request: pb.CreateUserRequest, call: Call) -> NewUser:
    user = request.user
    return NewUser(
        columns={
            **_values(fields, user, masks.updatable(user)),
            "external_id": fields.external_id("user.external_id", user.external_id),
        },
        request=fields.request_id(call, request),
        dry_run=request.validate_only,
    )


def _values(fields: Fields, user: pb.User, names: set[str]) -> dict[str, Any]:
    """Those of the values that clients may change which are asked for."""
    read: dict[str, Callable[[], Any]] = {
        "username": lambda: fields.username("user.username", user.username),
        "email": lambda: fields.email("user.email", user.email),
        "full_name": lambda: fields.line("user.full_name", user.full_name, limit=256),
        "kind": lambda: fields.enum("user.kind", user.kind, UserKind, UserKind.HUMAN),
        "is_active": lambda: user.is_active or not user.HasField("is_active"),
        "is_verified": lambda: user.is_verified,
        "metadata": lambda: fields.metadata("user.metadata", user.metadata),
    }
    return {name: value() for name, value in read.items() if name in names}


# Transact


async def _make(transaction: Transaction, several: list[NewUser]) -> Sequence[UUID | ParleyError]:
    return await transaction.users.create([new.columns for new in several])


async def _show(transaction: Transaction, made: list[tuple[NewUser, UUID]]) -> Sequence[Row]:
    rows = await transaction.users.find([id for _, id in made])
    return [
        found(row, "user", new.columns["username"])
        for (new, _), row in zip(made, rows, strict=True)
    ]


async def _locked(
    transaction: Transaction, asked: Asked, *, even_purged: bool = False
) -> Row | None:
    """The user under its lock; None where there is none."""
    id = asked.reference
    if not isinstance(id, UUID):
        (found,) = await transaction.users.find([id])
        if found is None:
            return None
        id = _id(found)
    await transaction.lock(lock_of(id))
    (user,) = await transaction.users.find([id], even_purged=even_purged)
    return user


def _require_own(user: Row | None, asked: Asked, call: Call) -> Row:
    """The user, if the caller may set its password."""
    user = users.require_self(user, actor_id=call.actor_id, name=asked.user)
    users.require_live(user)
    require_etag(asked.etag, current_etag(user))
    return user


def _id(user: Row) -> UUID:
    id: UUID = user["id"]
    return id


# Answer


def _answer(row: Row, call: Call, *, dry_run: bool) -> pb.User:
    user = wire.user(row, call.actor)
    return wire.unmade(user) if dry_run else user


def _count(done: pb.PurgeUserResponse, parting: Parting, purged: Purged) -> None:
    done.purged_conversation_count += parting.purges
    done.purged_message_count += purged.message_count
    done.transferred_conversation_count += parting.transfers
    done.ended_participant_count += parting.ends
