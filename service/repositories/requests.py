from uuid import UUID

from sqlalchemy import delete, func, insert, select, text

from service.repositories.base import Repository, Row, tables
from service.rules.requests import RequestId, require_same

requests = tables["requests"]


class Requests(Repository):
    """The mutations done under a request_id. Read and written under the lock of their scope."""

    async def find(
        self, request: RequestId | None, conversation_id: UUID | None = None
    ) -> Row | None:
        """What was done under this id, if anything; raises if it was for another payload."""
        if request is None:
            return None
        row = await self._connection.row(
            select(requests).where(
                requests.c.conversation_id.is_not_distinct_from(conversation_id),
                requests.c.key == request.key,
            )
        )
        if row is not None:
            require_same(request, row)
        return row

    async def record(
        self,
        request: RequestId | None,
        *,
        conversation_id: UUID | None = None,
        subject_id: UUID | None,
        created: bool | None = None,
        message_count: int | None = None,
        participant_count: int | None = None,
    ) -> None:
        """Note what the request made or found; nothing for a request without an id."""
        if request is not None:
            await self._connection.execute(
                insert(requests).values(
                    conversation_id=conversation_id,
                    key=request.key,
                    payload_hash=request.payload_hash,
                    subject_id=subject_id,
                    created=created,
                    message_count=message_count,
                    participant_count=participant_count,
                )
            )

    async def prune(self) -> int:
        """Forget those that name no conversation and are older than a week; returns how many."""
        forgotten = await self._connection.rows(
            delete(requests)
            .where(
                requests.c.conversation_id.is_(None),
                requests.c.created_at < func.now() - text("interval '7 days'"),
            )
            .returning(requests.c.key)
        )
        return len(forgotten)
