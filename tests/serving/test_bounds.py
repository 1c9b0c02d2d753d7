"""What clients may make a server hold: requests behind others, bodies, texts, answers that nobody reads."""

import asyncio
import json
import sqlite3
import threading
import time
from array import array
from collections import Counter
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

import pytest
from exchanges import JSON
from pydantic import SecretStr
from wire import BODY, LIVEZ, Client, counts, served, wait_until, write

from tuneserve.errors import OverloadedError, TimeoutExceededError
from tuneserve.lifecycle import feedback as feedback_module
from tuneserve.lifecycle.feedback import Feedback
from tuneserve.lifecycle.feedback_database import FILE
from tuneserve.serving.batcher import MEASURED
from tuneserve.serving.http import front, routes
from tuneserve.serving.http.front import SMALL_BYTES, Bodies, Front
from tuneserve.serving.http.protocol import MAX_PIPELINED, SLICE_BYTES, Protocol
from tuneserve.serving.slot import Slot
from tuneserve.settings import Settings
from tuneserve.tasks.body import CHUNK_BATCHES, CHUNKS, TOKENIZERS
from tuneserve.tasks.classifier import Classifier
from tuneserve.text import Tokens

READ_BYTES = 256 << 10
"""Most that the event loop reads of a connection at once."""


@pytest.fixture
def protocols(monkeypatch: pytest.MonkeyPatch) -> list[Protocol]:
    """The server's connections, in the order in which they were made."""
    found: list[Protocol] = []
    made = Protocol.connection_made

    def keep(protocol: Protocol, transport: Any) -> None:
        found.append(protocol)
        made(protocol, transport)

    monkeypatch.setattr(Protocol, "connection_made", keep)
    return found


@pytest.fixture
def fronts(monkeypatch: pytest.MonkeyPatch) -> list[Front]:
    """The fronts of the servers that are started."""
    found: list[Front] = []
    made = Front.__init__

    def keep(front: Front, *arguments: Any, **options: Any) -> None:
        found.append(front)
        made(front, *arguments, **options)

    monkeypatch.setattr(Front, "__init__", keep)
    return found


def send_in_background(client: Client, content: bytes) -> threading.Thread:
    def send() -> None:
        with suppress(OSError):  # the server closes the connection
            client.send(content)

    sending = threading.Thread(target=send)
    sending.start()
    return sending


@pytest.mark.parametrize("piece", [1, 1000], ids=["in many pieces", "in large ones"])
def test_few_requests_wait_behind_one_that_is_being_answered(
    settings: Settings, held: tuple[Slot, threading.Event], protocols: list[Protocol], piece: int
) -> None:
    slot, go = held
    with served(settings, slot) as port:
        client = Client(port)
        client.send(write())
        wait_until(lambda: protocols and protocols[0].cycle is not None)

        def send() -> None:
            for _ in range(16_000 // piece):
                client.send(LIVEZ * piece)

        sending = threading.Thread(target=send)
        sending.start()
        wait_until(lambda: protocols[0].flow.read_paused)
        assert len(protocols[0].pipeline) <= MAX_PIPELINED + SLICE_BYTES // len(LIVEZ) + 1
        assert len(protocols[0]._unparsed) <= READ_BYTES
        assert counts(slot) == {}
        go.set()
        assert {client.read()[0] for _ in range(16_001)} == {200}  # and none is lost
        sending.join()
        assert not protocols[0].flow.held
        assert client.ask(LIVEZ)[0] == 200
        client.close()


def test_nothing_more_is_read_of_a_client_that_does_not_read(
    settings: Settings, slot: Slot, protocols: list[Protocol]
) -> None:
    settings = settings.model_copy(update={"request_timeout_s": 0.5})
    with served(settings, slot) as port:
        client = Client(port)
        sending = send_in_background(client, LIVEZ * 300_000)
        wait_until(lambda: protocols and protocols[0].transport is not None and protocols[0].transport.is_closing())
        assert sum(counts(slot).values()) < 150_000  # what the buffers of the sockets take of answers
        sending.join()
        client.close()


def test_bodies_are_counted_before_they_are_read_and_small_ones_have_room_of_their_own() -> None:
    large, small = SMALL_BYTES + 1, SMALL_BYTES
    bodies = Bodies(2 * large)
    assert [bodies.hold(large, of=large) for _ in range(2)] == [large, large]
    with pytest.raises(OverloadedError):
        bodies.hold(1, of=large)
    assert bodies.hold(small, of=small) == small
    assert bodies.held == 2 * large + small


def test_large_bodies_that_find_no_room_are_refused_before_they_are_read(
    settings: Settings, slot: Slot, fronts: list[Front]
) -> None:
    with served(settings.model_copy(update={"max_body_kb": 1024}), slot) as port:
        fronts[-1].bodies._max_bytes = 3 << 20
        head = b"POST /inference HTTP/1.1\r\nHost: a\r\nContent-Length: 1048576\r\n\r\n"
        waiting = [Client(port) for _ in range(3)]
        for client in waiting:
            client.send(head + b" ")
        wait_until(lambda: fronts[-1].bodies.held == 3 << 20)
        late, small = Client(port), Client(port)
        status, headers, _ = late.ask(head)
        assert (status, headers["retry-after"]) == (429, "1")
        assert small.ask(write())[0] == 200
        chunks = b"POST /inference HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n"
        assert small.ask(chunks + b"18000\r\n" + b" " * 0x18000 + b"\r\n0\r\n\r\n")[0] == 429
        for client in (*waiting, late):
            client.close()
        wait_until(lambda: fronts[-1].bodies.held == 0)
        assert small.ask(write())[0] == 200
        small.close()


@pytest.mark.parametrize("path", ["/inference", "/inference/batch", "/feedback", "/drift", "/nothing"])
def test_nothing_is_kept_of_a_body_whose_request_has_no_key(
    settings: Settings, slot: Slot, protocols: list[Protocol], fronts: list[Front], path: str
) -> None:
    changed = settings.model_copy(update={"api_key": SecretStr("secret"), "max_body_kb": 1024})
    with served(changed, slot) as port:
        client = Client(port)
        assert client.ask(write(b" " * (1 << 20), path=path))[0] == 401
        assert client.ask(write(b" " * (1 << 10), "Connection: close", path=path))[0] == 401
        assert (len(protocols[0].cycle.body), fronts[-1].bodies.held) == (0, 0)
        client.close()


def test_a_batch_has_a_largest_number_of_texts(settings: Settings, slot: Slot) -> None:
    changed = settings.model_copy(update={"max_body_kb": 1024, "max_batch_texts": 600})
    with served(changed, slot) as port:
        client = Client(port)
        for count, status in ((600, 200), (601, 413), (340_000, 413)):
            body = b'{"texts": [' + b'"",' * (count - 1) + b'""]}'
            found, _, answer = client.ask(write(body, path="/inference/batch"))
            assert found == status, answer
        assert "600" in json.loads(answer)["detail"]
        client.close()


def test_many_answers_are_written_by_another_thread(
    settings: Settings, slot: Slot, monkeypatch: pytest.MonkeyPatch
) -> None:
    threads: list[str] = []
    to_json = routes.to_json

    def watched(content: Any) -> str:
        threads.append(threading.current_thread().name)
        return to_json(content)

    monkeypatch.setattr(routes, "to_json", watched)
    with served(settings.model_copy(update={"max_body_kb": 1024}), slot) as port:
        client = Client(port)
        for count in (2, 1000):
            body = json.dumps({"texts": ["film"] * count}).encode()
            assert client.ask(write(body, path="/inference/batch"))[0] == 200
        client.close()
    few, many = threads
    assert few != many


def test_few_large_requests_are_tokenized_at_once(classifier: Classifier, monkeypatch: pytest.MonkeyPatch) -> None:
    active = most = 0
    lock, both = threading.Lock(), threading.Event()
    read = classifier.body.read

    def watched(texts: Any) -> list[Any]:
        nonlocal active, most
        with lock:
            active += 1
            most = max(most, active)
        if active == TOKENIZERS:
            both.set()
        both.wait(10)
        try:
            return read(texts)
        finally:
            with lock:
                active -= 1

    monkeypatch.setattr(classifier.body, "read", watched)

    async def ask() -> list[Any]:
        return await asyncio.gather(*(classifier.answer(["film " * 1000]) for _ in range(8)))

    answers = asyncio.run(ask())
    assert [one[0].truncated for one in answers] == [True] * 8
    assert most == TOKENIZERS


def test_a_small_request_waits_for_few_chunks_of_large_ones(
    held: tuple[Slot, threading.Event], monkeypatch: pytest.MonkeyPatch
) -> None:
    slot, go = held
    classifier = slot.model()
    assert isinstance(classifier, Classifier)
    batcher = classifier.batcher
    monkeypatch.setattr(batcher, "_max_queue_tokens", 100_000)
    chunk = CHUNK_BATCHES * batcher.max_batch_tokens

    async def ask() -> list[Any]:
        large = [asyncio.create_task(classifier.answer(["film good"] * 500)) for _ in range(10)]
        await reach(classifier, 10 * CHUNKS * chunk, *large)
        for _ in range(10):  # in which they would queue, if they might
            await asyncio.sleep(0)
        assert batcher.tokens_waiting <= CHUNKS * chunk
        assert batcher.refusal() is None
        with pytest.raises(TimeoutExceededError):
            await classifier.answer(["film good"] * 500, deadline=time.monotonic())
        large.pop().cancel()
        go.set()
        return await asyncio.gather(classifier.answer(["film"]), *large)

    answers = asyncio.run(ask())
    assert [len(one) for one in answers] == [1] + [500] * 9
    assert (classifier.body._coming, batcher.tokens_waiting) == (0, 0)


async def reach(classifier: Classifier, coming: int, *tasks: "asyncio.Task[Any]") -> None:
    """Wait until large requests wait for so many tokens of the queue; fail if one has ended, or none is added."""
    for _ in range(2000):
        if classifier.body._coming >= coming:
            return
        assert not [task for task in tasks if task.done()], "a request that should wait was refused"
        await asyncio.sleep(0.01)
    pytest.fail(f"{classifier.body._coming} tokens are coming, not {coming}")


def test_large_requests_that_would_all_be_late_are_refused_while_others_are_answered(
    held: tuple[Slot, threading.Event], monkeypatch: pytest.MonkeyPatch
) -> None:
    slot, go = held
    classifier = slot.model()
    assert isinstance(classifier, Classifier)
    texts = ["film good"] * 500  # four tokens each
    monkeypatch.setattr(classifier.batcher, "_max_queue_tokens", 100_000)
    classifier.batcher.tokens_per_s = 1.0  # 2000 s a request; two are answered in time
    each = min(2000, CHUNKS * CHUNK_BATCHES * classifier.batcher.max_batch_tokens)

    async def ask() -> list[Any]:
        deadline = time.monotonic() + 5000
        accepted = [asyncio.create_task(classifier.answer(texts, deadline=deadline)) for _ in range(2)]
        await reach(classifier, 2 * each, *accepted)
        unknown = asyncio.create_task(classifier.answer(texts, deadline=deadline))  # no batch has been measured yet
        await reach(classifier, 3 * each, unknown, *accepted)
        assert classifier.body._unanswered == 6000
        unknown.cancel()
        await asyncio.wait([unknown])
        assert classifier.body._unanswered == 4000
        classifier.batcher._measured = MEASURED
        late = asyncio.create_task(classifier.answer(texts, deadline=deadline))
        with pytest.raises(AssertionError, match="was refused"):
            await reach(classifier, 3 * each, late)
        refused = late.exception()
        assert isinstance(refused, OverloadedError)
        assert refused.retry_after_s == 2000
        cancelled = asyncio.create_task(classifier.answer(texts, deadline=deadline + 5000))
        await reach(classifier, 3 * each, cancelled, *accepted)
        cancelled.cancel()
        go.set()
        return await asyncio.gather(*accepted)

    assert [len(one) for one in asyncio.run(ask())] == [500, 500]
    assert classifier.body._unanswered == 0


def test_the_ids_of_a_large_request_take_four_bytes_each(classifier: Classifier) -> None:
    texts = ["good film", "", "film " * 5000] * 200
    for few, many in zip(classifier.body.read(texts), classifier.body._read_many(texts), strict=True):
        assert isinstance(few, Tokens) == isinstance(many, Tokens)
        if isinstance(many, Tokens):
            assert isinstance(many.ids, array)
            assert many.ids.itemsize == 4
            assert [list(ids) for ids in many.windows] == few.windows


@pytest.mark.parametrize("count", [1, 1000])
def test_body_of_one_byte_chunks_is_joined(settings: Settings, slot: Slot, count: int) -> None:
    body = BODY + b" " * count
    chunks = b"".join(b"1\r\n%c\r\n" % byte for byte in body)
    with served(settings, slot) as port:
        client = Client(port)
        head = b"POST /inference HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n"
        assert client.ask(head + chunks + b"0\r\n\r\n")[0] == 200
        client.close()


def test_memory_of_large_bodies_is_given_back_once_they_are_answered(monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[int] = []
    monkeypatch.setattr(front, "TRIM_S", 0.0)

    async def run() -> None:
        done = asyncio.Event()
        loop = asyncio.get_running_loop()
        monkeypatch.setattr(front, "give_memory_back", lambda: (given.append(1), loop.call_soon_threadsafe(done.set)))
        bodies = Bodies(1 << 20)
        bodies.release(bodies.hold(SMALL_BYTES, of=SMALL_BYTES))
        assert not bodies._trims
        for _ in range(3):
            bodies.release(bodies.hold(SMALL_BYTES + 1, of=SMALL_BYTES + 1))
        await done.wait()

    asyncio.run(run())
    assert len(given) == 1


def test_a_write_locked_feedback_database_starves_no_other_route(
    settings: Settings, slot: Slot, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(feedback_module, "MAX_WAITING", 20)
    monkeypatch.setattr(feedback_module, "WAIT_S", 60.0)  # nobody gives up while this machine is slow
    feedback = Feedback(tmp_path / FILE, max_rows=1000, keep_texts=False, keyed=True)
    body = json.dumps({"text": "a great film", "label": "good"}).encode()
    with served(settings, slot, feedback=feedback) as port, closing(Client(port)) as other:
        with closing(Client(port)) as client:
            assert client.ask(write(body, JSON, path="/feedback"))[0] == 200
        holder = sqlite3.connect(tmp_path / FILE, isolation_level=None)
        holder.execute("BEGIN IMMEDIATE")
        clients = [Client(port) for _ in range(30)]
        for number, client in enumerate(clients):
            body = json.dumps({"text": f"film {number}", "label": "good"}).encode()
            client.send(write(body, JSON, path="/feedback"))
        wait_until(lambda: sum(client.is_answered() for client in clients) >= 10)  # the others wait for the file
        waiting = [client for client in clients if not client.is_answered()]
        for _ in range(20):
            assert other.ask(write())[0] == 200
            assert other.ask(LIVEZ)[0] == 200
        assert waiting
        assert not all(client.is_answered() for client in waiting)  # they did not wait for these
        holder.execute("COMMIT")
        holder.close()
        statuses = Counter(client.read()[0] for client in clients)
        assert statuses[503] >= 10
        assert statuses.keys() <= {200, 503}
        for client in clients:
            client.close()
    feedback.close()
