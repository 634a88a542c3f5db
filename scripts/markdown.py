"""Proto comments as Markdown that reads well in a browser and on a terminal.

Lines are at most WIDTH columns, and links stand at the end of the page, where they disturb nobody:
`[SendMessage]` in the text, `[SendMessage]: #sendmessage` below.
"""

import re
import textwrap
from collections.abc import Callable, Collection, Iterator

WIDTH = 100

# What a line must not begin with, unless it means it: a list, a heading, a quotation.
MARKS = re.compile(r"(?m)^ *([-+*>#]|\d+[.)]) ")

Linker = Callable[[str], str]


def anchor(heading: str) -> str:
    """Where GitHub puts a heading."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def wrapped(text: str, indent: str = "", bullet: str = "") -> str:
    """The text as one paragraph; after a bullet, lines hang below its text."""
    hanging = indent + " " * len(bullet)
    found = textwrap.fill(
        text,
        WIDTH,
        initial_indent=indent + bullet,
        subsequent_indent=hanging,
        break_long_words=False,
        break_on_hyphens=False,
    )
    first, _, rest = found.partition("\n")
    if MARKS.search(rest):
        raise ValueError(f"Word it otherwise: a line would begin with a mark.\n{found}")
    return "\n".join([first, rest]) if rest else first


def blocks(comment: str) -> Iterator[tuple[str, str]]:
    """The paragraphs and the points of a comment: ("" or "- ", its text on one line)."""
    bullet, words = "", list[str]()
    for line in [*textwrap.dedent(comment).splitlines(), ""]:
        begins = not line or line.startswith("- ") or (bullet and not line.startswith("  "))
        if begins and words:
            yield bullet, " ".join(words)
            words = []
        if begins:
            bullet = "- " if line.startswith("- ") else ""
        words += line.removeprefix(bullet if begins else "").split()


def prose(comment: str, link: Linker) -> str:
    """A comment as paragraphs and lists."""
    written = ""
    before = None
    for bullet, text in blocks(comment):
        separator = "\n" if bullet and before == bullet else "\n\n"
        written += (separator if written else "") + wrapped(link(text), bullet=bullet)
        before = bullet
    return written


class Links:
    """Turns the names that a page knows into links, and remembers which to define.

    Some reasons have the name of a status. It is the reason where it stands twice, and then the
    second time: PERMISSION_DENIED PERMISSION_DENIED.
    """

    def __init__(self, targets: dict[str, str], statuses: Collection[str] = ()) -> None:
        self._targets = targets
        self._statuses = statuses
        self._used: set[str] = set()

    def __call__(self, text: str) -> str:
        parts = re.split(r"(`[^`]*`|\[[^]]*\](?:\([^)]*\))?)", text)
        return "".join(part if at % 2 else self._linked(part) for at, part in enumerate(parts))

    def to(self, name: str) -> str:
        """A link to one of them."""
        if name not in self._targets:
            return name
        self._used.add(name)
        return f"[{name}]"

    def definitions(self) -> str:
        return "\n".join(f"[{name}]: {self._targets[name]}" for name in sorted(self._used))

    def _linked(self, text: str) -> str:
        """Links only names that nobody takes for words: with a hump, a dot or an underscore."""
        written, end, before = "", 0, ""
        for match in re.finditer(r"\b[A-Za-z]\w*(?:\.\w+)*", text):
            word = match.group()
            is_name = re.search(r"[a-z][A-Z]|\.|_|^[A-Z]{4,}$", word)
            if is_name and (word not in self._statuses or word == before):
                written += text[end : match.start()] + self.to(word)
            else:
                written += text[end : match.end()]
            end, before = match.end(), word
        return written + text[end:]
