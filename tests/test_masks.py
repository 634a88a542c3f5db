"""Update masks: which fields of a resource an update takes."""

from typing import Any

import pytest

from parley.v1 import conversation_pb2, message_pb2, participant_pb2, user_pb2
from service.errors import InvalidArgument
from service.fields import Fields
from service.masks import paths, updatable

ALL = {"slug", "title", "is_active", "members_may_invite", "metadata"}


def taken(mask: list[str] | None, **conversation: Any) -> set[str]:
    request = conversation_pb2.UpdateConversationRequest()
    request.conversation.CopyFrom(conversation_pb2.Conversation(**conversation))
    if mask is not None:
        request.update_mask.paths[:] = mask
    with Fields() as fields:
        return paths(fields, request, "conversation")


@pytest.mark.parametrize("mask", [None, []])
def test_without_a_mask_it_is_what_is_populated_and_may_be_changed(mask: list[str] | None) -> None:
    assert taken(mask) == set()
    # What was read may be sent back whole: what is not the client's to change is passed over.
    assert taken(mask, id="x", title="tea", etag="1-0", version=7) == {"title"}
    # Absent is not false: presence tells where the contract keeps it.
    assert taken(mask, is_active=False, members_may_invite=False) == {
        "is_active",
        "members_may_invite",
    }


def test_a_mask_takes_what_it_names_whatever_it_holds() -> None:
    assert taken(["title", "slug"], title="tea", is_active=True) == {"title", "slug"}
    assert taken(["title", "title"]) == {"title"}


@pytest.mark.parametrize("mask", [["*"], ["*", "*"], ["title", "*"]])
def test_a_star_takes_everything(mask: list[str]) -> None:
    assert taken(mask) == ALL


@pytest.mark.parametrize(
    "path",
    [
        "nothing",
        "id",
        "version",
        "external_id",
        "creator_id",
        "..",
        "",
        "metadata.a",
        "Title",
        "**",
    ],
)
def test_any_other_path_is_named(path: str) -> None:
    with pytest.raises(InvalidArgument) as refused:
        taken(["title", path, path, "*"])
    (violation,) = refused.value.violations
    assert (violation.field, violation.reason) == ("update_mask", "INVALID_UPDATE_MASK")
    assert f"'{path}'" in violation.description
    assert "members_may_invite" in violation.description


def test_a_path_as_long_as_a_book_is_told_in_short() -> None:
    with pytest.raises(InvalidArgument) as refused:
        taken(["x" * 1_000_000])
    assert len(refused.value.message) < 300


def test_what_may_be_changed_is_what_the_contract_does_not_fix() -> None:
    assert updatable(conversation_pb2.Conversation()) == ALL
    assert updatable(participant_pb2.Participant()) == {"role"}
    assert updatable(user_pb2.User()) == {
        "username", "email", "full_name", "kind", "is_active", "is_verified", "metadata",
    }  # fmt: skip
    assert updatable(message_pb2.Message()) == {
        "content", "metadata", "tokens_used", "input_tokens", "output_tokens", "model",
    }  # fmt: skip
