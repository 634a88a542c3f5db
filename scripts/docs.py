"""The pages that are made, not written.

    python -m scripts.docs    write docs/api.md and docs/errors.md

The reference comes from the comments of the protos, the errors from service/reasons.py, and who
raises what from the "Raises" lists of the protos.
"""

import re
from collections import defaultdict
from collections.abc import Iterable
from string import Formatter

from scripts import contract
from scripts.contract import Field, File, Rpc, Type
from scripts.markdown import Links, anchor, prose, wrapped
from scripts.protos import ROOT
from service import errors
from service.reasons import REASONS, Reason

API = ROOT / "docs" / "api.md"
ERRORS = ROOT / "docs" / "errors.md"

# By their numbers in the enums of Access.
SCOPES = ("", "read", "write", "admin", "verify-password")
ACTORS = (
    "",
    "with an actor (`act-as`) or as the system (`system`)",
    "as the system only (`system`), without an actor",
    "with or without an actor",
)

ABOUT_API = """\
# The API, call by call

Every RPC of `parley.v1` with its request and response, every type, every limit. Made by `make docs`
from the comments of [protos/parley/v1](../protos/parley/v1): change it there. Beside it:
[errors.md](errors.md) says what each reason means, [access.md](access.md) who may call what, and
[grpcurl.md](grpcurl.md) has a line to paste for each RPC.

A field is *required* if a call without it is INVALID_ARGUMENT, *output only* if a request's is
ignored, *set once* if it cannot be changed later. One that *may be absent* tells 0, false and empty
apart from not given. Of the fields after "one of", one at most is set.
"""

ABOUT_ERRORS = """\
# Errors, reason by reason

Made by `make docs` from [service/reasons.py](../service/reasons.py) and the comments of the protos:
change them there.

Every error has a gRPC status and, in its details, one `google.rpc.ErrorInfo` with the domain
`parley.v1`, a `reason` that never changes, and `metadata` with what a program may need. Branch on
the reason; the message is for people. With it come, as they fit: `BadRequest` with every field that
is wrong (the first 20), `ResourceInfo` with the record concerned, `PreconditionFailure`,
`QuotaFailure`, and `RetryInfo` with the seconds after which the very same call makes sense.

An error without these details was not made by Parley: by gRPC's library in your process
(UNAVAILABLE while nothing listens, DEADLINE_EXCEEDED, CANCELLED, RESOURCE_EXHAUSTED for a request
over 4 MiB), or by a proxy between.

## By status
"""


def main() -> None:
    API.write_text(api())
    ERRORS.write_text(catalogue())


def api() -> str:
    """docs/api.md."""
    files = contract.files().values()
    link = Links(_targets(api="", reasons="errors.md"), contract.STATUSES)
    common, *chapters = [_common(link), *(_chapter(file, link) for file in files if file.services)]
    options = [_type(each, link) for each in contract.files()["access"].types.values()]
    index = [
        wrapped(f"**{link.to(service.name)}**: {_names(service.rpcs, link)}", bullet="- ")
        for service in contract.services()
    ]
    parts = [ABOUT_API, *index, "", common, *options, *chapters, link.definitions()]
    return "\n".join(parts) + "\n"


def _names(rpcs: list[Rpc], link: Links) -> str:
    return ", ".join(link.to(rpc.name) for rpc in rpcs)


def _targets(*, api: str, reasons: str) -> dict[str, str]:
    """What can be linked to, and where: the pages are named as one of them sees them."""
    found = {reason: f"{reasons}#{anchor(reason)}" for reason in REASONS}
    found["access.proto"] = f"{api}#what-all-rpcs-have-in-common"
    headed = [service.name for service in contract.services()]
    headed += [rpc.name for rpc in contract.rpcs()]
    for file in contract.files().values():
        headed += file.types
        for name, each in file.types.items():
            found |= {f"{name}.{field.name}": f"{api}#{anchor(name)}" for field in each.fields}
    return found | {name: f"{api}#{anchor(name)}" for name in headed}


def _common(link: Links) -> str:
    """The head of access.proto, each of its CAPITALISED titles a heading."""
    introduction, *rest = re.split(
        r"\n\n(?=[A-Z_ ]+\n  )", contract.files()["access"].comment.strip()
    )
    written = f"## What all RPCs have in common\n\n{prose(introduction, link)}\n"
    for section in rest:
        title, _, text = section.partition("\n")
        written += f"\n### {title.capitalize().replace('_', ' ')}\n\n{prose(text, link)}\n"
    return written


def _chapter(file: File, link: Links) -> str:
    """A file of the contract: its services, then what is no request or response of theirs."""
    written, shown = "", set()
    for service in file.services:
        written += f"## {service.name}\n\n{prose(service.comment, link)}\n\n"
        for rpc in service.rpcs:
            written += _rpc(rpc, file, link)
            shown |= {rpc.request, rpc.response}
    written += f"### Types of {service.name}\n\n"
    written += "\n".join(
        _type(each, link)
        for name, each in file.types.items()
        if name not in shown and name.partition(".")[0] not in shown
    )
    return written


def _rpc(rpc: Rpc, file: File, link: Links) -> str:
    streamed = ["", "Requests stream in. "][rpc.streams[0]]
    streamed += ["", "Responses stream out. "][rpc.streams[1]]
    access = f"Scope `{SCOPES[rpc.access.scope]}`, {ACTORS[rpc.access.actor]}. {streamed}"
    written = f"### {rpc.name}\n\n{prose(rpc.comment, link)}\n\n{wrapped(access)}\n\n"
    for name in (rpc.request, rpc.response):
        written += _type(file.types[name], link) + "\n"
    inner = (
        each for each in file.types if each.startswith((f"{rpc.request}.", f"{rpc.response}."))
    )
    return written + "".join(_type(file.types[name], link) + "\n" for name in inner)


def _type(each: Type, link: Links) -> str:
    """A heading, the comment, and a point for each field or value."""
    written = f"#### {each.name}\n\n{prose(each.comment, link)}\n\n"
    begun = set()
    for field in each.fields:
        if field.oneof and field.oneof not in begun:
            begun.add(field.oneof)
            opening = f"one of `{field.oneof}`: {link(_flat(each.oneofs[field.oneof]))}"
            written += wrapped(opening, bullet="- ") + "\n"
        written += _field(field, link) + "\n"
    for name, number, comment in each.values:
        written += wrapped(f"`{name}` = {number}: {link(_flat(comment))}", bullet="- ") + "\n"
    return written


def _field(field: Field, link: Links) -> str:
    repeated, _, name = field.type.rpartition(" ")
    kind = " ".join([*repeated.split(), link.to(name)])
    traits = "".join(f", *{trait}*" for trait in field.traits)
    text = f"`{field.name}` {kind}{traits}: {link(_flat(field.comment))}"
    return wrapped(text, indent="  " if field.oneof else "", bullet="- ")


def _flat(comment: str) -> str:
    return " ".join(comment.split())


def catalogue() -> str:
    """docs/errors.md."""
    link = Links(_targets(api="api.md", reasons=""), contract.STATUSES)
    of_status = defaultdict(list)
    for name, reason in REASONS.items():
        for status in reason.statuses:
            of_status[status].append(link.to(name))
    statuses = [
        wrapped(f"**{kind.status}**: {_flat(kind.__doc__ or '')} "
                f"{', '.join(of_status[kind.status])}.", bullet="- ")
        for kind in sorted(errors.ParleyError.__subclasses__(), key=lambda kind: kind.status)
    ]  # fmt: skip
    reasons = [_reason(name, reason, link) for name, reason in REASONS.items()]
    return "\n".join([ABOUT_ERRORS, *statuses, "", *reasons, link.definitions()]) + "\n"


def _reason(name: str, reason: Reason, link: Links) -> str:
    keys = sorted({key for _, key, _, _ in Formatter().parse(reason.says) if key})
    metadata = f"; in the metadata: {', '.join(f'`{key}`' for key in keys)}" if keys else ""
    said = re.sub(r"{(\w+)}", r"*\1*", reason.says)
    paragraphs = [
        f"## {name}",
        wrapped(f"{reason.status}{metadata}."),
        wrapped(said, bullet="> ").replace("\n  ", "\n> "),
        wrapped(link(reason.means)),
        wrapped(f"**What to do.** {link(reason.remedy)}"),
        wrapped(f"**Raised by** {raised_by(name, link)}."),
    ]
    return "\n\n".join(paragraphs) + "\n"


def raised_by(name: str, link: Links) -> str:
    """Which RPCs raise a reason, as the protos say: any, those of a service, or those listed."""

    def has(causes: Iterable[contract.Cause]) -> bool:
        return any(reason == name for _, reason in causes)

    listed = _names([rpc for rpc in contract.rpcs() if has(contract.causes_of(rpc))], link)
    if has(contract.common_causes()):
        return ", among them ".join(filter(None, ["any RPC", listed]))
    if "INVALID_ARGUMENT" in REASONS[name].statuses:
        return ", among them ".join(filter(None, ["any RPC whose request breaks the rule", listed]))
    whole = [each.name for each in contract.services() if has(contract.causes(each.comment))]
    some = " and ".join(f"RPCs of {link.to(service)}" for service in whole)
    return "; by ".join(filter(None, [some, listed]))


if __name__ == "__main__":
    main()
