"""Words, queries and snippets: what of a text is indexed, and where it is found."""

import re
import time
from uuid import UUID

import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.rules.search import (
    MAX_INDEXED_CHARACTERS,
    SNIPPET_LENGTH,
    fold,
    key_of,
    parse,
    snippet,
    terms,
    vector,
)

TALK = UUID("019a0000-0000-7000-8000-0123456789ab")


def words(text: str) -> str:
    return " ".join(terms(fold(text)))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Hello, World!", "hello world"),
        ("don't mail ada@example.org", "don t mail ada example org"),
        ("snake_case --force C++ 3.14", "snake case force c 3 14"),
        ("Straße ＦＵＬＬ ﬁne ŁÓDŹ İstanbul ısı", "strasse full fine lodz istanbul isi"),
        ("Đẹp lắm, Tiếng Việt", "dep lam tieng viet"),
        ("dep lam tieng viet", "dep lam tieng viet"),
        ("Ελλάδα ΟΔΟΣ Ёлка", "ελλαδα οδοσ елка"),
        ("مُحَمَّد أحمد كـــتاب", "محمد احمد كتاب"),
        ("می‌خواهم", "میخواهم"),
        ("שָׁלוֹם בית־ספר", "שלום בית ספר"),
        ("日本語", "日本 本語 語"),
        ("本", "本"),
        ("がぎ かき", "がぎ ぎ かき き"),
        ("ｶﾞｷﾞ", "ガギ ギ"),
        ("한국어를 배워", "한국 국어 어를 를 배워 워"),
        ("กินข้าว", "กิ ิน นข ข้ ้า าว ว"),
        ("iPhone手机x", "iphone 手机 机 x"),
        ("हिन्दी", "हिन्दी"),
        ("🎉🎉 ok ❤️", "🎉🎉 🎉 ok ❤"),
        ("soft\u00adhyphen zero\u200bwidth", "softhyphen zerowidth"),
        ("x" * 100, "x" * 64),
        ("((( & | ! ' \\ \r \u2028", ""),
        ("", ""),
    ],
)
def test_a_text_becomes_words(text: str, expected: str) -> None:
    assert words(text) == expected


def test_an_entry_holds_each_word_with_its_places_and_the_conversations_key() -> None:
    assert vector("So, so what", TALK) == "#0123456789ab so:1 so:2 what:3"
    assert key_of(TALK) == "#0123456789ab"


def test_of_a_long_message_the_beginning_is_indexed() -> None:
    filler = "a " * (MAX_INDEXED_CHARACTERS // 2)
    assert "needle" in vector(f"needle {filler}", TALK)
    assert "needle" not in vector(f"{filler} needle", TALK)
    # One character may stand for eighteen.
    assert len(vector("ﷺ" * 16_000, TALK).split()) < MAX_INDEXED_CHARACTERS


@pytest.mark.parametrize("marks", ["\u0301\u0316", "\u0e38\u0e48", "\u094d\u093c", "\uff9e\u0e38"])
def test_a_heap_of_marks_takes_no_longer_than_other_text(marks: str) -> None:
    def seconds() -> float:
        start = time.process_time()
        vector("a" + marks * 8_000, TALK)
        return time.process_time() - start

    # It was a quarter of a second, and grew with the square.
    assert min(seconds() for _ in range(5)) < 0.1


@pytest.mark.parametrize(
    ("text", "expected", "size"),
    [
        ("hello world", "(('hello') & ('world'))", 2),
        ('"hello world"', "(('hello' <1> 'world'))", 2),
        ("don't", "(('don' <1> 't'))", 2),
        ("tea or coffee", "(('tea')) | (('coffee'))", 2),
        ("tea OR coffee milk", "(('tea')) | (('coffee') & ('milk'))", 3),
        ("tea -milk", "(('tea') & !('milk'))", 2),
        ('tea -"oat milk"', "(('tea') & !('oat' <1> 'milk'))", 3),
        # An operator only where it can be one.
        ("or", "(('or'))", 1),
        ("tea or", "(('tea') & ('or'))", 2),
        ("or tea", "(('or') & ('tea'))", 2),
        ("tea or or coffee", "(('tea')) | (('or') & ('coffee'))", 3),
        ('tea "or" milk', "(('tea') & ('or') & ('milk'))", 3),
        ("--force", "(('force'))", 1),
        ("tea - milk", "(('tea') & ('milk'))", 2),
        # Nothing to be found by.
        ("-tea", "", 1),
        ("tea or -milk", "(('tea'))", 2),
        ("((( & | ! ' \\", "", 0),
        ('"', "", 0),
        ('"tea', "(('tea'))", 1),
        ("a:*", "(('a'))", 1),
        # Pairs: the last character of a run is in them, and one alone begins one or stands alone.
        ("日本語", "(('日本' <1> '本語'))", 1),
        ("本", "(('本':*))", 1),
        ("手机x", "(('手机' <2> 'x'))", 1),
        ("🎉", "(('🎉':*))", 1),
    ],
)
def test_every_text_means_something(text: str, expected: str, size: int) -> None:
    query = parse(text)
    assert (str(query), query.size) == (expected, size)


@pytest.mark.parametrize(
    ("content", "query", "expected"),
    [
        ("Hello, World!", "world", "Hello, [World]!"),
        ("I don't know", "don't", "I [don]'[t] know"),
        ("Tiếng Việt đẹp lắm", "viet dep", "Tiếng [Việt] [đẹp] lắm"),
        ("これは日本語です", "日本語", "これは[日本語]です"),
        ("ｶﾞｷﾞ", "ガギ", "[ｶﾞｷﾞ]"),
        ("본문을 읽다", "본문", "[본문]을 읽다"),
        ("กินข้าวแล้ว", "ข้าว", "กิน[ข้าว]แล้ว"),
        ("本です", "本", "[本]です"),
        ("party 🎉!", "🎉", "party [🎉]!"),
        ("tea, no milk", "tea -sugar", "[tea], no milk"),
        ("<b>bold</b>", "bold", "<b>[bold]</b>"),
        ("nothing of it", "else", "nothing of it"),
        ("", "else", ""),
    ],
)
def test_a_snippet_points_out_what_matched(content: str, query: str, expected: str) -> None:
    parts = snippet(content, parse(query))
    assert "".join(f"[{text}]" if is_match else text for text, is_match in parts) == expected


def test_a_snippet_of_a_long_message_is_cut_at_words_around_the_match() -> None:
    content = "before " * 500 + "the needle is here " + "after " * 500
    parts = snippet(content, parse("needle"))
    shown = "".join(text for text, _ in parts)
    assert shown.startswith("before before")
    assert ("needle", True) in parts
    assert len(shown) == SNIPPET_LENGTH
    # However long a word is, or how many match.
    assert len(snippet("x" * 200_000, parse("x" * 200))[0][0]) == SNIPPET_LENGTH
    assert sum(len(text) for text, _ in snippet("tea " * 9_000, parse("tea"))) == SNIPPET_LENGTH


# What people, and those who try to break it, write.
SCRIPTS = "aéđİ日本がｶﾞ한กิ้مُح🎉❤️'\"-\\:*&|!()<> \t\n\u200b\u2028ﷺ"
# Parts of Korean syllables, and the voicing marks of Japanese.
PARTS = re.compile(
    "[\u1100-\u11ff\u3099\u309a\u3130-\u318f\ua960-\ua97f\ud7b0-\ud7ff\uff9e-\uffdc]"
)
texts = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0")) | st.text(
    st.sampled_from(SCRIPTS)
)


@given(texts)
def test_a_text_is_folded_once_and_for_all(text: str) -> None:
    assert words(fold(text)) == words(text)
    assert all(not set(term) & set(" '\\:\t\n") for term in terms(fold(text)))


@given(texts, texts)
def test_a_snippet_is_a_part_of_the_message(content: str, query: str) -> None:
    parts = snippet(content, parse(query))
    shown = "".join(text for text, _ in parts)
    assert shown in content
    assert all(text for text, _ in parts)
    assert bool(shown) == bool(content)


@given(texts)
def test_a_snippet_points_out_whatever_word_is_asked_for(text: str) -> None:
    # Those that become one with what stands before them are found, but not always pointed out.
    text = PARTS.sub("", text)
    for term in terms(fold(text)):
        parts = snippet(text, parse(f'"{term}"'))
        assert any(is_match for _, is_match in parts)
