"""Texts that are streamed: a file of lines or of JSON lines, or a data set of the Hugging Face hub.

A file is gone through once before a model loads, so that what is wrong with a line is said at once; then its documents
are read as they are needed. Of a file no more than a line is in memory.
"""

import hashlib
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path
from typing import Any

from attn_drift.data.json_lists import check_safe, file_stamp
from attn_drift.data.records import shortened

FIELD = "text"
SPLIT = "train"
LONGEST_LINE = 2**26

_HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?(:[\w.-]+)?")
_JSON_LINES = (".jsonl", ".ndjson")
_BOM = b"\xef\xbb\xbf"


@dataclass(frozen=True)
class TextFile:
    """A file of documents, as it was when `scan` read it: one a line, or one a line's field ``text`` in JSON lines.

    Attributes:
        path: where it is.
        sha256: digest of its content, in hexadecimal.
        n_documents: lines that are not blank.
        stamp: its size in bytes, and the time of its last change in nanoseconds.
    """

    path: Path
    sha256: str
    n_documents: int
    stamp: tuple[int, int]

    @classmethod
    def scan(cls, path: str | Path) -> "TextFile":
        """Reads a file once, and checks every line.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: a file without text, in binary or not in UTF-8, or a line that is no JSON object with a text.
        """
        path = Path(path)
        if not path.is_file():
            raise FileNotFoundError(f"there is no file {path.absolute()}")
        if path.suffix == ".json":
            raise ValueError(f"{path} is one JSON value; expected plain text, or .jsonl with an object a line")
        digest, n = hashlib.sha256(), 0
        with path.open("rb") as file:
            stamp = file_stamp(file)
            for _ in _documents(path, file, digest):
                n += 1
        if not n:
            raise ValueError(f"{path} has no text; expected a document in every line that is not blank")
        return cls(path, digest.hexdigest(), n, stamp)

    @property
    def name(self) -> str:
        return self.path.name

    @property
    def identity(self) -> dict[str, str]:
        """What makes it this text: its content, wherever it is."""
        kind = "jsonl" if self.path.suffix in _JSON_LINES else "plain"
        return {"sha256": self.sha256, "bytes": str(self.stamp[0]), "kind": kind}

    def documents(self) -> Iterator[str]:
        """Streams the documents.

        Raises:
            ValueError: the file has changed since it was scanned.
        """
        with self.path.open("rb") as file:
            self._check_unchanged(file)
            yield from _documents(self.path, file)
            self._check_unchanged(file)

    def _check_unchanged(self, file: BufferedReader) -> None:
        if file_stamp(file) != self.stamp:
            raise ValueError(f"{self.path} has changed since it was validated; read it anew")


@dataclass(frozen=True)
class HubTexts:
    """The field ``text`` of the split ``train`` of a data set on the Hugging Face hub, streamed.

    Attributes:
        name: ``owner/name``, or ``owner/name:configuration``.
    """

    name: str

    @property
    def identity(self) -> dict[str, str]:
        """What makes it this text: its name. The hub may change what is behind it."""
        return {"dataset": self.name, "split": SPLIT, "field": FIELD}

    def documents(self) -> Iterator[str]:
        """Streams the documents that are not blank.

        Raises:
            ImportError: the package ``datasets`` is not installed.
            OSError: the hub gives no such data set, or there is no network.
            ValueError: it has no texts in that field.
        """
        try:
            from datasets import load_dataset
        except ImportError as error:
            raise ImportError(
                f"there is no file {Path(self.name).absolute()}, and to read {self.name!r} from the Hugging Face hub "
                "the package datasets is needed: pip install datasets"
            ) from error
        name, _, configuration = self.name.partition(":")
        try:
            rows = load_dataset(name, configuration or None, split=SPLIT, streaming=True)
        except Exception as error:  # of many libraries, down to the network's
            raise OSError(
                f"cannot read the text {self.name!r}: there is no file {Path(self.name).absolute()}, and the Hugging "
                f"Face hub gave no such data set ({type(error).__name__}: {str(error)[:200]}). Check the name, or "
                "give a file: plain text, a document a line, or .jsonl"
            ) from error
        for i, row in enumerate(rows):
            text = row.get(FIELD)
            if not isinstance(text, str):
                raise ValueError(f"row {i} of {self.name} has no text in {FIELD!r}; its fields are {list(row)}")
            if text.strip():
                yield text


Corpus = TextFile | HubTexts


def read_corpus(source: str | Path) -> Corpus:
    """A file of texts, checked from end to end, or else a data set of the Hugging Face hub by its name.

    Raises:
        FileNotFoundError: there is no such file, and the hub has no data sets of such names.
        ImportError: a data set is named, and the package ``datasets`` is not installed.
        OSError: the hub gives no such data set, or there is no network.
        ValueError: there is no text, or not in the expected form; the message names the place.
    """
    path = Path(source).expanduser()
    named = _HUB_NAME.fullmatch(str(source)) and path.suffix not in (".txt", ".json", *_JSON_LINES)
    if path.exists() or not named:
        return TextFile.scan(path)
    texts = HubTexts(str(source))
    if next(texts.documents(), None) is None:
        raise ValueError(f"the data set {texts.name} has no text in the split {SPLIT!r}")
    return texts


def _documents(path: Path, file: BufferedReader, digest: Any = None) -> Iterator[str]:
    """The documents of an open file; what is read goes into the digest."""
    start, number = 0, 0
    while line := file.readline(LONGEST_LINE):
        if digest is not None:
            digest.update(line)
        number += 1
        if len(line) == LONGEST_LINE:
            raise ValueError(f"line {number} of {path} has more than {LONGEST_LINE} bytes; give a document a line")
        text = _decoded(path, line, start)
        start += len(line)
        if text:
            yield _field(path, number, text) if path.suffix in _JSON_LINES else text


def _decoded(path: Path, line: bytes, start: int) -> str:
    """A line that begins at a byte of the file, as text without white space around it."""
    if 0 in line:
        raise ValueError(f"{path} is no text: byte {start + line.index(0)} is 0; expected text in UTF-8")
    try:
        return line.removeprefix(b"" if start else _BOM).decode().strip()
    except UnicodeDecodeError as error:
        place = start + error.start + (0 if start or not line.startswith(_BOM) else len(_BOM))
        raise ValueError(f"{path} is not in UTF-8: {error.reason} at byte {place}; convert it to UTF-8") from error


def _field(path: Path, number: int, line: str) -> str:
    try:
        check_safe(line)
        record = json.loads(line)
    except ValueError as error:
        raise ValueError(f"line {number} of {path} is no JSON ({str(error)[:100]})") from error
    text = record.get(FIELD) if isinstance(record, dict) else None
    if not isinstance(text, str) or not text.strip():
        said = f"its fields are {shortened(repr(list(record)[:10]))}" if isinstance(record, dict) else "it is no object"
        raise ValueError(f"line {number} of {path} has no text in {FIELD!r}; {said}")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"line {number} of {path} has half a character (a surrogate) in {FIELD!r}") from error
    return text
