from parley.v1 import user_pb2 as pb
from parley.v1 import user_pb2_grpc
from service import paging, wire
from service.domain import UserKind
from service.errors import NotFound
from service.fields import Fields
from service.identity import Call
from service.lookups import Lookups
from service.store import Store

MAX_BATCH_USERS = 500


class UserServicer(user_pb2_grpc.UserServiceServicer):
    """Who takes part in conversations."""

    def __init__(self, store: Store, lookups: Lookups) -> None:
        self._store = store
        self._lookups = lookups

    async def CreateUser(self, request: pb.CreateUserRequest, call: Call) -> pb.CreateUserResponse:
        with Fields() as fields:
            if not request.HasField("user"):
                fields.reject("REQUIRED", "user")
            user = request.user
            columns = {
                "username": fields.username("user.username", user.username),
                "email": fields.email("user.email", user.email),
                "full_name": fields.line("user.full_name", user.full_name, limit=256),
                "kind": fields.enum("user.kind", user.kind, UserKind, UserKind.HUMAN),
                "is_active": user.is_active if user.HasField("is_active") else True,
                "is_verified": user.is_verified,
                "metadata": fields.metadata("user.metadata", user.metadata),
                "external_id": fields.external_id("user.external_id", user.external_id),
            }
            request_id = fields.request_id(call, request)
            lock = request_id.lock if request_id else None

        async with self._store.transaction(lock=lock) as transaction:
            transaction.dry_run = request.validate_only
            if done := await transaction.requests.find(request_id):
                (row,) = await transaction.users.find([done["subject_id"]])
                call.mark_replayed()
            else:
                row = await transaction.users.create(**columns)
                await transaction.requests.record(request_id, subject_id=row["id"])
        assert row is not None

        user = wire.user(row, call.actor)
        return pb.CreateUserResponse(user=wire.unmade(user) if request.validate_only else user)

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
