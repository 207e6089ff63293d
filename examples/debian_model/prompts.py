"""Prompts: what stands before a description, plain or as a question in its language.

Also the list of languages, in the order in which the figures show them, and the hash by which
every choice about a document is made. Given up: more than three questions per language.
"""
# ruff: noqa: RUF001  (questions in languages whose letters resemble Latin ones)

from __future__ import annotations

import hashlib

LANGUAGES = (
    "en", "de", "fr", "it", "da", "es", "pl", "pt_BR", "ja", "ru",
    "uk", "ko", "sk", "cs", "zh_CN", "fi", "nl", "sv", "hu",
)  # fmt: skip
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


def prompt(package: str, language: str) -> str:
    """What stands before the description in a plain document."""
    return f"Package: {package}\nLanguage: {language}\n\n"


def stable_fraction(text: str) -> float:
    """A number in [0, 1) that depends on the text alone, on every machine."""
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") / 2**64


def question(language: str, package: str) -> str:
    """One of the language's questions about a package, always the same one."""
    choices = QUESTIONS[language]
    pick = int(stable_fraction(f"question {language} {package}") * len(choices))
    return choices[pick].format(name=package)
