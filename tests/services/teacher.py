"""A teacher for tests: an OpenAI-compatible server that answers by rule, and misbehaves by rule.

    python tests/services/teacher.py --port 8000 --log asked.jsonl --faults 3

Every request is written to the log when it arrives ("asked") and when its answer was sent whole
("answered"). With `--faults N` about one new request in N is met with a fault first (each kind in
turn, chosen by the request itself): 429 with Retry-After, 500, silence, a cut connection, a body
that is no JSON, a completion without content, text that is no use. Asked again, it is answered.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib
import json
import re
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

FAULTS = ("busy", "error", "silent", "cut", "not_json", "no_content", "useless")
Rule = Callable[[str], str]


@dataclass
class Teacher:
    """What the server knows and does; `answer` is the rule, from the last message's text."""

    answer: Rule
    faults_one_in: int = 0
    silent_seconds: float = 3.0
    delay_seconds: float = 0.0
    log: Path | None = None
    key: str | None = None
    """If set, requests without it are refused."""
    refuses: str | None = None
    """A request that holds this text is refused with 400."""
    dies_after: int | None = None
    """So many requests, then every one is answered with 503."""
    asked: Counter[str] = field(default_factory=Counter)
    answered: Counter[str] = field(default_factory=Counter)
    under_way: int = 0
    most_under_way: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)

    def note(self, event: str, digest: str) -> int:
        with self.lock:
            counter = self.asked if event == "asked" else self.answered
            counter[digest] += 1
            if self.log is not None:
                with open(self.log, "a", encoding="utf-8") as file:
                    file.write(json.dumps({"event": event, "request": digest}) + "\n")
            return counter[digest]

    def fault(self, digest: str, times: int) -> str | None:
        if self.dies_after is not None and sum(self.asked.values()) > self.dies_after:
            return "dead"
        if not self.faults_one_in or times > 1:
            return None
        number = int(digest[:12], 16)
        if number % self.faults_one_in:
            return None
        return FAULTS[number // self.faults_one_in % len(FAULTS)]


def digest_of(request: dict[str, Any]) -> str:
    """Names a request: everything in it but what travels with every request."""
    return hashlib.sha256(json.dumps(request, sort_keys=True).encode()).hexdigest()


class _Handler(BaseHTTPRequestHandler):
    teacher: Teacher
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        pass

    def do_POST(self) -> None:
        teacher = self.teacher
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if teacher.key is not None and self.headers["Authorization"] != f"Bearer {teacher.key}":
            self._send(401, {"error": {"message": "wrong key"}})
            return
        if self.path != "/v1/chat/completions":
            self._send(404, {"error": {"message": f"nothing at {self.path}"}})
            return
        request = json.loads(body)
        digest = digest_of(request)
        with teacher.lock:
            teacher.under_way += 1
            teacher.most_under_way = max(teacher.most_under_way, teacher.under_way)
        try:
            self._answer(request, digest, teacher.fault(digest, teacher.note("asked", digest)))
        finally:
            with teacher.lock:
                teacher.under_way -= 1

    def _answer(self, request: dict[str, Any], digest: str, fault: str | None) -> None:
        teacher = self.teacher
        time.sleep(teacher.delay_seconds)
        if teacher.refuses is not None and teacher.refuses in body_text(request):
            self._send(400, {"error": {"message": "this request is refused"}})
        elif fault == "dead":
            self._send(503, {"error": {"message": "gone"}})
        elif fault == "busy":
            self._send(429, {"error": {"message": "slow down"}}, {"Retry-After": "1"})
        elif fault == "error":
            self._send(500, {"error": {"message": "oops"}})
        elif fault == "silent":
            time.sleep(teacher.silent_seconds)
            self.close_connection = True
        elif fault == "cut":
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", "1000")
            self.end_headers()
            self.wfile.write(b'{"choices": [')
            self.close_connection = True
        elif fault == "not_json":
            self._raw(200, b'{"choices": [{"message"', {})
        else:
            text = self._text(request, fault)
            message = {"role": "assistant", "content": text}
            self._send(
                200,
                {
                    "id": digest[:12],
                    "object": "chat.completion",
                    "created": 0,
                    "model": request["model"],
                    "choices": [{"index": 0, "message": message, "finish_reason": "stop"}],
                    "usage": {
                        "prompt_tokens": len(body_text(request)) // 4,
                        "completion_tokens": len(text or "") // 4,
                        "total_tokens": (len(body_text(request)) + len(text or "")) // 4,
                    },
                },
            )
            if fault is None:
                teacher.note("answered", digest)

    def _text(self, request: dict[str, Any], fault: str | None) -> str | None:
        if fault == "no_content":
            return None
        if fault == "useless":
            return ""
        return self.teacher.answer(body_text(request))

    def _send(
        self, status: int, value: dict[str, Any], headers: dict[str, str] | None = None
    ) -> None:
        self._raw(status, json.dumps(value).encode(), headers or {})

    def _raw(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        try:
            self.send_response(status)
            for name, value in {"Content-Type": "application/json", **headers}.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)
        except (BrokenPipeError, ConnectionResetError):
            # The asker was killed; that is what the tests do.
            self.close_connection = True


def body_text(request: dict[str, Any]) -> str:
    """What the last message says."""
    text: str = request["messages"][-1]["content"]
    return text


class Server:
    """A teacher on a free port of this machine, in a thread of this process."""

    def __init__(self, teacher: Teacher, port: int = 0) -> None:
        handler = type("Handler", (_Handler,), {"teacher": teacher})
        self.teacher = teacher
        self._server = ThreadingHTTPServer(("127.0.0.1", port), handler)
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_address[1]}/v1"

    def __enter__(self) -> Server:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


# --- the rules --------------------------------------------------------------------------------

_DOCUMENT = re.compile(r"<DOCUMENT>(.*?)</DOCUMENT>", re.DOTALL)


def berkeley(prompt: str) -> str:
    """Answers what the prompts of raft's Berkeley format ask, quoting the first document."""
    documents = [text.strip() for text in _DOCUMENT.findall(prompt)]
    begin, end = "##begin_quote##", "##end_quote##"
    if prompt.startswith("Write "):
        words = re.findall(r"\w+", documents[0])
        if len(words) < 8:
            return "NONE"
        return "\n".join(f"{i}. What is said of {words[i]} and {words[-i]}?" for i in (1, 2, 3))
    start = documents[0][:60].strip()
    if "may not answer the question" in prompt:
        return (
            f"One document says {begin}{start}{end} and that is something else. The documents do"
            " not contain enough information.\n<ANSWER>: not in the documents"
        )
    return f"The document says {begin}{start}{end}, and so it is.\n<ANSWER>: {start.split()[0]}"


_ITEM = re.compile(r"^\[(\d+)\] ", re.MULTILINE)


def clara(prompt: str) -> str:
    """Answers what `baton data clara build` asks: every sentence is a key fact.

    What is written covers one fact less than there are, until the missing ones are asked for; a
    verification finds what no item says, and items that say what is not in the document.
    """
    document = _DOCUMENT.findall(prompt)[0].strip()
    facts = [text.strip() for text in re.split(r"(?<=[.。])\s+", document) if text.strip()]
    if prompt.startswith("Below are a document"):
        body = prompt.partition("<ITEMS>")[2].partition("</ITEMS>")[0]
        items = [item.strip() for item in _ITEM.split(body)[2::2]]
        missing = [fact for fact in facts if fact not in body]
        known = [any(fact in item for fact in facts) for item in items]
        wrong = [number for number, is_known in enumerate(known, start=1) if not is_known]
        return json.dumps({"missing": missing, "wrong": wrong}, ensure_ascii=False)
    asked_again = [fact for fact in facts if f"- {fact}" in prompt]
    if prompt.startswith("Write the document"):
        kept = facts if asked_again or len(facts) == 1 else facts[:-1]
        return json.dumps({"text": " ".join(reversed(kept))}, ensure_ascii=False)
    wanted = asked_again or (facts if len(facts) == 1 else facts[:-1])
    kind = "two facts" if "at least two" in prompt else "fact"
    pairs = [
        {"question": f"Which {kind} begins with {fact[:24]!r}?", "answer": fact} for fact in wanted
    ]
    if not asked_again:
        pairs.append({"question": "What is not in the document?", "answer": "the moon"})
    return json.dumps(pairs, ensure_ascii=False)


def competition(prompt: str) -> str:
    """Answers what questions_gen asks: scores, a better problem, a variation; all in JSON."""
    number = int(hashlib.sha256(prompt.encode()).hexdigest()[:6], 16) % 90 + 10
    if prompt.startswith("Judge "):
        names = re.search(r"each of (.*?)\.\n", prompt)
        assert names is not None, "the criteria are named"
        scores = dict.fromkeys(names[1].split(", "), 5 + number % 5)
        return f"Here it is:\n```json\n{json.dumps(scores)}\n```"
    problem = {
        "problem": f"Compute {number} + {number + 1}.",
        "answer": 2 * number + 1,
        "solution": f"{number} + {number + 1} = {2 * number + 1}.",
    }
    return json.dumps(problem)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--rule", default="berkeley", help="a function here, or MODULE:FUNCTION")
    parser.add_argument("--log", type=Path)
    parser.add_argument("--faults", type=int, default=0, help="about one new request in so many")
    parser.add_argument("--delay", type=float, default=0.0, help="seconds before every answer")
    parser.add_argument("--silent", type=float, default=3.0, help="seconds that silence lasts")
    args = parser.parse_args()
    module, _, name = args.rule.rpartition(":")
    rule = getattr(importlib.import_module(module) if module else sys.modules[__name__], name)
    teacher = Teacher(
        rule, args.faults, silent_seconds=args.silent, delay_seconds=args.delay, log=args.log
    )
    with Server(teacher, args.port) as server:
        print(server.url, flush=True)
        threading.Event().wait()


if __name__ == "__main__":
    main()
