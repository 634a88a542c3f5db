"""TLS of our own, with certificates that can be replaced while clients call."""

from collections.abc import AsyncIterator
from pathlib import Path

import grpc
import pytest
import pytest_asyncio
import trustme
from grpc_health.v1 import health_pb2, health_pb2_grpc

from parley.v1 import user_pb2
from parley_client import aio, errors
from service.embedded import EmbeddedPostgres
from service.server import Server
from service.settings import ConfigurationError, Settings, load, require_private


def write(folder: Path, authority: trustme.CA) -> dict[str, Path]:
    """A certificate for this machine and its key, in the folder, as settings name them."""
    issued = authority.issue_cert("localhost", "127.0.0.1")
    issued.private_key_pem.write_to_path(folder / "key.pem")
    issued.cert_chain_pems[0].write_to_path(folder / "chain.pem")
    return {"tls_chain": folder / "chain.pem", "tls_key": folder / "key.pem"}


async def reaches(
    server: Server, authority: trustme.CA, own: trustme.LeafCert | None = None
) -> bool:
    """Whether a new client that trusts the authority gets an answer."""
    credentials = grpc.ssl_channel_credentials(
        authority.cert_pem.bytes(),
        own.private_key_pem.bytes() if own else None,
        own.cert_chain_pems[0].bytes() if own else None,
    )
    # Channels of one process share connections, unless told not to.
    alone = [("grpc.use_local_subchannel_pool", 1)]
    async with grpc.aio.secure_channel(server.address, credentials, alone) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        try:
            await stub.Check(health_pb2.HealthCheckRequest(service="liveness"), timeout=5)
        except grpc.aio.AioRpcError as error:
            if error.code() is grpc.StatusCode.UNAVAILABLE:
                return False
            raise
        return True


@pytest.fixture
def authority() -> trustme.CA:
    return trustme.CA()


@pytest_asyncio.fixture
async def server(
    postgres: EmbeddedPostgres, authority: trustme.CA, tmp_path: Path
) -> AsyncIterator[Server]:
    settings = load(address="127.0.0.1:0", data_dir=tmp_path, **write(tmp_path, authority))
    server = Server(settings, postgres.url)
    server.bind()
    await server.start()
    yield server
    await server.stop()


async def test_only_who_trusts_our_authority_and_speaks_tls_is_served(
    server: Server, authority: trustme.CA
) -> None:
    assert await reaches(server, authority)
    assert not await reaches(server, trustme.CA())
    async with grpc.aio.insecure_channel(server.address) as channel:
        with pytest.raises(grpc.aio.AioRpcError):
            await health_pb2_grpc.HealthStub(channel).Check(
                health_pb2.HealthCheckRequest(), timeout=5
            )


async def test_the_python_client_trusts_whom_it_is_told_to(
    server: Server, authority: trustme.CA
) -> None:
    credentials = grpc.ssl_channel_credentials(authority.cert_pem.bytes())
    assert server.token
    await server.readiness.ready.wait()

    async with aio.connect(server.address, token=server.token, credentials=credentials) as client:
        listed = await client.users.ListUsers(user_pb2.ListUsersRequest())
    async with aio.connect(server.address, token=server.token) as trusting_others:
        with pytest.raises(errors.Unavailable):
            await trusting_others.users.ListUsers(user_pb2.ListUsersRequest())

    assert list(listed.users) == []


async def test_a_new_certificate_is_served_to_new_connections_without_a_restart(
    server: Server, authority: trustme.CA, tmp_path: Path
) -> None:
    successor = trustme.CA()
    assert not await reaches(server, successor)

    write(tmp_path, successor)

    assert await reaches(server, successor)
    assert not await reaches(server, authority)


async def test_a_file_that_cannot_be_read_leaves_the_last_good_certificate_in_use(
    server: Server, authority: trustme.CA, tmp_path: Path
) -> None:
    (tmp_path / "chain.pem").unlink()

    assert await reaches(server, authority)


async def test_with_a_client_authority_only_its_clients_may_connect(
    postgres: EmbeddedPostgres, authority: trustme.CA, tmp_path: Path
) -> None:
    clients = trustme.CA()
    clients.cert_pem.write_to_path(tmp_path / "clients.pem")
    settings = load(
        address="127.0.0.1:0",
        data_dir=tmp_path,
        tls_client_ca=tmp_path / "clients.pem",
        **write(tmp_path, authority),
    )
    server = Server(settings, postgres.url)
    server.bind()
    await server.start()

    try:
        assert await reaches(server, authority, clients.issue_cert("shop.internal"))
        assert not await reaches(server, authority, trustme.CA().issue_cert("shop.internal"))
        assert not await reaches(server, authority)
    finally:
        await server.stop()


def settings_of(**flags: object) -> Settings:
    return load(address="0.0.0.0:50051", **flags)


def test_strangers_can_reach_it_only_by_tls_or_behind_a_mesh(tmp_path: Path) -> None:
    require_private(settings_of(tls_chain=tmp_path, tls_key=tmp_path))
    require_private(settings_of(plaintext_behind_mesh=True))
    with pytest.raises(ConfigurationError, match="PARLEY_TLS_CHAIN and PARLEY_TLS_KEY"):
        require_private(settings_of())


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        ({"tls_chain": "x"}, "PARLEY_TLS_KEY"),
        ({"tls_key": "x"}, "PARLEY_TLS_CHAIN"),
        ({"tls_client_ca": "x"}, "PARLEY_TLS_CLIENT_CA"),
    ],
)
def test_half_a_configuration_is_refused_and_named(flags: dict[str, str], named: str) -> None:
    with pytest.raises(ConfigurationError, match=named):
        require_private(load(**flags))


async def test_a_certificate_that_is_none_is_one_clear_line(
    postgres: EmbeddedPostgres, tmp_path: Path
) -> None:
    settings = load(
        address="127.0.0.1:0",
        data_dir=tmp_path,
        tls_chain=tmp_path / "no.pem",
        tls_key=tmp_path / "no.pem",
    )

    with pytest.raises(ConfigurationError, match="No such file") as refused:
        Server(settings, postgres.url).bind()
    assert "\n" not in str(refused.value)
