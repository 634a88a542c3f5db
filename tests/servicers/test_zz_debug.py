import asyncio, sys
import asyncpg
from ..make import Client
from .test_update_conversation import test_32_clients_who_update_by_etag_make_one_chain as t
async def test_dbg(parley: Client, database: asyncpg.Connection) -> None:
    async def watch():
        await asyncio.sleep(12)
        for r in await database.fetch("SELECT pid, state, wait_event_type, wait_event, left(query,100) q, now()-xact_start x FROM pg_stat_activity WHERE application_name='parley'"):
            print(dict(r))
        for task in asyncio.all_tasks():
            task.print_stack(limit=12, file=sys.stdout)
            coro = task.get_coro(); chain=[]
            while coro is not None and len(chain)<20:
                chain.append(getattr(coro,'__qualname__',repr(coro)[:80])); coro = getattr(coro,'cr_await',None)
            print("CHAIN", chain)
        import os; sys.stdout.flush(); os._exit(3)
    w = asyncio.create_task(watch())
    await t(parley, database)
    w.cancel()
