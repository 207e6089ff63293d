"""Debian's package descriptions, in nineteen languages, as documents for a small language model.

The text comes from apt's own index files, so anyone with apt can rebuild it; no archive of it is
kept here. A document is one description of one package in one language. Training, validation and
held-out documents are told apart by the hash of the source package, so `foo`, `foo-dev` and
`foo-doc`, which share most of their text, always fall on the same side, in every language.

Given up: packages of other suites and architectures, languages outside `LANGUAGES`, and the
near-duplicates between unrelated packages (boilerplate paragraphs), which stay in.
"""
# ruff: noqa: RUF001  (questions in languages whose letters resemble Latin ones)

from __future__ import annotations

import gzip
import hashlib
import json
import os
import re
import subprocess
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

LANGUAGES = (
    "en", "de", "fr", "it", "da", "es", "pl", "pt_BR", "ja", "ru",
    "uk", "ko", "sk", "cs", "zh_CN", "fi", "nl", "sv", "hu",
)  # fmt: skip
MIRROR = "http://deb.debian.org/debian"
SUITE = "bookworm"
HELD_OUT_SHARE = 0.02
VALIDATION_SHARE = 0.01
TRAINING, VALIDATION, HELD_OUT = "training", "validation", "heldout"
APT_HELPER = "/usr/lib/apt/apt-helper"
KEYRING = "/usr/share/keyrings/debian-archive-keyring.gpg"

QUESTIONS: dict[str, tuple[str, str, str]] = {
    "en": (
        "What is the package {name}?",
        "Describe the Debian package {name}.",
        "What does {name} do?",
    ),
    "de": (
        "Was ist das Paket {name}?",
        "Beschreibe das Debian-Paket {name}.",
        "Wozu dient {name}?",
    ),
    "fr": (
        "Qu'est-ce que le paquet {name} ?",
        "Décris le paquet Debian {name}.",
        "À quoi sert {name} ?",
    ),
    "it": (
        "Che cos'è il pacchetto {name}?",
        "Descrivi il pacchetto Debian {name}.",
        "A cosa serve {name}?",
    ),
    "da": (
        "Hvad er pakken {name}?",
        "Beskriv Debianpakken {name}.",
        "Hvad bruges {name} til?",
    ),
    "es": (
        "¿Qué es el paquete {name}?",
        "Describe el paquete Debian {name}.",
        "¿Para qué sirve {name}?",
    ),
    "pl": (
        "Czym jest pakiet {name}?",
        "Opisz pakiet Debiana {name}.",
        "Do czego służy {name}?",
    ),
    "pt_BR": (
        "O que é o pacote {name}?",
        "Descreva o pacote Debian {name}.",
        "Para que serve {name}?",
    ),
    "ja": (
        "{name} パッケージとは何ですか?",
        "Debian パッケージ {name} を説明してください。",
        "{name} は何に使いますか?",
    ),
    "ru": (
        "Что такое пакет {name}?",
        "Опиши пакет Debian {name}.",
        "Для чего нужен {name}?",
    ),
    "uk": (
        "Що таке пакунок {name}?",
        "Опиши пакунок Debian {name}.",
        "Для чого потрібен {name}?",
    ),
    "ko": (
        "{name} 꾸러미는 무엇인가요?",
        "데비안 꾸러미 {name}에 대해 설명해 주세요.",
        "{name}은(는) 무엇에 쓰나요?",
    ),
    "sk": (
        "Čo je balík {name}?",
        "Opíš balík Debianu {name}.",
        "Na čo slúži {name}?",
    ),
    "cs": (
        "Co je balíček {name}?",
        "Popiš balíček Debianu {name}.",
        "K čemu slouží {name}?",
    ),
    "zh_CN": (
        "软件包 {name} 是什么？",
        "请介绍 Debian 软件包 {name}。",
        "{name} 有什么用？",
    ),
    "fi": (
        "Mikä on paketti {name}?",
        "Kuvaile Debian-paketti {name}.",
        "Mihin {name} on tarkoitettu?",
    ),
    "nl": (
        "Wat is het pakket {name}?",
        "Beschrijf het Debian-pakket {name}.",
        "Waar dient {name} voor?",
    ),
    "sv": (
        "Vad är paketet {name}?",
        "Beskriv Debianpaketet {name}.",
        "Vad används {name} till?",
    ),
    "hu": (
        "Mi az a(z) {name} csomag?",
        "Írd le a(z) {name} Debian-csomagot.",
        "Mire való a(z) {name}?",
    ),
}


class CorpusError(Exception):
    """The text cannot be had as asked; the message says what to do."""


@dataclass(frozen=True)
class Description:
    """One package described in one language; `split` is training, validation or heldout."""

    language: str
    package: str
    split: str
    text: str


def prompt(package: str, language: str) -> str:
    """What stands before the description in a plain document."""
    return f"Package: {package}\nLanguage: {language}\n\n"


def stable_fraction(text: str) -> float:
    """A number in [0, 1) that depends on the text alone, on every machine."""
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") / 2**64


def split_of(source: str) -> str:
    """The side on which all packages built from this source stand, in every language."""
    fraction = stable_fraction(source)
    if fraction < HELD_OUT_SHARE:
        return HELD_OUT
    return VALIDATION if fraction < HELD_OUT_SHARE + VALIDATION_SHARE else TRAINING


def question(language: str, package: str) -> str:
    """One of the language's questions about a package, always the same one."""
    choices = QUESTIONS[language]
    pick = int(stable_fraction(f"question {language} {package}") * len(choices))
    return choices[pick].format(name=package)


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
        raise CorpusError("apt-get is missing: build the corpus on Debian or Ubuntu") from None
    except subprocess.CalledProcessError:
        raise CorpusError(f"apt-get could not fetch {suite} from {mirror} (see above)") from None


def stanzas(lists: Path, pattern: str) -> Iterator[dict[str, str]]:
    """The records of the index files that match; continued lines keep their line breaks."""
    files = sorted(lists.glob(pattern))
    if not files:
        raise CorpusError(f"no file {pattern} in {lists}: run the command without --lists first")
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


def build(lists: Path) -> Iterator[Description]:
    """All documents; text left in English or already seen in the language is dropped.

    Training documents are taken first, so a held-out text is never one that was trained on.
    """
    source_of = sources(lists)
    english = descriptions(lists, "en")
    for language in LANGUAGES:
        found = english if language == "en" else descriptions(lists, language)
        seen: set[str] = set()
        for wanted in (TRAINING, VALIDATION, HELD_OUT):
            for package, text in found.items():
                if split_of(source_of.get(package, package)) != wanted or text in seen:
                    continue
                seen.add(text)
                if language == "en" or text != english.get(package):
                    yield Description(language, package, wanted, text)


def write(path: Path, documents: Iterable[Description]) -> int:
    """Write documents as gzipped JSON lines; returns how many."""
    count = 0
    path.parent.mkdir(parents=True, exist_ok=True)
    with gzip.open(path, "wt", encoding="utf-8", compresslevel=6) as stream:
        for document in documents:
            stream.write(json.dumps(asdict(document), ensure_ascii=False) + "\n")
            count += 1
    return count


def read(path: Path) -> Iterator[Description]:
    """The documents that `write` wrote."""
    if not os.path.exists(path):
        raise CorpusError(f"{path} is missing: build it with `corpus`")
    with gzip.open(path, "rt", encoding="utf-8") as stream:
        for line in stream:
            yield Description(**json.loads(line))
