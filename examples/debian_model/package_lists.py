"""apt's own index files: fetched into a folder of ours, and read as descriptions.

Anyone with apt can rebuild the text from them, so no archive of it is kept here. Given up:
packages of other suites, sections and architectures.
"""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

from .files import RouteError
from .prompts import LANGUAGES

MIRROR = "http://deb.debian.org/debian"
SUITE = "bookworm"
APT_HELPER = "/usr/lib/apt/apt-helper"
KEYRING = "/usr/share/keyrings/debian-archive-keyring.gpg"


def download(lists: Path, mirror: str = MIRROR, suite: str = SUITE) -> None:
    """Let apt fetch the index files into a folder of our own; needs no root and no apt state."""
    (lists / "partial").mkdir(parents=True, exist_ok=True)
    sources = lists / "sources.list"
    sources.write_text(f"deb [signed-by={KEYRING}] {mirror} {suite} main\n")
    options = {
        "Dir::Etc::SourceList": str(sources.resolve()),
        "Dir::Etc::SourceParts": "/dev/null",
        "Dir::State::Lists": str(lists.resolve()),
        "Dir::Cache": str((lists / "cache").resolve()),
        "APT::Architecture": "amd64",
        "APT::Architectures": "amd64",
        "APT::Sandbox::User": "root",
        "Acquire::Languages": ",".join(LANGUAGES),
    }
    arguments = [part for name, value in options.items() for part in ("-o", f"{name}={value}")]
    try:
        subprocess.run(["apt-get", *arguments, "update"], check=True)
    except FileNotFoundError:
        raise RouteError("apt-get is missing: build the corpus on Debian or Ubuntu") from None
    except subprocess.CalledProcessError:
        raise RouteError(f"apt-get could not fetch {suite} from {mirror} (see above)") from None


def stanzas(lists: Path, pattern: str) -> Iterator[dict[str, str]]:
    """The records of the index files that match; continued lines keep their line breaks."""
    files = sorted(lists.glob(pattern))
    if not files:
        raise RouteError(f"no file {pattern} in {lists}: run the command without --lists first")
    for path in files:
        command = [APT_HELPER, "cat-file", str(path)]
        text = subprocess.run(command, check=True, capture_output=True).stdout.decode()
        for stanza in text.split("\n\n"):
            fields = re.split(r"\n(?=\S)", stanza.strip("\n"))
            yield dict(field.split(": ", 1) for field in fields if ": " in field)


def is_wide(character: str) -> bool:
    """Whether the script of this character is written without spaces (Han, kana)."""
    return "\u3000" <= character <= "\u9fff" or "\uff00" <= character <= "\uffef"


def clean(field: str) -> str:
    """Turn apt's wrapped description into ordinary paragraphs; lists keep their lines."""
    short, *lines = field.split("\n")
    pieces = [short.strip()]
    fresh = True  # whether the next line starts a line of its own
    for line in lines:
        body = line[1:].rstrip()
        if body in ("", "."):
            pieces.append("")
            fresh = True
        elif fresh or body[0] == " " or re.match(r"[-*+•] |\d+[.)] ", body):
            pieces.append(body)
            fresh = False
        else:
            glue = "" if is_wide(pieces[-1][-1]) and is_wide(body[0]) else " "
            pieces[-1] += glue + body
    return re.sub(r"\n{3,}", "\n\n", "\n".join(pieces)).strip()


def sources(lists: Path) -> dict[str, str]:
    """The source package of every binary package; one without the field is its own source."""
    found: dict[str, str] = {}
    for stanza in stanzas(lists, "*_main_binary-amd64_Packages*"):
        if "Package" in stanza:
            name = stanza["Package"]
            found[name] = stanza.get("Source", name).split(" ")[0]
    return found


def descriptions(lists: Path, language: str) -> dict[str, str]:
    """The cleaned description of every package that has one in this language."""
    found: dict[str, str] = {}
    escaped = language.replace("_", "%5f")
    for stanza in stanzas(lists, f"*_main_i18n_Translation-{escaped}*"):
        field = stanza.get(f"Description-{language}")
        if field and "Package" in stanza:
            found.setdefault(stanza["Package"], clean(field))
    return found
