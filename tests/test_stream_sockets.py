"""The acceptance cases of the thread stream (spec/stream.md, section 13): sockets against a real daemon."""

import json
import random
import select
import socket
import subprocess
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from conftest import CLEAN
from streams import Stream, call, calm, fill, ids, make, messages_of, numbers, send, span, thread_of
from wire import Refused, http_get, port_of, sockets_open

import thrum

TOKEN = "t0p-secret"


@pytest.fixture(scope="module")
def repo(tmp_path_factory):
    repo = make(tmp_path_factory, "stream", "ada", "bob")
    yield repo
    calm(repo)
    repo.close()


@pytest.fixture(scope="module")
def thousand(repo):
    """A thread of 1001 messages, and their ids."""
    return thread_of(repo, thrum.STREAM_LAG + 1)


def test_case_01_an_empty_thread(tmp_path_factory):
    """One that only has a title, as it comes from elsewhere, and one whose only message was taken back."""
    repo = make(tmp_path_factory, "empty", "ada")
    alone = send(repo, "oops")["message_id"]
    repo.kill()
    world = thrum.World({})
    event = {"event_id": world.new_id("evt"), "origin_daemon": "d_000000000000", "thread_id": world.new_id("thr"), "title": "Plans",
             "timestamp": thrum.stamp_of(world.now_ns()), "type": "thread.create", "v": 1}
    with open(thrum.log_files(thrum.find_places(str(repo.path)).journal)[-1], "ab") as file:
        file.write(thrum.canonical(event) + b"\n")
    repo.ok("daemon", "start")
    call(repo, "message.delete", message_id=alone, caller_agent_id="ada")
    with Stream(repo) as page:
        for thread, last in ((event["thread_id"], 0), ("thr_" + alone[4:], 1)):
            assert page.subscribe(thread) == {"thread_id": thread, "messages": [], "has_more": False}
            state = page.next("thread_state")["data"]
            assert {**state, "updated_at": 0} == {"thread_id": thread, "status": "active", "last_seq": last, "updated_at": 0}
            assert page.ping() == []
    calm(repo)
    repo.close()


def test_case_02_batches_of_fifty(repo):
    thread, expected = thread_of(repo, 50)
    with Stream(repo) as page:
        batch = page.subscribe(thread)
        assert (ids(batch["messages"]), numbers(batch["messages"]), batch["has_more"]) == (expected, span(1, 50), False)
    expected += fill(repo, thread, 1)
    with Stream(repo) as page:
        batch = page.subscribe(thread)
        assert (ids(batch["messages"]), numbers(batch["messages"]), batch["has_more"]) == (expected[:50], span(1, 50), True)
        event = page.next("batch", "message")
        assert (ids(messages_of(event)), numbers(messages_of(event))) == (expected[50:], [51])
        assert event["data"].get("has_more") in (None, False)


def test_case_03_from_where_the_client_wants(repo):
    thread, expected = thread_of(repo, 10)
    for from_seq, first in ((5, 6), (-3, 1), (0, 1), (9, 10)):
        with Stream(repo) as page:
            batch = page.subscribe(thread, from_seq)
            assert (ids(batch["messages"]), numbers(batch["messages"])) == (expected[first - 1:], span(first, 10)), from_seq
    with Stream(repo) as page:
        assert page.subscribe(thread, 99) == {"thread_id": thread, "messages": [], "has_more": False}
        eleventh = fill(repo, thread, 1)
        (row,) = page.rows(1)
        assert ([row["id"]], row["message_seq"]) == (eleventh, 11)


def test_case_04_each_subscription_has_its_own_cursor(repo):
    thread, past = thread_of(repo, 120)
    with Stream(repo) as late, Stream(repo) as early:
        assert late.subscribe(thread, 120)["messages"] == []
        batch = early.subscribe(thread)
        later = fill(repo, thread, 10)
        new = late.rows(10)
        assert (ids(new), numbers(new)) == (later, span(121, 130))
        rows = batch["messages"] + early.rows(80)
        assert (ids(rows), numbers(rows)) == (past + later, span(1, 130))
        last = fill(repo, thread, 1)
        for page in (early, late):
            assert ids(page.rows(1)) == last


WRITE = 'i=0; while [ $i -lt $2 ]; do .thrum/bin/thrum send "$3 $i" --thread "$1" --to @bob >/dev/null || exit 1; i=$((i+1)); done'


def commands(repo, thread, each, processes=8):
    """Processes that write into a thread with one command after the other."""
    return [subprocess.Popen(["sh", "-c", WRITE, "sh", thread, str(each), f"writer {number}"], cwd=repo.path,
                             env={**CLEAN, "THRUM_NAME": "ada"}, stdin=subprocess.DEVNULL, stderr=subprocess.PIPE)
            for number in range(processes)]


def all_went_well(processes):
    for process in processes:
        assert process.communicate(timeout=120)[1] == b"" and process.returncode == 0


def contents(processes, each):
    return sorted(f"writer {number} {count}" for number in range(processes) for count in range(each))


def test_case_05_other_processes_write(repo):
    thread, _ = thread_of(repo, 1)
    with Stream(repo) as page:
        page.subscribe(thread, 1)
        writers, rows, late = commands(repo, thread, 15), [], []
        while len(rows) < 120:
            for row in messages_of(page.next("message", "batch")):
                rows.append(row)
                late.append(time.time() - row["created_at"] / 1000)
        all_went_well(writers)
        assert numbers(rows) == span(2, 121) and sorted(row["content"] for row in rows) == contents(8, 15)
        for number in range(8):         # those of one process in the order in which it wrote
            assert [row["content"] for row in rows if row["content"].startswith(f"writer {number} ")] == [
                f"writer {number} {count}" for count in range(15)]
        assert late[0] < 0.6 and max(late) < 3, late


def test_case_06_a_sent_row_arrives_once(repo):
    thread, _ = thread_of(repo, 1)
    with Stream(repo) as page:
        page.subscribe(thread)
        for number in range(2, 6):
            sent = send(repo, f"m{number}", thread)
            (row,) = page.rows(1)       # the next one would be the same again, if it came twice
            assert (row["id"], row["message_seq"], row["content"]) == (sent["message_id"], number, f"m{number}")
        assert [event for event in page.ping() if event["type"] in ("batch", "message")] == []


def test_case_07_a_reader_that_stops(repo):
    thread, expected = thread_of(repo, 1)
    with Stream(repo, limit=4096) as page:
        page.subscribe(thread, 1)
        begin = time.monotonic()
        expected = fill(repo, thread, 600, "{:05} " + "x" * 4090)
        time.sleep(max(0, begin + 5 - time.monotonic()))        # the case says for how long
        rows = page.rows(600)
        assert ids(rows) == expected and numbers(rows) == span(2, 601) and {len(row["content"]) for row in rows} == {4096}
        last = fill(repo, thread, 1)
        assert ids(page.rows(1)) == last


def test_case_08_a_client_that_does_not_acknowledge(repo, thousand):
    thread, expected = thousand
    other, _ = thread_of(repo, 3)
    with Stream(repo, "lazy") as page:
        rows = page.subscribe(thread)["messages"]
        rows += page.rows(1000 - len(rows))
        assert ids(rows) == expected[:1000] and numbers(rows) == span(1, 1000)
        told = page.next("error")["data"]
        assert told["code"] == "LAG_EXCEEDED"
        assert thread in told["message"] and "1,001" in told["message"] and "1,000" in told["message"]
        assert page.next("thread_state")["data"]["last_seq"] == 1001
        # What else there is goes on, and more rows are no reason to say it again.
        expected = expected + fill(repo, thread, 1)
        page.ack(thread, 500)
        assert numbers(page.subscribe(other)["messages"]) == [1, 2, 3]
        fill(repo, other, 1)
        (row,) = page.rows(1)
        assert (row["thread_id"], row["message_seq"]) == (other, 4)
        call(repo, "telemetry.report", pid=7, turns=1)
        assert page.next("telemetry")["data"]["instance_id"] == "external_7"
        assert {event["type"] for event in page.ping()} <= {"thread_state"}
        page.ack(thread, 502)           # 1002 - 502 = 500
        rows = page.rows(2)
        assert ids(rows) == expected[1000:] and numbers(rows) == [1001, 1002]
        expected += fill(repo, thread, 1)
        assert ids(page.rows(1)) == expected[1002:]


def windows(told, size):
    """The greatest number of rows in any time of `size`, from (time, rows) in order."""
    return max(sum(count for at, count in told[begin:] if at < told[begin][0] + size) for begin in range(len(told)))


def test_case_09_rows_per_second(repo, thousand):
    """The time of sending stands in each event.  What is received has waited, some longer than the rest, which adds to any second."""
    thread, _ = thousand
    other, _ = thread_of(repo, 150)
    with Stream(repo, "fast") as page:
        page.say("subscribe", thread_id=thread, from_seq=0)
        page.say("subscribe", thread_id=other, from_seq=0)
        sent, received, total = [], [], 0
        while total < 1151:
            event = page.next("batch", "message")
            rows = messages_of(event)
            received.append((time.time() * 1000, len(rows)))
            sent.append((event["timestamp"], len(rows)))
            total += len(rows)
            if rows:
                page.ack(event["data"]["thread_id"], rows[-1]["message_seq"])
        late = max(there - here for (here, _), (there, _) in zip(sent, received))
        assert windows(sent, 1_000) <= 200 and windows(sent, 10_000) <= 1_000
        assert windows(received, 1_000) <= 200 + (late + 1) / 10
        assert windows(received, 10_000) <= 1_000 + 100 + (late + 1) / 10
        assert sent[-1][0] - sent[0][0] < 30_000            # 100 a second: 10.5 s, and as many again for a busy machine


def test_case_10_acknowledgements(repo):
    thread, expected = thread_of(repo, 10)
    with Stream(repo, "ten") as page:
        page.subscribe(thread)
        page.ack(thread, 7)
        page.ack(thread, 3)
        assert [event["type"] for event in page.ping()] == ["thread_state"]       # no answer
    with Stream(repo, "ten") as page:
        assert numbers(page.subscribe(thread, -1)["messages"]) == [8, 9, 10]
        page.ack(thread, 999)
        eleventh = fill(repo, thread, 1)
        assert ids(page.rows(1)) == eleventh
    with Stream(repo, "ten") as page:
        assert numbers(page.subscribe(thread, -1)["messages"]) == [11]
        assert numbers(page.subscribe(thread, 4)["messages"]) == span(5, 11)        # what is stored does not bind
    with Stream(repo, "ten") as page, Stream(repo, "eleven") as stranger:
        page.ack(thread, 11)            # a subscription from an earlier connection is enough
        assert page.ping() == []
        assert page.subscribe(thread, -1)["messages"] == []
        for who, what in ((stranger, thread), (page, "thr_nothing"), (page, "")):
            who.ack(what, 1)
            told = who.next("error")["data"]
            assert told["code"] == "ACK_FAILED" and f"thread={what}" in told["message"]
        assert numbers(stranger.subscribe(thread, -1)["messages"]) == span(1, 11)


@pytest.mark.parametrize("code, payloads", [
    ("PARSE_ERROR", (b"not json", b"[]", b'"x"', b"1", b"true", b"", b"{", b'{"type":"ping"', b"{}{}", b"NaN")),
    ("UNKNOWN_EVENT", (b"null", b"{}", b'{"type":"nope"}', b'{"type":null}', b'{"type":1}', b'{"type":["ping"]}', b'{"type":"PING"}',
                       b'{"type":"batch"}', b'{"type":"message","data":{}}', b'{"type":"error"}', b'{"type":"thread_state"}')),
    ("INVALID_SUBSCRIBE", (
        b'{"type":"subscribe"}', b'{"type":"subscribe","data":null}', b'{"type":"subscribe","data":[]}', b'{"type":"subscribe","data":"T"}',
        b'{"type":"subscribe","data":{"thread_id":"T","from_seq":"1"}}', b'{"type":"subscribe","data":{"thread_id":"T","from_seq":1.5}}',
        b'{"type":"subscribe","data":{"thread_id":7,"from_seq":1}}', b'{"type":"subscribe","data":{"thread_id":"T","from_seq":true}}',
        b'{"type":"subscribe","data":{"thread_id":["T"]}}', b'{"type":"subscribe","data":{"thread_id":"T","from_seq":[]}}')),
    ("INVALID_ACK", (b'{"type":"ack"}', b'{"type":"ack","data":1}', b'{"type":"ack","data":{"thread_id":"T","ack_seq":"1"}}',
                     b'{"type":"ack","data":{"thread_id":"T","ack_seq":0.5}}', b'{"type":"ack","data":{"thread_id":{}}}')),
    ("SUBSCRIBE_FAILED", (b'{"type":"subscribe","data":{}}', b'{"type":"subscribe","data":{"thread_id":null,"from_seq":null}}',
                          b'{"type":"subscribe","data":{"thread_id":"thr_nothing"}}',
                          b'{"type":"subscribe","data":{"thread_id":"thr_\\u0000\\u202e"}}'))])
def test_case_11_what_is_no_event(repo, code, payloads):
    thread, _ = thread_of(repo, 1)
    with Stream(repo) as page:
        for payload in payloads:
            page.send(payload.replace(b'"T"', json.dumps(thread).encode()))
            told = page.next("error")["data"]
            assert told["code"] == code, payload
            assert "select" not in told["message"].lower() and str(repo.path) not in told["message"] and told["message"].isprintable()
            assert page.ping() == []
        page.send(b'{"type":"pong"}')   # swallowed
        page.send(b'{"x":[{}],"type":"subscribe","timestamp":"later","data":{"y":1,"thread_id":%s}}' % json.dumps(thread).encode())
        assert numbers(page.next("batch")["data"]["messages"]) == [1]


@pytest.mark.parametrize("parts", [1, 3, 100])
def test_case_12_ten_kibibytes(repo, parts):
    def pieces(size):
        """A ping of a size, in fragments."""
        payload = b'{"type":"ping","x":"' + b"y" * (size - 22) + b'"}'
        assert len(payload) == size
        step = -(-size // parts)
        for at in range(0, size, step):
            yield thrum.encode_frame(thrum.CONTINUATION if at else thrum.TEXT, payload[at:at + step], fin=at + step >= size, mask=b"mask")
    with Stream(repo) as page:
        page.sock.sendall(b"".join(pieces(10_240)))
        assert page.take()["type"] == "pong"
        page.sock.sendall(b"".join(pieces(10_241)))
        assert page.end() == 1009


def test_case_13_a_binary_frame(repo):
    thread, _ = thread_of(repo, 2)
    with Stream(repo) as page:
        page.peer.send(json.dumps({"type": "subscribe", "data": {"thread_id": thread, "from_seq": 1}}).encode(), thrum.BINARY)
        page.flush()
        assert numbers(page.next("batch")["data"]["messages"]) == [2]


def test_case_14_the_token(tmp_path_factory):
    repo = make(tmp_path_factory, "token", ws_token=TOKEN)
    own, foreign = f"http://localhost:{port_of(repo)}", "http://evil.example"

    def opens(token="", **headers):
        try:
            with Stream(repo, "user&token=" + token, headers=headers) as page:
                return 101 if page.ping() == [] else 0
        except Refused as refused:
            return refused.args[0]
    assert (opens(), opens("wrong"), opens(TOKEN + "x"), opens(TOKEN)) == (401, 401, 401, 101)
    assert (opens(Origin=foreign), opens("wrong", Origin=foreign), opens(TOKEN, Origin=foreign)) == (403, 403, 101)
    assert (opens(Origin="null"), opens(TOKEN, Origin="null")) == (403, 101)
    assert (opens(Origin=own), opens(TOKEN, Origin=own)) == (401, 101)       # forged, as a program can
    assert opens(Authorization="Bearer " + TOKEN) == 101
    assert http_get(repo, "/ws/stream")[::2] == (401, b"Unauthorized\n")
    assert http_get(repo, "/ws/stream", {"Origin": foreign})[::2] == (403, b"Forbidden\n")
    assert TOKEN not in (repo.var / "daemon.log").read_text()
    repo.close()


@pytest.mark.slow
def test_case_15_who_is_silent(repo):
    """A client that answers no Ping frame, and another one that does not either, but says something once."""
    before = time.monotonic()
    with Stream(repo) as silent, Stream(repo) as talking:
        begin, said, pinged = time.monotonic(), False, {silent: b"", talking: b""}
        while True:
            ready, _, _ = select.select([silent.sock, talking.sock], [], [], 1)
            now = time.monotonic()
            if not said and now - begin > 30:
                said = talking.send({"type": "ping"}) or True
            if talking.sock in ready:
                pinged[talking] += talking.sock.recv(1000)
            if silent.sock in ready:
                try:
                    data = silent.sock.recv(1000)
                except ConnectionError:
                    data = b""
                if not data:
                    break
                pinged[silent] += data
        assert now - before >= 60 and now - begin <= 61
        ping = thrum.encode_frame(thrum.PING, b"")
        assert pinged[silent] == ping and pinged[talking].endswith(ping)
        pong = pinged[talking][2:-2]
        assert json.loads(pong)["type"] == "pong"
        with pytest.raises(socket.timeout):
            talking.sock.settimeout(2)          # well after the time at which it would have had to go
            talking.sock.recv(1)
        talking.sock.settimeout(10)
        assert talking.ping() == []


def test_case_16_twenty_connections_under_a_writer(repo):
    thread, expected = thread_of(repo, 1)
    done, rng, seen, last = threading.Event(), random.Random(16), [], 0

    def write():
        begin, wrote = time.monotonic(), []
        with repo.client() as client:
            while not done.wait(max(0, begin + len(wrote) / 50 - time.monotonic())):
                wrote.append(client.call("message.send", content="m", thread_id=thread, caller_agent_id="ada")["message_id"])
        return wrote
    with ThreadPoolExecutor(1) as pool:
        writing = pool.submit(write)
        try:
            for _ in range(20):
                with Stream(repo, "again") as page:
                    wanted = rng.randrange(12)
                    rows = page.subscribe(thread, last)["messages"]
                    while len(rows) < wanted:
                        rows += messages_of(page.next("message", "batch"))
                    seen += rows[:len(rows) - rng.randrange(3)]     # what it was sent, but has not looked at
                    last = seen[-1]["message_seq"] if seen else 0
                    if rng.random() < 0.5:
                        page.peer.close(1000)
                        page.flush()
        finally:
            done.set()
        expected += writing.result()
    with Stream(repo, "again") as page:
        rows = page.subscribe(thread, last)["messages"]
        seen += rows + page.rows(len(expected) - len(seen) - len(rows))
    assert ids(seen) == expected and numbers(seen) == span(1, len(expected))


def test_case_17_best_effort_events_and_a_stopped_reader(repo):
    thread, _ = thread_of(repo, 1)
    output = "ä" * 1500

    def report(number):
        with repo.client() as client:
            for _ in range(250):
                client.call("task.report", task_id=f"t17-{number}", stream_type="tool_use", tool_name="Bash", error_msg=output * 4)
    with Stream(repo, limit=4096) as stopped, Stream(repo) as live, ThreadPoolExecutor(5) as pool:
        for page in (stopped, live):
            assert page.subscribe(thread, 1)["messages"] == []
        reporting, tasks, rows = [pool.submit(report, number) for number in range(4)], {}, []
        writing = pool.submit(fill, repo, thread, 60)
        while len(rows) < 60 or sum(map(len, tasks.values())) < 1000:
            event = live.next("message", "batch", "task_stream")
            if event["type"] == "task_stream":
                tasks.setdefault(event["data"]["task_id"], []).append(event["data"]["event_seq"])
            else:
                rows += messages_of(event)
        assert [one.result() for one in reporting] == [None] * 4
        assert tasks == {f"t17-{number}": span(1, 250) for number in range(4)}
        assert ids(rows) == writing.result()
        found, got = [], 0
        while len(found) < 60:
            event = stopped.next("message", "batch", "task_stream")
            got += event["type"] == "task_stream"
            found += messages_of(event) if event["type"] != "task_stream" else []
        assert found == rows            # the same, number for number
        got += sum(event["type"] == "task_stream" for event in stopped.ping())
        assert 0 < got < 1000
        call(repo, "task.report", task_id="t17-0", stream_type="turn_start", turn_num=9)
        for page in (stopped, live):    # and then it is told as before
            assert page.next("task_stream")["data"] == {
                "task_id": "t17-0", "stream_type": "turn_start", "turn_num": 9, "event_seq": 251}


def test_case_18_texts_are_throttled(repo):
    with Stream(repo) as page:
        page.ping()
        with repo.client() as client:
            for number in range(1, 21):
                done = client.call("task.report", task_id="t18", stream_type="text", text=f"word {number}", turn_num=1)
                assert done["event_seq"] == number
            client.call("task.report", task_id="t18", stream_type="turn_end", turn_num=1)
        live = []
        while (event := page.next("task_stream")["data"])["stream_type"] == "text":
            live.append((event["event_seq"], event["text"]))
        stored = json.loads(http_get(repo, "/api/coordinator/tasks/t18/events?type=text")[2])["events"]
        assert [(event["event_seq"], event["text"]) for event in stored] == [(number, f"word {number}") for number in range(1, 21)]
        assert stored[-1]["created_at"] - stored[0]["created_at"] < 1000, "too slow to be at once"
        assert live == [(number, f"word {number}") for number in range(1, 11)] and event["event_seq"] == 21


def test_case_19_a_message_that_was_taken_back(repo):
    thread, expected = thread_of(repo, 5)
    with Stream(repo) as before, Stream(repo) as page:
        assert numbers(before.subscribe(thread)["messages"]) == span(1, 5)
        for number in (3, 5):
            call(repo, "message.delete", message_id=expected[number - 1], caller_agent_id="ada")
        batch = page.subscribe(thread)
        assert numbers(batch["messages"]) == [1, 2, 4] and not batch["has_more"]
        later = fill(repo, thread, 2)
        for one in (before, page):
            rows = one.rows(2)
            assert (ids(rows), numbers(rows)) == (later, [6, 7])
        assert numbers(page.subscribe(thread, 2)["messages"]) == [4, 6, 7]


@pytest.mark.slow
def test_case_20_eight_processes(repo):
    thread, _ = thread_of(repo, 1)
    with Stream(repo, timeout=60) as page:
        page.subscribe(thread, 1)
        writers, rows = commands(repo, thread, 200), []
        while len(rows) < 1600:
            rows += messages_of(page.next("message", "batch"))
            page.ack(thread, rows[-1]["message_seq"])
        all_went_well(writers)
        assert numbers(rows) == span(2, 1601) and sorted(row["content"] for row in rows) == contents(8, 200)
        assert {event["type"] for event in page.ping()} <= {"inbox_message", "thread_state"}
    with Stream(repo) as page:
        assert numbers(page.subscribe(thread, 1590)["messages"]) == span(1591, 1601)


def test_case_21_a_thread_that_is_deleted(repo):
    scope = [{"type": "case", "value": "21"}]
    thread, _ = thread_of(repo, 3, scopes=scope)
    other, _ = thread_of(repo, 1)
    with Stream(repo) as page, Stream(repo) as second:
        for one in (page, second):
            one.subscribe(thread)
            one.subscribe(other)
            one.ping()
        assert call(repo, "message.deleteByScope", scope_type="case", scope_value="21", caller_agent_id="ada")["deleted_count"] == 3
        for one in (page, second):
            state = one.next("thread_state")["data"]
            assert (state["thread_id"], state["status"], state["last_seq"]) == (thread, "deleted", 3)
            one.say("subscribe", thread_id=thread, from_seq=0)
            assert one.error() == "SUBSCRIBE_FAILED"
        (last,) = fill(repo, other, 1)
        assert ids(page.rows(1)) == ids(second.rows(1)) == [last]


@pytest.mark.parametrize("code", [1000, 1001, 4000, None])
def test_case_22_a_close_is_echoed(repo, code):
    before = sockets_open(repo)
    thread, _ = thread_of(repo, 1)
    with Stream(repo) as page, Stream(repo) as other:
        page.subscribe(thread)
        page.ping()
        other.subscribe(thread)
        assert sockets_open(repo, before + 2) == before + 2
        payload = code.to_bytes(2, "big") + b"bye" if code else b""
        page.sock.sendall(thrum.encode_frame(thrum.CLOSE, payload, mask=b"mask"))
        assert page.end() == (code or 1005)
        assert page.sock.recv(1) == b""
        assert sockets_open(repo, before + 1) == before + 1
        assert numbers(other.rows(0)) == [] and ids(fill(repo, thread, 1) and other.rows(1))
    assert sockets_open(repo, before) == before
