"""Thread streams under attack: what a client may say at any time, while others write, and while the daemon comes and goes."""

import thrum
from streams import Stream, call, fill, make, numbers, thread_of


class Script(thrum.ThreadStream):
    """A ThreadStream without sockets, whose Asks a test answers when it likes; `sent` is what it told."""

    def __init__(self, now):
        self.sent = []
        super().__init__(thrum.Streams(), "user", now, lambda payload, spare: self.sent.append(thrum.decode(payload)) or True, None,
                         lambda: None)

    def follow(self, thread, now, left=0):
        ask = self.take(thrum.encode({"type": "subscribe", "data": {"thread_id": thread, "from_seq": 0}}), now)
        self.answered(ask, {"thread": thread, "after": 0, "number": 0, "left": left}, now)

    def count(self):
        found, self.sent = sum(len(event["data"]["messages"]) if event["type"] == "batch" else event["type"] == "message"
                               for event in self.sent), []
        return found


def test_what_is_asked_for_counts_for_the_rate():
    """Messages of another thread must not take the places of those that an answer is going to bring."""
    stream, now, seq = Script(0), 0, 0
    page = {"thread": "a", "skipped": 0, "after": 0, "passed": 0, "left": 0, "more": False, "reached": 0, "state": None, "rows": []}
    stream.follow("b", now)
    stream.answered(stream.due(now), {**page, "thread": "b"}, now)
    stream.follow("a", now, left=1000)
    sent = []                   # (time, messages)
    for second in range(4):
        now = second * thrum.NS
        ask = stream.due(now)
        rows = [(place, {"id": place}) for place in range(1, ask.params["limit"] + 1)]
        for _ in range(4):
            came = [(seq := seq + 1, {"id": seq}) for _ in range(25)]
            stream.came(stream.followed["b"], came, now, {})
        stream.answered(ask, {**page, "rows": rows, "passed": len(rows), "left": 1000, "reached": seq}, now)
        sent.append((now, stream.count()))
    assert max(first + second for (_, first), (_, second) in zip(sent, sent[1:])) <= 200, sent


def test_what_was_acknowledged_survives_a_stop(tmp_path_factory):
    """Also when the daemon has to wait for a client that does not answer its Close."""
    repo = make(tmp_path_factory, "stop", "ada")
    thread, _ = thread_of(repo, 5)
    with Stream(repo, "ada") as page:
        assert numbers(page.subscribe(thread)["messages"]) == [1, 2, 3, 4, 5]
        page.ping()
        page.ack(thread, 4)
        page.ping()
        call(repo, "daemon.stop")
        assert b"\x03\xe9" in page.sock.recv(1000)      # 1001: it takes this for an answer that is late
        repo.ok("daemon", "start")
    fill(repo, thread, 1)
    with Stream(repo, "ada") as page:
        assert numbers(page.subscribe(thread, -1)["messages"]) == [5, 6]
    repo.close()
