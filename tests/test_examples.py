"""How the examples are judged; that they pass is for `make examples`."""

import pytest

from scripts import examples, stubs

STORY = examples.expected()


def test_a_story_is_the_one_in_the_readme_whatever_the_names_of_its_run() -> None:
    assert examples.compare(STORY, STORY.replace("4f1c09be", "00c0ffee")) == []


@pytest.mark.parametrize(
    "told",
    [
        STORY.replace("sent again: 1", "sent again: 2"),
        STORY.replace("event: 11", "event: 12"),
        STORY.replace("event: 7 TYPE_MESSAGE_CREATED\n", ""),
        STORY.replace("cut\n", "cut\ncut\n"),
        STORY.replace("4f1c09be", "none"),
        "",
    ],
    ids=["sent twice", "event lost", "line missing", "line repeated", "no name", "silent"],
)
def test_a_story_told_otherwise_fails(told: str) -> None:
    assert examples.compare(STORY, told) != []


def test_ci_requires_all_languages_and_others_those_they_name() -> None:
    assert examples.required({}) == []
    assert examples.required({"PARLEY_EXAMPLES": "go, rust"}) == ["go", "rust"]
    assert set(examples.required({"CI": "true"})) == {"python", *stubs.TOOLS}
