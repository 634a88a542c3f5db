"""The lives of a database, as an operator handles them: `parley db new-era`."""

from service.store import Store


async def begin(url: str) -> int:
    """Start a new era, in which every cursor that was given out before is expired: its number."""
    store = Store(url, pool_size=2)
    try:
        async with store.transaction() as transaction:
            return await transaction.events.begin_another_era()
    finally:
        await store.close()
