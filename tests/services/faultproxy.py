"""A reverse proxy that injects faults between a client and an HTTP server.

    with FaultProxy("127.0.0.1", 7480) as proxy:
        proxy.rule(method="PUT", path="partNumber=3", times=2, action="status", status=503)

Actions and their options:
    status    answer `status` with an S3 error `code`, and `retry_after` seconds if given
    reset     break the connection after `after` bytes of the response's body
    reset_request   break it after `after` bytes of the request's body
    swallow   pass the request on, then break the connection instead of answering
    truncate  end the connection cleanly after `after` bytes of the response's body
    delay     wait `seconds` before passing the request on
    stall     wait `seconds` in the middle of the response's body
    corrupt   change the byte at `at` of the response's body
    rate      let the request's body through at `bytes_per_second`
    ignore    take the headers If-Match and If-None-Match out of the request
"""

from __future__ import annotations

import asyncio
import contextlib
import re
import socket
import struct
import threading
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

_READ_BYTES = 65536
Headers = dict[bytes, bytes]


@dataclass
class Rule:
    """What to do to the next `times` requests that match, after letting `skip` pass.

    `range` is sought in the header of that name: `bytes=0-` is the first part of a file.
    """

    method: str
    path: str
    range: str
    times: int
    skip: int
    action: str
    options: dict[str, Any]
    hits: int = 0

    def takes(self, method: str, path: str, range_: str) -> bool:
        return bool(
            re.fullmatch(self.method, method)
            and re.search(self.path, path)
            and re.search(self.range, range_)
        )


@dataclass
class FaultProxy:
    host: str
    port: int
    rules: list[Rule] = field(default_factory=list)
    log: list[tuple[str, str, str]] = field(default_factory=list)

    def __enter__(self) -> FaultProxy:
        self._lock = threading.Lock()
        # asyncio itself keeps no reference to a connection that waits.
        self._serving: set[Any] = set()
        started = threading.Event()
        self._loop = asyncio.new_event_loop()

        async def start() -> None:
            server = await asyncio.start_server(self._serve, "127.0.0.1", 0, limit=1 << 20)
            self.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
            started.set()

        def run() -> None:
            asyncio.set_event_loop(self._loop)
            self._started = self._loop.create_task(start())
            self._loop.run_forever()

        threading.Thread(target=run, daemon=True).start()
        assert started.wait(5)
        return self

    def __exit__(self, *_: object) -> None:
        async def end() -> None:
            open_connections = asyncio.all_tasks() - {asyncio.current_task()}
            for task in open_connections:
                task.cancel()
            await asyncio.gather(*open_connections, return_exceptions=True)
            self._loop.stop()

        asyncio.run_coroutine_threadsafe(end(), self._loop)

    def rule(
        self,
        *,
        action: str,
        method: str = ".*",
        path: str = ".*",
        range: str = "",
        times: int = 1,
        skip: int = 0,
        **options: Any,
    ) -> Rule:
        added = Rule(method, path, range, times, skip, action, options)
        with self._lock:
            self.rules.append(added)
        return added

    def clear(self) -> None:
        with self._lock:
            self.rules.clear()

    def _pick(self, method: str, path: str, range_: str) -> Rule | None:
        with self._lock:
            for rule in self.rules:
                if rule.times > 0 and rule.takes(method, path, range_):
                    if rule.skip > 0:
                        rule.skip -= 1
                        continue
                    rule.times -= 1
                    rule.hits += 1
                    return rule
        return None

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        there: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None
        self._serving.add(task := asyncio.current_task())
        try:
            while True:
                line, headers, raw = await _head(reader)
                method, path = (word.decode() for word in line.split(b" ")[:2])
                rule = self._pick(method, path, headers.get(b"range", b"").decode())
                self.log.append((method, path, rule.action if rule else ""))
                if headers.get(b"expect", b"").lower() == b"100-continue":
                    writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
                    raw = re.sub(rb"(?i)\r\nexpect: 100-continue", b"", raw)
                if rule and rule.action == "ignore":
                    raw = re.sub(rb"(?i)\r\nif-(none-)?match:[^\r]*", b"", raw)
                if rule and rule.action == "delay":
                    await asyncio.sleep(rule.options["seconds"])
                if rule and rule.action == "status":
                    async for _ in _body(reader, headers):
                        pass
                    writer.write(_error(rule.options, has_body=method != "HEAD"))
                    await writer.drain()
                    continue
                if there is None or there[1].is_closing():
                    there = await asyncio.open_connection(self.host, self.port, limit=1 << 20)
                if not await _exchange(method, raw, headers, reader, writer, there, rule):
                    return
        except (asyncio.IncompleteReadError, asyncio.CancelledError, ConnectionError, OSError):
            pass
        finally:
            self._serving.discard(task)
            for each in (writer, there[1] if there else None):
                if each is not None:
                    with contextlib.suppress(OSError, RuntimeError):
                        each.close()


async def _exchange(
    method: str,
    raw: bytes,
    headers: Headers,
    reader: asyncio.StreamReader,
    writer: asyncio.StreamWriter,
    there: tuple[asyncio.StreamReader, asyncio.StreamWriter],
    rule: Rule | None,
) -> bool:
    """Pass one request on and its answer back; False if the connection is over."""
    action, options = (rule.action, rule.options) if rule else ("", {})
    up_reader, up_writer = there
    up_writer.write(raw)
    seen, after = 0, options.get("after", 0)
    async for data in _body(reader, headers):
        seen += len(data)
        if action == "reset_request" and seen > after:
            _reset(up_writer)
            _reset(writer)
            return False
        if action == "rate":
            await asyncio.sleep(len(data) / options["bytes_per_second"])
        up_writer.write(data)
        await up_writer.drain()
    while True:
        line, answered, raw = await _head(up_reader)
        status = int(line.split(b" ")[1])
        if status != 100:
            break
    has_body = method != "HEAD" and status not in (204, 304)
    if action == "swallow":
        async for _ in _body(up_reader, answered, has_body=has_body, until_end=True):
            pass
        _reset(writer)
        return False
    writer.write(raw)
    seen = 0
    async for data in _body(up_reader, answered, has_body=has_body, until_end=True):
        if action in ("reset", "truncate") and seen + len(data) > after:
            writer.write(data[: max(0, after - seen)])
            await writer.drain()
            await asyncio.sleep(0.02)
            up_writer.close()
            if action == "reset":
                _reset(writer)
            return False
        if action == "stall" and seen == 0:
            await asyncio.sleep(options["seconds"])
        place = options.get("at", 0) - seen
        if action == "corrupt" and 0 <= place < len(data):
            data = data[:place] + bytes([data[place] ^ 255]) + data[place + 1 :]
        seen += len(data)
        writer.write(data)
        await writer.drain()
    closes = [h.get(b"connection", b"").lower() == b"close" for h in (headers, answered)]
    return not any(closes)


async def _head(reader: asyncio.StreamReader) -> tuple[bytes, Headers, bytes]:
    raw = await reader.readuntil(b"\r\n\r\n")
    lines = raw.split(b"\r\n")
    pairs = (line.split(b":", 1) for line in lines[1:] if b":" in line)
    return lines[0], {name.strip().lower(): value.strip() for name, value in pairs}, raw


async def _body(
    reader: asyncio.StreamReader,
    headers: Headers,
    *,
    has_body: bool = True,
    until_end: bool = False,
) -> AsyncIterator[bytes]:
    """The body's bytes as they are on the wire, chunk headers included."""
    if not has_body:
        return
    if headers.get(b"transfer-encoding", b"").lower() == b"chunked":
        while True:
            line = await reader.readline()
            yield line
            left = int(line.split(b";")[0], 16)
            if left == 0:
                while (line := await reader.readline()) not in (b"\r\n", b""):
                    yield line
                yield line
                return
            left += 2
            while left:
                data = await reader.read(min(left, _READ_BYTES))
                left -= len(data)
                yield data
    elif b"content-length" in headers:
        left = int(headers[b"content-length"])
        while left:
            data = await reader.read(min(left, _READ_BYTES))
            if not data:
                raise ConnectionError
            left -= len(data)
            yield data
    elif until_end:
        while data := await reader.read(_READ_BYTES):
            yield data


def _error(options: dict[str, Any], *, has_body: bool) -> bytes:
    code = options.get("code", "SlowDown")
    body = f'<?xml version="1.0"?><Error><Code>{code}</Code><Message>injected</Message></Error>'
    lines = [f"HTTP/1.1 {options.get('status', 503)} Injected", "Content-Type: application/xml"]
    if "retry_after" in options:
        lines.append(f"Retry-After: {options['retry_after']}")
    sent = body if has_body else ""
    return "\r\n".join([*lines, f"Content-Length: {len(sent)}", "", sent]).encode()


def _reset(writer: asyncio.StreamWriter) -> None:
    connection = writer.get_extra_info("socket")
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.transport.abort()
