"""The Python client of Parley, the system of record for conversations.

    with parley_client.connect("127.0.0.1:50051", token=token, plaintext=True) as parley:
        parley.users.CreateUser(user_pb2.CreateUserRequest(user=user_pb2.User(username="ada")))

A call has a deadline, is repeated where that is safe, and raises a ParleyError. The messages are in
`parley.v1`; `parley_client.aio` is the same for asyncio.
"""

from parley_client.client import Client, connect, pages
from parley_client.errors import ParleyError

__all__ = ["Client", "ParleyError", "connect", "pages"]
