"""Reads a page like a browser, as far as the tests need it."""

from __future__ import annotations

import base64
import csv
import io
import re
from html.parser import HTMLParser

VOID = {"meta", "link", "img", "br", "hr", "input", "circle", "rect", "path"}


class Page(HTMLParser):
    """The elements that a browser finds in a page, as far as the tests need them."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.headings: list[tuple[int, str]] = []
        self.open: list[str] = []
        self.text = ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if re.fullmatch("h[1-6]", tag):
            self.headings.append((int(tag[1]), ""))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self.open.pop() == tag, f"</{tag}> closes something else"

    def handle_data(self, data: str) -> None:
        if self.open and re.fullmatch("h[1-6]", self.open[-1]):
            level, text = self.headings[-1]
            self.headings[-1] = level, text + data
        if not self.open or self.open[-1] != "style":
            self.text += data

    @property
    def csvs(self) -> dict[str, list[list[str]]]:
        """The CSV files of the page by file name; a name that occurs again gets a number."""
        found: dict[str, list[list[str]]] = {}
        for tag, attributes in self.tags:
            if tag == "a" and "download" in attributes:
                data = base64.b64decode(str(attributes["href"]).partition("base64,")[2]).decode()
                name = str(attributes["download"])
                while name in found:
                    name += "+"
                found[name] = list(csv.reader(io.StringIO(data)))
        return found
