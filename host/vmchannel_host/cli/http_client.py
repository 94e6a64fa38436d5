# SPDX-License-Identifier: LGPL-2.1-or-later
"""vmchannelctl's end of the admin API: HTTP over the unix socket with the standard library. Blocking."""

from __future__ import annotations

import http.client
import json
import socket
from collections.abc import Iterator, Mapping
from typing import Final, cast
from urllib.parse import quote, urlencode

MAX_LINE: Final = 1 << 20
"""Longest line of an event stream, in bytes."""


class CliError(Exception):
    """Something that ends the command; `exit_code` says how (man vmchannelctl)."""

    def __init__(self, exit_code: int, text: str) -> None:
        super().__init__(text)
        self.exit_code = exit_code


class NotReached(CliError):
    """The daemon did not answer; nothing was asked of it."""

    def __init__(self, text: str) -> None:
        super().__init__(4, text)


class BrokenOff(CliError):
    """The daemon was reached and did not finish its answer: the outcome is unknown."""

    def __init__(self, text: str) -> None:
        super().__init__(1, text)


class Doc:
    """A JSON object from the daemon; what is absent or of another type reads as empty.

    A newer daemon may send more and an older one less: neither stops the tool.
    """

    def __init__(self, value: object) -> None:
        self.raw: Final = cast("Mapping[str, object]", value if isinstance(value, dict) else {})

    def text(self, key: str) -> str:
        """A text, "" when absent."""
        value = self.raw.get(key)
        return value if isinstance(value, str) else ""

    def number(self, key: str) -> float | None:
        """A number."""
        value = self.raw.get(key)
        return value if isinstance(value, (int, float)) and not isinstance(value, bool) else None

    def count(self, key: str) -> int:
        """A whole number, 0 when absent."""
        return int(self.number(key) or 0)

    def flag(self, key: str) -> bool:
        """True only for a true."""
        return self.raw.get(key) is True

    def texts(self, key: str) -> list[str]:
        """The texts of a list."""
        return [item for item in _items(self.raw.get(key)) if isinstance(item, str)]

    def docs(self, key: str) -> list[Doc]:
        """The objects of a list."""
        return docs(self.raw.get(key))


def docs(value: object) -> list[Doc]:
    """The objects of a JSON list."""
    return [Doc(item) for item in _items(value)]


class Answer:
    """One answer: its HTTP status and its JSON."""

    def __init__(self, status: int, value: object) -> None:
        self.status: Final = status
        self.value: Final = value

    @property
    def doc(self) -> Doc:
        """The answer as an object."""
        return Doc(self.value)

    def checked(self) -> object:
        """The JSON of a success.

        Raises:
            CliError: the daemon refused; its reason and remedy are the text.
        """
        if self.status == 200:
            return self.value
        code = {400: 2, 403: 3}.get(self.status, 1)
        raise CliError(code, told(self.doc) or f"the daemon answered {self.status}")


def told(doc: Doc) -> str:
    """Reason and remedy of an error, as one text."""
    remedy = doc.text("remedy")
    return doc.text("reason") + (f"\nremedy: {remedy}" if remedy else "")


class AdminClient:
    """Asks the daemon; one connection for each question."""

    def __init__(self, path: str, *, timeout_s: float = 30.0) -> None:
        self._path = path
        self._timeout_s = timeout_s

    def get(
        self, path: str, query: Mapping[str, str] | None = None, *, timeout_s: float | None = None
    ) -> Answer:
        """Ask and wait for the whole answer.

        Raises:
            NotReached: nothing listens there, or one may not connect.
            BrokenOff: the answer did not come whole within `timeout_s` seconds.
        """
        target = quote(path) + ("?" + urlencode(query) if query else "")
        return self._whole("GET", target, None, timeout_s or self._timeout_s)

    def _whole(self, method: str, target: str, body: bytes | None, timeout_s: float) -> Answer:
        connection, response = self._request(method, target, body, timeout_s)
        try:
            return Answer(response.status, _parse(response.read()))
        except (OSError, http.client.HTTPException) as error:
            raise BrokenOff(f"{self._path}: the daemon broke off: {error}") from error
        finally:
            connection.close()

    def post(self, path: str, body: object, *, timeout_s: float | None = None) -> Answer:
        """Order and wait for the whole answer. Raises as `get`; after `BrokenOff` the outcome is unknown."""
        data = json.dumps(body).encode("ascii")
        return self._whole("POST", quote(path), data, timeout_s or self._timeout_s)

    def stream(
        self, method: str, path: str, body: object, *, timeout_s: float | None
    ) -> Iterator[tuple[str, object]]:
        """Ask for server-sent events; yields (kind, JSON).

        An answer that is no stream comes as ("refused", `Answer`).

        Raises:
            NotReached: as `get`.
            BrokenOff: the connection ended in an error, or nothing came for `timeout_s` seconds.
        """
        data = None if body is None else json.dumps(body).encode("ascii")
        connection, response = self._request(method, path, data, timeout_s)
        try:
            if response.headers.get_content_type() != "text/event-stream":
                yield "refused", Answer(response.status, _parse(response.read()))
                return
            yield from _events(response)
        except (OSError, http.client.HTTPException) as error:
            raise BrokenOff(f"{self._path}: the daemon broke off: {error}") from error
        finally:
            connection.close()

    def _request(
        self, method: str, target: str, body: bytes | None, timeout_s: float | None
    ) -> tuple[http.client.HTTPConnection, http.client.HTTPResponse]:
        connection = _UnixConnection(self._path, timeout_s)
        headers = {"Accept": "text/event-stream, application/json", "Connection": "close"}
        if body is not None:
            headers["Content-Type"] = "application/json"
        try:
            try:
                connection.connect()
            except OSError as error:
                raise NotReached(_not_reached(self._path, error)) from error
            try:
                connection.request(method, target, body, headers)
                return connection, connection.getresponse()
            except (OSError, http.client.HTTPException) as error:
                raise BrokenOff(f"{self._path}: no answer from the daemon: {error}") from error
        except CliError:
            connection.close()
            raise


class _UnixConnection(http.client.HTTPConnection):
    """HTTP over a unix socket."""

    def __init__(self, path: str, timeout_s: float | None) -> None:
        super().__init__("localhost", timeout=timeout_s)
        self._socket_path = path

    def connect(self) -> None:
        """(`http.client.HTTPConnection`)"""
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(self.timeout)
        self.sock.connect(self._socket_path)


def _not_reached(path: str, error: OSError) -> str:
    text = f"{path}: the daemon is not reached: {error.strerror or error}"
    match error:
        case PermissionError():
            return text + "\nremedy: be root, or a member of group vmchannel"
        case FileNotFoundError() | ConnectionRefusedError():
            return text + "\nremedy: systemctl start vmchanneld, or name its socket with --socket"
        case _:
            return text


def _parse(data: bytes) -> object:
    try:
        return cast("object", json.loads(data))
    except (ValueError, RecursionError) as error:
        raise http.client.HTTPException(f"not JSON: {error}") from error


def _events(response: http.client.HTTPResponse) -> Iterator[tuple[str, object]]:
    kind, data = "", b""
    while True:
        line = response.readline(MAX_LINE)
        if not line:
            return
        line = line.rstrip(b"\r\n")
        if not line:
            if data:
                yield kind, _parse(data)
            kind, data = "", b""
        elif line.startswith(b"event: "):
            kind = line[7:].decode("ascii", "replace")
        elif line.startswith(b"data: "):
            data = line[6:]


def _items(value: object) -> list[object]:
    return cast("list[object]", value) if isinstance(value, list) else []
