"""Requests at a bounded rate while versions are swapped: each is answered with 200 by the version that it names.

    TUNESERVE_SWAPS=50 TUNESERVE_REQUESTS=1000000 TUNESERVE_RATE=700 \
        make test-processes ARGS="-s -n0 tests/processes/test_swaps.py"       half an hour, a line for a swap
"""

import asyncio
import json
import os
import time
from collections import Counter
from pathlib import Path
from typing import Any

import loop
import pytest
import tiny
import uvloop
from client import Answer, write_request
from reference import TEXTS, reference
from soak import Client

from tuneserve.artifact import Version

SWAPS = int(os.environ.get("TUNESERVE_SWAPS", "3"))
REQUESTS = int(os.environ.get("TUNESERVE_REQUESTS", "2000"))
RATE = float(os.environ.get("TUNESERVE_RATE", "200"))
CLIENTS = 32
ANSWER_S, PATIENCE_S = 60.0, 240.0


class Load:
    """Clients on connections that stay open, which together ask `RATE` times a second at most and look at every answer.

    Args:
        service: that is asked.
        versions: that may answer, by their ids.
    """

    def __init__(self, service: loop.Service, versions: dict[str, Version]) -> None:
        self.service, self.versions = service, versions
        self.sent, self.swapping, self.began = 0, True, time.monotonic()
        self.statuses: Counter[str] = Counter()
        self.answered_by: Counter[str] = Counter()
        self.wrong: list[str] = []
        self._right: dict[tuple[str, bytes], str] = {}
        """Bodies that were looked at and found right, with the version: they repeat themselves."""

    async def be_client(self, number: int) -> None:
        requests = [(text, write_request("/inference", json.dumps({"text": text}).encode())) for text in TEXTS]
        _, client = await asyncio.get_running_loop().create_connection(Client, "127.0.0.1", self.port)
        while self.sent < REQUESTS or self.swapping:
            due, self.sent = self.began + self.sent / RATE, self.sent + 1
            await asyncio.sleep(max(0.0, due - time.monotonic()))
            text, request = requests[self.sent % len(TEXTS)]
            answered: asyncio.Future[Answer] = asyncio.get_running_loop().create_future()
            client.ask(request, answered.set_result)
            try:
                answer = await asyncio.wait_for(answered, ANSWER_S)
            except TimeoutError:
                answer = Answer(-1)
            self.statuses[{0: "reset", -1: "late"}.get(answer.status, str(answer.status))] += 1
            if answer.status == 200:
                self.look_at(text, answer.body)
            if answer.status in (0, -1) or client.ended:
                client.transport.abort()
                _, client = await asyncio.get_running_loop().create_connection(Client, "127.0.0.1", self.port)
        client.transport.close()

    @property
    def port(self) -> int:
        return int(self.service.environment["PORT"])

    def look_at(self, text: str, body: bytes) -> None:
        if (version := self._right.get((text, body))) is None:
            answer = json.loads(body)
            version = answer["model_version"]
            wanted = reference(self.versions[version])[text]
            if answer["scores"] != pytest.approx(wanted, abs=1e-3) or answer["label"] != max(wanted, key=wanted.get):
                self.wrong.append(f"{text}: {answer}, not {wanted}")
                return
            self._right[text, body] = version
        self.answered_by[version] += 1

    async def swap(self) -> list[dict[str, Any]]:
        """Promote the next version, or roll back, at even distances; what the server holds after each."""
        names, now, before, held = list(self.versions), 2, 1, [self.figures("start")]
        for number in range(1, SWAPS + 1):
            while self.sent < number * REQUESTS / (SWAPS + 1):
                await asyncio.sleep(0.01)
            back = number % 3 == 0
            now, before = (before, now) if back else ((set(range(3)) - {now, before}).pop(), now)
            verb = ["rollback"] if back else ["promote", names[now]]
            await asyncio.to_thread(self.service.command, *verb)
            await asyncio.to_thread(
                self.service.wait,
                "/readyz",
                lambda body, now=now: body["model_version"] == names[now],
                timeout_s=PATIENCE_S,
            )
            held.append(self.figures(f"swap {number}, {verb[0]}"))
        self.swapping = False
        return held

    def figures(self, when: str) -> dict[str, Any]:
        assert self.service.process is not None
        folder = Path(f"/proc/{self.service.process.pid}")
        status = dict(line.split(":", 1) for line in (folder / "status").read_text().splitlines())
        figures = {
            "when": when,
            "sent": self.sent,
            "statuses": dict(self.statuses),
            "wrong": len(self.wrong),
            "rss_mb": int(status["VmRSS"].split()[0]) // 1024,
            "threads": int(status["Threads"]),
            "descriptors": len(list((folder / "fd").iterdir())),
        }
        print(figures, flush=True)
        return figures


@pytest.mark.timeout(600 + 3 * REQUESTS / RATE)
def test_no_request_fails_while_versions_are_swapped(tmp_path: Path) -> None:
    versions = {}
    for count in (160, 200, 240):
        texts = tiny.write_csv(tmp_path / "reviews.csv", tiny.sentences(count))
        version = tiny.train(texts, tmp_path, PRECISION="fp32", MAX_ACCURACY_DROP="1", MAX_LATENCY_INCREASE="100")
        versions[version.id] = version
    environment = {
        **tiny.paths(tmp_path),
        "PRECISION": "fp32",
        "OMP_NUM_THREADS": "1",
        "HOST": "127.0.0.1",
        "PORT": str(loop.free_port()),
    }
    service = loop.Service(environment, tmp_path / "out.log", verb="serve")
    service.start()
    try:
        service.wait("/readyz", lambda body: body["phase"] == "ready", timeout_s=PATIENCE_S)
        load = Load(service, versions)

        async def run() -> list[dict[str, Any]]:
            *_, held = await asyncio.gather(*map(load.be_client, range(CLIENTS)), load.swap())
            return held

        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            held = [*runner.run(run()), load.figures("end")]
        print(f"{time.monotonic() - load.began:.0f} s", dict(load.answered_by), *load.wrong[:5])
    finally:
        assert service.end() == 0
    assert not load.wrong
    assert set(load.statuses) == {"200"}
    assert load.statuses["200"] >= REQUESTS
    assert set(load.answered_by) == set(versions)
    settled = held[min(5, SWAPS)]
    assert held[-1]["threads"] <= settled["threads"] + 2
    assert held[-1]["descriptors"] <= settled["descriptors"] + 2
