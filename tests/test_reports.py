"""What agents report of tasks and processes: its intake and replay over HTTP, against a real daemon, and how much of it is kept."""

import json
import socket
import time

import pytest
from conftest import FakeWorld
from streams import call, calm, make
from wire import http_get, port_of

import thrum

EVENTS, TELEMETRY = "/api/coordinator/events", "/api/telemetry"
TEXT = {"task_id": "t", "stream_type": "text"}


@pytest.fixture(scope="module")
def repo(tmp_path_factory):
    repo = make(tmp_path_factory, "reports", "ada")
    call(repo, "task.report", **TEXT)
    yield repo
    calm(repo)
    repo.close()


def post(repo, path, value, **headers):
    """(status, answer) to a report."""
    status, _, body = http_get(repo, path, headers, "POST", value if isinstance(value, bytes) else json.dumps(value))
    return status, json.loads(body)


def replay(repo, task, query=""):
    status, _, body = http_get(repo, f"/api/coordinator/tasks/{task}/events?{query}")
    assert status == 200, body
    return json.loads(body)["events"]


def raw(repo, *requests, close=True):
    """What comes back for requests sent in one piece: pairs of status and body."""
    host = f"Host: localhost:{port_of(repo)}\r\n".encode()
    with socket.create_connection(("127.0.0.1", port_of(repo)), 10) as sock:
        data = b"".join(request.replace(b"\r\n", b"\r\n" + host, 1) for request in requests)
        sock.sendall(data)
        if close:
            sock.shutdown(socket.SHUT_WR)
        buffer, found = bytearray(), []
        while data := sock.recv(65536):
            buffer += data
        while buffer:
            head = thrum.decode_response_head(buffer)
            assert head, bytes(buffer)
            length = head.length
            found.append((head.status, bytes(buffer[:length])))
            del buffer[:length]
        return found


def request(body=b"", *lines, first="POST " + EVENTS + " HTTP/1.1", length=None):
    lines = [first, *lines, f"Content-Length: {len(body) if length is None else length}", "", ""]
    return "\r\n".join(lines).encode() + body


BODY = json.dumps({**TEXT, "task_id": "raw"}).encode()


# ---- intake

def test_a_task_from_start_to_end(repo):
    """What goes in comes out, in order, with its numbers."""
    task = {"task_id": "whole", "agent_id": "ada", "thread_id": "thr_x", "workspace": "/w", "directive": "fix", "directive_full": "fix it",
            "source_type": "direct"}
    events = [
        {**task, "stream_type": "status", "status": "running"}, {"stream_type": "turn_start", "turn_num": 1},
        {"stream_type": "text", "turn_num": 1, "text": "I look"},
        {"stream_type": "tool_use", "turn_num": 1, "tool_name": "Bash", "tool_input": "ls"},
        {"stream_type": "tool_result", "turn_num": 1, "tool_name": "Bash", "tool_output": "a\tb\n" + "x" * 5000},
        {"stream_type": "error", "turn_num": 1, "error_msg": "no such file"}, {"stream_type": "turn_end", "turn_num": 1},
        {"stream_type": "status", "status": "completed", "tokens_in": 5, "tokens_out": 7, "cost": 0.25, "duration_sec": 61}]
    events = [{"task_id": "whole", **event} for event in events]
    for number, event in enumerate(events, 1):
        assert post(repo, EVENTS, event) == (200, {"success": True, "event_seq": number})
    found = replay(repo, "whole")
    assert [{name: value for name, value in event.items() if name not in ("event_seq", "created_at")} for event in found] == events
    assert [event["event_seq"] for event in found] == list(range(1, 9))
    assert all(abs(event["created_at"] / 1000 - time.time()) < 600 for event in found)
    assert call(repo, "task.events", task_id="whole")["events"] == found
    assert [event["stream_type"] for event in replay(repo, "whole", "type=status")] == ["status", "status"]
    assert [event["event_seq"] for event in replay(repo, "whole", "turn=1&limit=2")] == [6, 7]
    assert [event["event_seq"] for event in replay(repo, "whole", "turn=2")] == []
    assert [event["event_seq"] for event in replay(repo, "whole", "limit=&type=&format=")] == list(range(1, 9))
    status, headers, text = http_get(repo, "/api/coordinator/tasks/whole/events?format=text")
    assert (status, headers["content-type"]) == (200, "text/plain; charset=utf-8")
    assert text.decode().split("\n")[:5] == ["[running]", "--- turn 1 ---", "I look", "> Bash ls", "< Bash a\tb"]
    assert text.decode().endswith("\n! no such file\n--- turn 1 ends ---\n[completed]: 1m, 5 tokens in, 7 out, $0.2500\n")
    summary = json.loads(http_get(repo, "/api/coordinator/tasks/whole/events?format=summary")[2])["summary"]
    assert {**summary, "started_at": 0, "updated_at": 0} == {
        "task_id": "whole", "status": "completed", "agent_id": "ada", "thread_id": "thr_x", "workspace": "/w", "directive": "fix",
        "source_type": "direct", "turns": 1, "tokens_in": 5, "tokens_out": 7, "cost": 0.25, "duration_sec": 61, "events": 8,
        "started_at": 0, "updated_at": 0, "tools": {"Bash": 1}, "errors": ["no such file"]}
    assert call(repo, "task.list")["tasks"][0]["task_id"] == "whole"


@pytest.mark.parametrize("change, text", [
    ({"task_id": 7}, "task_id must be a string"), ({"task_id": ""}, "task_id is required"), ({"task_id": "a\nb"}, "task_id must be a text"),
    ({"task_id": "x" * 257}, "task_id must be a text"), ({"stream_type": "nope"}, "stream_type must be one of status, turn_start"),
    ({"stream_type": None}, "stream_type is required"), ({"text": 5}, "text must be a string"), ({"text": ["a"]}, "text must be a string"),
    ({"turn_num": "1"}, "turn_num must be an integer"), ({"turn_num": 1.5}, "turn_num must be an integer"),
    ({"turn_num": True}, "turn_num must be an integer"), ({"turn_num": -1}, "turn_num must not be negative"),
    ({"turn_num": 1 << 60}, "turn_num is out of range"), ({"tokens_in": 10 ** 30}, "tokens_in is out of range"),
    ({"cost": "1"}, "cost must be a number"), ({"cost": -0.5}, "cost must not be negative"), ({"cost": 1e300}, "cost is out of range"),
    ({"text": "\ud800"}, "text is not valid UTF-8"), ({"text": "x" * 70_000}, "this is too large: 70,050 bytes, the limit is 65,535")])
def test_reports_that_are_wrong(repo, change, text):
    status, answer = post(repo, EVENTS, {**TEXT, "task_id": "wrong", **change})
    assert status == 400 and text in answer["error"], answer
    assert http_get(repo, "/api/coordinator/tasks/wrong/events")[0] == 404       # nothing of it was kept


@pytest.mark.parametrize("body", [
    b"", b"{", b"[]", b"null", b'"x"', b"\xff", b"[" * 100_000, b'{"task_id":"wrong","stream_type":"text","cost":NaN}',
    b'{"task_id":"wrong","stream_type":"text","cost":1e999}', b'{"task_id":"wrong","turn_num":' + b"9" * 5000 + b"}"])
def test_bodies_that_are_no_object(repo, body):
    """What comes back is ours: no words of a library."""
    for path in (EVENTS, TELEMETRY):
        assert post(repo, path, body) == (400, {"error": "the body must be a JSON object, limit and turn integers"})


def test_telemetry(repo):
    assert post(repo, TELEMETRY, {"pid": 77}) == (200, {"status": "ok"})
    assert post(repo, TELEMETRY, {"pid": 77, "turns": 2, "tokens_in": 3, "tokens_out": 4, "cost": 1, "status": "completed"})[0] == 200
    (found,) = [one for one in call(repo, "telemetry.list")["instances"] if one["instance_id"] == "external_77"]
    assert [found[name] for name in ("pid", "turns", "tokens_in", "tokens_out", "cost", "status")] == [77, 2, 3, 4, 1, "completed"]
    assert len(found["history"]) in (1, 2)       # one for each half minute
    for wrong in ({"pid": "77"}, {"pid": -1}, {"instance_id": "a\x00"}, {"cost": []}, {"status": "a\nb"}):
        assert post(repo, TELEMETRY, wrong)[0] == 400


@pytest.mark.parametrize("path, allowed", [
    (EVENTS, ["POST"]), (TELEMETRY, ["POST"]), ("/api/coordinator/tasks/whole/events", ["GET", "HEAD"])])
def test_other_methods(repo, path, allowed):
    for method in ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"):
        status, headers, _ = http_get(repo, path, method=method)
        assert (status == 405) == (method not in allowed), method
        assert headers.get("allow") == (None if method in allowed else ", ".join(allowed))


# ---- replay

@pytest.mark.parametrize("task", ["a/b", "ä b?%#&", "..", "a%2Fb", "é", "日本 1", "+"])
def test_any_task_id_comes_back(repo, task):
    assert post(repo, EVENTS, {**TEXT, "task_id": task, "text": task})[0] == 200
    quoted = "".join(f"%{byte:02X}" for byte in task.encode())
    assert [event["text"] for event in replay(repo, quoted)] == [task]


@pytest.mark.parametrize("path, status", [
    ("/api/coordinator/tasks/nothing/events", 404), ("/api/coordinator/tasks//events", 404), ("/api/coordinator/tasks/%FF/events", 404),
    ("/api/coordinator/tasks/a/b/events", 404), ("/api/coordinator/tasks", 404), ("/api/threads", 404), ("/api/", 404),
    ("/api/coordinator/tasks/t/events?limit=x", 400), ("/api/coordinator/tasks/t/events?limit=1.5", 400),
    ("/api/coordinator/tasks/t/events?limit=1_0", 400), ("/api/coordinator/tasks/t/events?limit=%D9%A3", 400),
    ("/api/coordinator/tasks/t/events?turn=" + "9" * 30, 400), ("/api/coordinator/tasks/t/events?turn=" + "9" * 5000, 400),
    ("/api/coordinator/tasks/t/events?type=nope", 400), ("/api/coordinator/tasks/t/events?format=xml", 400)])
def test_what_cannot_be_replayed(repo, path, status):
    found = http_get(repo, path)
    assert found[0] == status and b"int()" not in found[2] and b"sys." not in found[2] and len(found[2]) < 200, found


def test_a_task_keeps_its_last_thousand(repo):
    """Its numbers go on; a replay gives 500 unless it is asked for more, and never more than a thousand."""
    with repo.client() as client:
        for number in range(1, 1102):
            done = client.call("task.report", task_id="long", stream_type="tool_result", tool_name="Bash", tool_output=f"line {number}")
            assert done["event_seq"] == number
    for query, count in (("", 500), ("limit=1000", 1000), ("limit=5000", 1000), ("limit=3", 3), ("limit=0", 1), ("limit=-4", 1)):
        found = replay(repo, "long", query)
        assert [event["event_seq"] for event in found] == list(range(1102 - count, 1102)), query
        assert found[0]["tool_output"] == f"line {found[0]['event_seq']}"
    assert json.loads(http_get(repo, "/api/coordinator/tasks/long/events?format=summary&limit=1")[2])["summary"]["events"] == 1101


# ---- the connection

def test_bodies_that_are_too_long_or_of_no_length(repo):
    most = thrum.BODY_MAX
    assert raw(repo, request(length=most + 1)) == [(413, b"Content Too Large\n")]
    assert raw(repo, request(b"", "Expect: 100-continue", length=1 << 40)) == [(413, b"Content Too Large\n")]
    assert raw(repo, request(b" " * (most - len(BODY)) + BODY))[0][0] == 200
    chunked = b"POST " + EVENTS.encode() + b" HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\n\r\n"
    assert raw(repo, chunked) == [(411, b"Length Required\n")]
    assert [status for status, _ in raw(repo, request(BODY, "Content-Length: 3"))] == [400]
    assert raw(repo, request(BODY, length=len(BODY) + 1)) == []      # it never comes: nothing is answered, nothing kept


def test_a_client_that_asks_before_it_sends(repo):
    asks = request(BODY, "Expect: 100-continue")
    (first, _), (second, body) = raw(repo, asks)
    assert (first, second) == (100, 200) and json.loads(body)["success"]
    old = request(BODY, "Expect: 100-continue", first=f"POST {EVENTS} HTTP/1.0")
    assert [status for status, _ in raw(repo, old)] == [200]        # it would take the 100 for its answer
    with socket.create_connection(("127.0.0.1", port_of(repo)), 10) as sock:
        head = asks[:-len(BODY)].replace(b"\r\n", f"\r\nHost: localhost:{port_of(repo)}\r\n".encode(), 1)
        sock.sendall(head)
        assert sock.recv(1000) == b"HTTP/1.1 100 Continue\r\n\r\n"
        sock.sendall(BODY)
        assert sock.recv(1000).startswith(b"HTTP/1.1 200 OK\r\n")


def test_one_connection_carries_many_reports(repo):
    """Also behind what was refused; what could not be read to its end closes it."""
    get = b"GET /health HTTP/1.1\r\n\r\n"
    before = len(replay(repo, "raw"))
    found = raw(repo, request(BODY), request(b"{}"), request(b"["), request(BODY), get, request(first="GET /api/nothing HTTP/1.1"), get)
    assert [status for status, _ in found] == [200, 400, 400, 200, 200, 404]
    assert len(replay(repo, "raw")) == before + 2
    missing = request(first="GET /api/coordinator/tasks/nothing/events HTTP/1.1")
    assert [status for status, _ in raw(repo, missing, request(BODY), missing, get)] == [404, 200, 404, 200]
    assert [status for status, _ in raw(repo, *[request(BODY)] * 50)] == [200] * 50
    closing = request(BODY, "Connection: close")
    assert [status for status, _ in raw(repo, closing, request(BODY), close=False)] == [200]


# ---- how much is kept

@pytest.fixture
def store():
    store = thrum.Store(":memory:", FakeWorld(), writable=True)
    store.create()
    store.begin()
    yield store
    store.close()


def test_the_bound_of_all_events(store):
    """Of tasks with many events, the oldest events go; of many tasks, the ones that nobody has reported for the longest time."""
    each, now = thrum.TASK_EVENTS_MAX - 1, 1
    for number in range(thrum.TASK_ROWS_MAX // each + 3):
        for _ in range(each):
            store.add_task_event({"task_id": f"t{number}", "stream_type": "text"}, now := now + 1)
    assert thrum.TASK_ROWS_MAX - each <= store.value("select count(*) from task_events") <= thrum.TASK_ROWS_MAX
    assert store.task_events("t0", 10) == [] and store.task("t0")["events"] == each
    assert [row["event_seq"] for row in store.task_events(f"t{number}", 2)] == [each - 1, each]
    for number in range(thrum.TASKS_MAX + 5):
        store.add_task_event({"task_id": f"u{number}", "stream_type": "text"}, now := now + 1)
    assert store.value("select count(*) from tasks") == thrum.TASKS_MAX
    assert store.task("u4") is None and store.task("u5") and store.task_events("u4", 1) == []
    assert store.value("select count(*) from task_events where task_id not in (select task_id from tasks)") == 0
    assert store.add_task_event({"task_id": "u4", "stream_type": "text"}, now + 1) == 1      # it begins anew
    store.add_task_event({"task_id": "late", "stream_type": "text"}, now + thrum.REPORTS_S * thrum.NS + 2)
    assert [task["task_id"] for task in store.tasks(10)] == ["late"]


def test_the_bound_of_telemetry(store, monkeypatch):
    monkeypatch.setattr(thrum, "TELEMETRY_MAX", 2_000)
    slot = thrum.TELEMETRY_SLOT_S * thrum.NS
    for number in range(1000):
        store.add_telemetry({"instance_id": "one", "turns": number}, number * slot // 2)
    found = store.telemetry(5)["one"]
    assert len(found) == thrum.TELEMETRY_SLOTS and [data["turns"] for _, data in found] == list(range(761, 1000, 2))
    many, now = 40, 1000 * slot
    for number in range(60 * many):
        store.add_telemetry({"instance_id": f"i{number % many}"}, now := now + slot // many)
    assert store.value("select count(*) from telemetry") == thrum.TELEMETRY_MAX
    assert {len(reports) for reports in store.telemetry(many).values()} <= {50, 51}
    store.add_telemetry({"instance_id": "late"}, now + thrum.REPORTS_S * thrum.NS)
    assert list(store.telemetry(10)) == ["late"]
