"""Words: what of a text is indexed, what a query means, and where a text matches it.

One pure function makes words of both, so that they agree in every database, whatever its locale
and extensions. Words are runs of letters and digits, without regard to case, width, and the marks
that Latin, Greek, Cyrillic, Hebrew and Arabic are often written without. Scripts that put no
spaces between words, Korean and pictographs are cut into overlapping pairs of characters.

Positions count words, and single characters of such scripts: so a phrase is found, and only where
its words follow one another.
"""

import re
import unicodedata
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from operator import add
from uuid import UUID

# Of a longer message the beginning is indexed. PostgreSQL keeps no position beyond 16,383.
MAX_INDEXED_CHARACTERS = 16_000
# Of a longer word the beginning counts, in messages and in queries.
MAX_WORD_LENGTH = 64
# From so many characters on, words are looked for beside the event loop: it takes over 5 ms.
LONG_TEXT = 50_000
# How much of a message a snippet shows, and how much of that stands before the first match.
SNIPPET_LENGTH, SNIPPET_LEAD = 160, 40

# Letters that Unicode takes for letters of their own, and many people write without their stroke.
STROKES = str.maketrans({"đ": "d", "ð": "d", "ł": "l", "ø": "o", "ħ": "h", "ŧ": "t", "ı": "i",
                         "æ": "ae", "œ": "oe"})  # fmt: skip
# Marks that are written or not: accents, Hebrew points, Arabic vowels and the tatweel. Others, as
# Thai and Indic vowels or the marks of Japanese, make another word.
OPTIONAL_MARKS = (
    (0x0300, 0x036F), (0x0483, 0x0487), (0x0591, 0x05C7), (0x0610, 0x061A), (0x0640, 0x0640),
    (0x064B, 0x065F), (0x0670, 0x0670), (0x06D6, 0x06ED), (0x1AB0, 0x1AFF), (0x1DC0, 0x1DFF),
    (0x20D0, 0x20FF), (0xFE00, 0xFE2F),
)  # fmt: skip
TATWEEL = 0x0640
# Scripts whose words are not told apart by spaces, and Korean, whose particles are.
PAIRED_SCRIPTS = (
    (0x0E00, 0x0EFF), (0x1000, 0x109F), (0x1100, 0x11FF), (0x1780, 0x17FF), (0x2E80, 0x2FDF),
    (0x3005, 0x3007), (0x3040, 0x31FF), (0x3400, 0x9FFF), (0xA960, 0xA97F), (0xAC00, 0xD7FF),
    (0xF900, 0xFAFF), (0x1B000, 0x1B16F), (0x20000, 0x3FFFF),
)  # fmt: skip
# Marks of Japanese that become one with the character before them.
VOICING = "\u3099\u309a"
PICTOGRAPHS = ((0x2190, 0x2BFF), (0x1F000, 0x1FAFF))


def _in(ranges: tuple[tuple[int, int], ...], code: int) -> bool:
    return any(first <= code <= last for first, last in ranges)


class _Folding(dict[int, str]):
    """What becomes of a character that was decomposed and folded; each is looked up once."""

    def __missing__(self, code: int) -> str:
        character = chr(code)
        category = unicodedata.category(character)
        is_mark = category[0] == "M" or code == TATWEEL
        if category == "Cf" or (is_mark and _in(OPTIONAL_MARKS, code)):
            folded = ""
        elif category[0] in "LNM" or _in(PICTOGRAPHS, code):
            folded = character.translate(STROKES)
        else:
            folded = " "
        self[code] = folded
        return folded


class _Kinds(dict[int, str]):
    """What a character is as it was written: of a (w)ord, (p)aired, a (m)ark on the one before it,
    or a blank."""

    def __missing__(self, code: int) -> str:
        character = chr(code)
        folded = fold(character)
        if character.isascii():
            kind = "w" if folded else " "
        elif not folded or folded in VOICING:
            kind = "m"
        elif PAIRED_CHARACTER.match(folded):
            kind = "p"
        else:
            kind = "w" if folded.strip() else " "
        self[code] = kind
        return kind


class _Folded(dict[str, str]):
    """Single characters as `fold` leaves them; of several, nothing is kept."""

    def __missing__(self, characters: str) -> str:
        folded = fold(characters)
        if len(characters) == 1:
            self[characters] = folded
        return folded


# Decomposing sorts the marks on a letter, in a time that grows with the square of their number: of
# what may be marks, in a row, those beyond the 30th are left out. (16,000 took 300 ms.)
HEAP = re.compile(r"((?:[^\w\s\x00-\x7f]|[\uff9e\uff9f]){30})(?:[^\w\s\x00-\x7f]|[\uff9e\uff9f])+")
FOLDING, KINDS, FOLDED = _Folding(), _Kinds(), _Folded()
ASCII_WORD = re.compile(r"[a-z0-9]+")
PAIRED = "".join(f"{chr(first)}-{chr(last)}" for first, last in PAIRED_SCRIPTS + PICTOGRAPHS)
# What has a position of its own, or several: a run of paired characters, or a word.
PAIRED_CHARACTER = re.compile(f"[{PAIRED}]")
RUN = re.compile(rf"([{PAIRED}]+)|([^{PAIRED}\s]+)")

# The same of a text as it was written, spelled in kinds of characters.
WRITTEN = re.compile(r"(?P<word>w[wm]*)|[pm]+")
PAIRED_WRITTEN = re.compile(r"pm*|m+")


def fold(text: str) -> str:
    """The words of a text, with spaces wherever there was something else."""
    if text.isascii():
        return " ".join(ASCII_WORD.findall(text.lower()))
    decomposed = unicodedata.normalize("NFKD", HEAP.sub(r"\1", text)).casefold()
    return unicodedata.normalize("NFC", decomposed.translate(FOLDING))


def terms(folded: str) -> list[str]:
    """What stands at each position: a word, a pair, or the last character of a run of pairs."""
    if folded.isascii():
        return [word[:MAX_WORD_LENGTH] for word in folded.split()]
    found: list[str] = []
    for run, word in RUN.findall(folded):
        if run:
            found += map(add, run, run[1:])
        found.append(run[-1] if run else word[:MAX_WORD_LENGTH])
    return found


def vector(content: str, conversation_id: UUID) -> str:
    """A message's entry in the index, as PostgreSQL reads a tsvector.

    It also holds its conversation's key, so that one look finds the words of one conversation.
    """
    folded = fold(content[:MAX_INDEXED_CHARACTERS])[:MAX_INDEXED_CHARACTERS]
    entries = [f"{term}:{position}" for position, term in enumerate(terms(folded), start=1)]
    return " ".join([key_of(conversation_id), *entries])


def key_of(conversation_id: UUID) -> str:
    """Stands for a conversation in the index; no word has this form."""
    return f"#{conversation_id.hex[-12:]}"


@dataclass(frozen=True, slots=True)
class Wanted:
    """A word or phrase: its terms, and where each stands. Of a single character of a paired script
    the third is True: it is found at the beginning of a pair, too.
    """

    terms: tuple[tuple[int, str, bool], ...]
    excluded: bool = False

    def __str__(self) -> str:
        """As PostgreSQL reads a tsquery."""
        spelled, before = "", 0
        for at, term, is_open in self.terms:
            link = f" <{at - before}> " if spelled else ""
            spelled += f"{link}'{term}'{':*' if is_open else ''}"
            before = at
        return f"!({spelled})" if self.excluded else f"({spelled})"


@dataclass(frozen=True, slots=True)
class Query:
    """What is looked for: one of the alternatives, of which each must be there in full."""

    alternatives: tuple[tuple[Wanted, ...], ...]
    # How many words were given.
    size: int

    def __str__(self) -> str:
        """As PostgreSQL reads a tsquery; empty where there is nothing that could be found."""
        return " | ".join(f"({' & '.join(map(str, group))})" for group in self.alternatives)

    def terms(self) -> set[str]:
        """What to point out in a text that was found."""
        wanted = (each for group in self.alternatives for each in group if not each.excluded)
        return {term for each in wanted for _, term, _ in each.terms}


# A phrase in quotes, or what stands between blanks; perhaps after a minus.
PART = re.compile(r'(-(?=[^\s-]))?(?:"([^"]*)"?|([^\s"]+))')


def parse(text: str) -> Query:
    """The meaning of a query: any text has one.

    Words must all be there, and what is written together, or in quotes, one after the other. `or`
    between words begins another alternative; `-` before a word excludes it. An alternative that
    only excludes finds nothing.
    """
    alternatives: list[list[Wanted]] = [[]]
    size = 0
    parts = list(PART.finditer(text))
    joined = True
    for part in parts:
        minus, quoted, bare = part.groups()
        is_last = part is parts[-1]
        if not joined and not is_last and not minus and bare and bare.lower() == "or":
            alternatives.append([])
            joined = True
            continue
        words = fold(quoted if bare is None else bare)
        size += len(words.split())
        if wanted := _wanted(words, excluded=bool(minus)):
            alternatives[-1].append(wanted)
            joined = False
    return Query(
        tuple(tuple(group) for group in alternatives if any(not each.excluded for each in group)),
        size,
    )


def _wanted(words: str, *, excluded: bool) -> Wanted | None:
    """A phrase. The last character of a run of pairs adds nothing, unless it is alone."""
    found: list[tuple[int, str, bool]] = []
    in_run = False
    for at, term in enumerate(terms(words)):
        is_paired = PAIRED_CHARACTER.match(term) is not None
        is_single = is_paired and len(term) == 1
        if not (is_single and in_run):
            found.append((at, term, is_single))
        in_run = is_paired and not is_single
    return Wanted(tuple(found), excluded) if found else None


def snippet(content: str, query: Query) -> list[tuple[str, bool]]:
    """The text around the first match, in parts, and whether each is of the query."""
    begin, matches = _first_matches(content[:MAX_INDEXED_CHARACTERS], query.terms())
    parts: list[tuple[str, bool]] = []
    at = begin
    for start, stop in matches:
        parts += [(content[at:start], False), (content[start:stop], True)]
        at = stop
    parts.append((content[at : begin + SNIPPET_LENGTH], False))
    return [part for part in parts if part[0]]


def _first_matches(content: str, wanted: set[str]) -> tuple[int, list[tuple[int, int]]]:
    """Where a snippet begins, and where what matches in it begins and ends."""
    matches: list[tuple[int, int]] = []
    # Where words begin that the snippet may begin with.
    starts = deque([0])
    for start, stop, is_match in _spans(content, wanted):
        if not matches:
            starts.append(start)
            while starts[0] < start - SNIPPET_LEAD:
                starts.popleft()
        end = starts[0] + SNIPPET_LENGTH
        if matches and start >= end:
            break
        if is_match and matches and matches[-1][1] == start:
            matches[-1] = matches[-1][0], min(stop, end)
        elif is_match:
            matches.append((start, min(stop, end)))
    return (starts[0] if matches else 0), matches


def _spans(content: str, wanted: set[str]) -> Iterator[tuple[int, int, bool]]:
    """Where the words of a text, and the characters of paired runs, begin and end, and whether
    each is wanted."""
    for found in WRITTEN.finditer(content.translate(KINDS)):
        if found["word"]:
            is_match = not wanted.isdisjoint(terms(fold(content[found.start() : found.end()])))
            yield found.start(), found.end(), is_match
            continue
        spans = [
            (found.start() + each.start(), found.start() + each.end())
            for each in PAIRED_WRITTEN.finditer(found[0])
        ]
        folded = [FOLDED[content[start:stop]] for start, stop in spans]
        pairs = [_has(pair, wanted) for pair in map(add, folded, folded[1:])]
        for (start, stop), single, *sides in zip(
            spans, folded, [False, *pairs], [*pairs, False], strict=True
        ):
            yield start, stop, any(sides) or not wanted.isdisjoint(single) or _has(single, wanted)


def _has(characters: str, wanted: set[str]) -> bool:
    """Whether a pair that is wanted is among them: two, or more where a mark stayed by itself."""
    return any(map(wanted.__contains__, map(add, characters, characters[1:])))
