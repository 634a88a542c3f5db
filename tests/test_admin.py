"""What operators' probes are answered, whatever was answered before."""

from collections.abc import Iterator
from types import SimpleNamespace
from urllib.error import HTTPError
from urllib.request import urlopen

import pytest
from prometheus_client import CollectorRegistry

from service.admin import Admin
from service.settings import ConfigurationError


@pytest.fixture
def service() -> SimpleNamespace:
    return SimpleNamespace(is_ready=False)


@pytest.fixture
def admin(service: SimpleNamespace) -> Iterator[Admin]:
    admin = Admin("127.0.0.1:0", is_ready=lambda: service.is_ready, registry=CollectorRegistry())
    yield admin
    admin.stop()


def asked(admin: Admin, path: str) -> tuple[int, str]:
    try:
        with urlopen(f"http://{admin.address}{path}", timeout=5) as answer:
            return answer.status, answer.read().decode()
    except HTTPError as error:
        with error:
            return error.code, error.read().decode()


def test_each_answer_is_whole_whatever_came_before(admin: Admin, service: SimpleNamespace) -> None:
    nothing = (404, "There is /healthz, /readyz and /metrics.\n")
    for service.is_ready, ready in ((False, (503, "not ready\n")), (True, (200, "ok\n"))) * 2:
        assert asked(admin, "/readyz") == ready
        assert asked(admin, "/healthz") == (200, "ok\n")
        assert asked(admin, "/nothing") == nothing
        assert asked(admin, "/metrics")[0] == 200


def test_an_address_that_is_taken_is_told_in_one_line(admin: Admin) -> None:
    with pytest.raises(ConfigurationError, match=r"cannot listen on .*: Address already in use"):
        Admin(admin.address, is_ready=lambda: True, registry=CollectorRegistry())
