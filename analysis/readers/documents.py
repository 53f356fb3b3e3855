"""Documents: XML, SVG, HTML, PDF and notebooks, as the words and numbers that a reader of them sees."""

from __future__ import annotations

import base64
import binascii
import hashlib
import io
import json
import re
from html.parser import HTMLParser
from typing import Any
from xml.etree import ElementTree

from prefect_biomed.analysis.comparators import Content
from prefect_biomed.analysis.readers.pictures import picture_parts
from prefect_biomed.analysis.readers.source import (
    Parts,
    Source,
    Unreadable,
    json_of,
    library,
    refuse_entities,
    text_of,
)

__all__ = ["collect_xml", "fits_html", "fits_xml", "html", "notebook", "pdf", "xml"]

_MAX_PAGES = 2000
_DATA_URI = re.compile(r"data:image/[\w.+-]+;base64,([A-Za-z0-9+/=\s]+)")
_REFERENCE = re.compile(r"(?:url\()?#([\w.:-]+)\)?")
# Attributes that name things within the document and are drawn anew each time.
_NAMES = frozenset(
    {"id", "for", "name", "clip-path", "href", "aria-labelledby", "aria-controls", "data-target", "mask"}
)


def fits_xml(source: Source) -> bool:
    """Tell whether a file is XML, SVG included.

    Args:
        source: The file.

    Returns:
        Whether it is.
    """
    start = source.head.lstrip(b"\xef\xbb\xbf \t\r\n")
    return start.startswith((b"<?xml", b"<svg")) or (source.named(".xml", ".svg") and start.startswith(b"<"))


def xml(source: Source) -> Content:
    """Read XML: texts and attributes by path, numbers in them apart."""
    if text_of(source) is None:
        raise Unreadable("it holds what XML does not")
    parts = Parts(source.volatile)
    content = source.path.read_bytes()
    is_picture = collect_xml(content, parts, "", is_drawing=b"<svg" in content[:4096])
    return parts.content("SVG" if is_picture else "XML")


def collect_xml(content: bytes, parts: Parts, prefix: str, *, is_drawing: bool = False) -> bool:
    """Collect what an XML document says.

    Args:
        content: The document.
        parts: What is filled.
        prefix: What its paths begin with.
        is_drawing: Whether it is SVG, whose names of things are numbered by where they stand.

    Returns:
        Whether it is SVG.

    Raises:
        Unreadable: It defines entities or is no XML.
    """
    refuse_entities(io.BytesIO(content).read)
    names: dict[str, str] = {}
    stack: list[tuple[str, dict[str, int]]] = [(prefix, {})]
    try:
        events = ElementTree.iterparse(io.BytesIO(content), ("start", "end"))
        for event, element in events:
            tag = _local(element.tag)
            if event == "start":
                above, counts = stack[-1]
                counts[tag] = counts.get(tag, 0) + 1
                stack.append((f"{above}/{tag}[{counts[tag]}]", {}))
                continue
            path, _ = stack.pop()
            is_drawing = is_drawing or tag == "svg"
            kind = re.sub(r"\[\d+\]", "", path)
            for key, value in element.attrib.items():
                _attribute(parts, path, kind, _local(key), value, names if is_drawing else None)
            for label, text in ((path, element.text), (f"{path} (after)", element.tail)):
                if text and text.strip():
                    parts.text(label, text, kind, kind)
            element.clear()
    except ElementTree.ParseError as error:
        raise Unreadable(f"it is no XML: {error}") from None
    return is_drawing


def _local(name: str) -> str:
    return name.rpartition("}")[2]


def _attribute(parts: Parts, path: str, kind: str, key: str, value: str, names: dict[str, str] | None) -> None:
    label, field = f"{path} @{key}", f"{kind}/{key}"
    if match := _DATA_URI.match(value):
        _embedded(parts, label, match.group(1))
        return
    if names is not None:
        if key in ("id", "name"):
            value = names.setdefault(value, f"name-{len(names)}")
        else:
            value = _REFERENCE.sub(lambda m: names.setdefault(m.group(1), f"name-{len(names)}"), value)
        if value.startswith("name-"):
            parts.word(label, value)
            return
    parts.text(label, value, f"{kind} @{key}", field)


def _embedded(parts: Parts, label: str, text: str) -> None:
    """A picture within a document is looked into like any other."""
    try:
        content = base64.b64decode("".join(text.split()), validate=True)
    except binascii.Error:
        parts.digests[label] = hashlib.sha256(text.encode()).hexdigest()
        return
    try:
        parts.nested(label, picture_parts(io.BytesIO(content), parts.volatile).content("image"))
    except (ValueError, OSError, SyntaxError):
        parts.digests[label] = hashlib.sha256(content).hexdigest()


def fits_html(source: Source) -> bool:
    """Tell whether a file is HTML.

    Args:
        source: The file.

    Returns:
        Whether it is.
    """
    start = source.head.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    return source.named(".html", ".htm", ".xhtml") or start.startswith((b"<!doctype html", b"<html"))


class _Page(HTMLParser):
    """Numbers the texts and attributes of a page as they come."""

    def __init__(self, parts: Parts) -> None:
        super().__init__(convert_charrefs=True)
        self._parts = parts
        self._names: dict[str, str] = {}
        self._count = 0
        self._tag = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._count += 1
        self._tag = tag
        for key, value in attrs:
            label = f"element {self._count} {tag} @{key}"
            if value and (match := _DATA_URI.match(value)):
                _embedded(self._parts, label, match.group(1))
            elif value and key in _NAMES:
                name = value.lstrip("#")
                self._parts.word(label, self._names.setdefault(name, f"name-{len(self._names)}"))
            else:
                self._parts.text(label, value or "", f"@{key}")

    def handle_data(self, data: str) -> None:
        for number, line in enumerate(data.splitlines()):
            if line.strip():
                self._count += 1
                label = f"element {self._count} in {self._tag or 'page'}" + (f", line {number + 1}" if number else "")
                self._parts.text(label, line, "numbers")


def html(source: Source) -> Content:
    """Read HTML: texts, attributes and embedded pictures in their order; names of elements by where they stand."""
    text = text_of(source)
    if text is None:
        raise Unreadable("it holds what HTML does not")
    parts = Parts(source.volatile)
    page = _Page(parts)
    page.feed(text)
    page.close()
    return parts.content("HTML")


def pdf(source: Source) -> Content:
    """Read PDF: the text of each page with its numbers, and the pictures on it; dates and identifiers do not count."""
    pypdf = library("pypdf", "pypdf")
    parts = Parts(source.volatile)
    document = pypdf.PdfReader(source.path, strict=False)
    pages = document.pages
    if len(pages) > _MAX_PAGES:
        raise Unreadable(f"it has more than {_MAX_PAGES} pages")
    parts.word("pages", str(len(pages)))
    for key, value in (document.metadata or {}).items():
        name = str(key).lstrip("/")
        if name not in ("CreationDate", "ModDate"):
            parts.text(f"document {name}", str(value), "document", name)
    for number, page in enumerate(pages, start=1):
        parts.text(f"page {number} size", " ".join(str(edge) for edge in page.mediabox), "sizes of pages")
        for line, text in enumerate((page.extract_text() or "").splitlines(), start=1):
            parts.text(f"page {number}, line {line}", text, "numbers")
        contents = page.get_contents()
        drawing = contents.get_data().decode("latin-1") if contents is not None else ""
        for line, text in enumerate(drawing.splitlines(), start=1):
            parts.text(f"page {number}, drawing {line}", text, "drawing")
        for name, picture in _pictures(page):
            parts.digests[f"page {number}, picture {name}"] = hashlib.sha256(picture).hexdigest()
    return parts.content("PDF")


def _pictures(page: Any) -> list[tuple[str, bytes]]:
    resources = page.get("/Resources")
    objects: Any = resources.get_object().get("/XObject", {}) if resources is not None else {}
    found = []
    for name, reference in objects.get_object().items() if objects else ():
        item = reference.get_object()
        if item.get("/Subtype") == "/Image":
            found.append((str(name), item.get_data()))
    return found


def notebook(source: Source) -> Content:
    """Read a Jupyter notebook: sources and outputs of cells; counts of execution and identifiers are left out."""
    text = text_of(source)
    document = json_of(text or "")
    if not isinstance(document, dict) or not isinstance(document.get("cells"), list):
        raise Unreadable("it has no cells")
    parts = Parts(source.volatile)
    metadata = document.get("metadata", {})
    for key in ("kernelspec", "language_info"):
        parts.environment[key] = json.dumps(metadata.get(key), sort_keys=True)
    for number, cell in enumerate(document["cells"], start=1):
        label = f"cell {number}"
        parts.word(f"{label} kind", str(cell.get("cell_type")))
        for line, said in enumerate(_lines(cell.get("source"))):
            parts.word(f"{label} source, line {line + 1}", said)
        for position, output in enumerate(cell.get("outputs", []), start=1):
            _output(parts, f"{label} output {position}", output)
    return parts.content("notebook")


def _lines(value: Any) -> list[str]:
    return ("".join(value) if isinstance(value, list) else str(value or "")).splitlines()


def _output(parts: Parts, label: str, output: dict[str, Any]) -> None:
    bundle = output.get("data", {}) | {key: output[key] for key in ("text", "ename", "evalue") if key in output}
    for kind, value in bundle.items():
        if kind.startswith("image/") and kind != "image/svg+xml":
            _embedded(parts, f"{label} {kind}", "".join(_lines(value)))
        elif kind == "text/html" and "text/plain" in bundle:
            continue  # the same as the text, with markup
        else:
            for line, said in enumerate(_lines(value)):
                parts.text(f"{label} {kind}, line {line + 1}", said, "outputs")
