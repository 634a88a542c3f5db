"""The ids that are made here."""

import time
from itertools import pairwise

from service.ids import new_id


def test_an_id_is_a_uuid_of_version_7_that_begins_with_its_time() -> None:
    before = time.time_ns() // 1_000_000
    ids = [new_id() for _ in range(1_000)]
    after = time.time_ns() // 1_000_000

    assert len(set(ids)) == len(ids)
    assert {(id.version, id.variant) for id in ids} == {(7, "specified in RFC 4122")}
    times = [id.int >> 80 for id in ids]
    assert all(earlier <= later for earlier, later in pairwise([before, *times, after]))
    # All other bits are chance.
    for bit in [*range(62), *range(64, 76)]:
        assert len({id.int >> bit & 1 for id in ids}) == 2, bit
