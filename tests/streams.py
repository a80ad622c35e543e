"""What the tests of the thread stream share: its client, which looks at each event, and writers who fill threads."""

import contextlib
import itertools
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from conftest import CLEAN, ROOT, Repo
from wire import Wire, sockets_open

MESSAGE = "id thread_id message_seq created_at from_type from_id to_type to_id kind subject? content metadata_json?"
DATA = {                        # spec/stream.md, section 4.2 and 9: the keys of an event's data in their order
    "message": MESSAGE, "batch": "thread_id messages has_more", "thread_state": "thread_id status last_seq updated_at",
    "inbox_message": "id message_id correlation_id? from_agent to_inbox message_type title payload? status created_at",
    "telemetry": "instance_id pid turns tokens_in tokens_out cost status duration_sec", "error": "code message",
    "task_stream": "task_id thread_id? stream_type turn_num? text? tool_name? tool_input? tool_output? error_msg? status? tokens_in? "
                   "tokens_out? cost? duration_sec? workspace? directive? directive_full? agent_id? source_type? event_seq?"}
NUMBERS = {"message_seq", "created_at", "last_seq", "updated_at", "pid", "turns", "tokens_in", "tokens_out", "duration_sec", "event_seq"}
PASSING = ("thread_state", "inbox_message", "telemetry", "task_stream")     # what comes between what a test waits for
WRITERS = 8                     # connections that fill a thread


def check_data(kind, data):
    """The keys of an event's data are there and in order, and numbers are numbers."""
    keys = iter(data)
    key = next(keys, None)
    for name in DATA[kind].split():
        if key == name.rstrip("?"):
            key = next(keys, None)
        else:
            assert name.endswith("?"), (kind, name, data)
    assert key is None, (kind, key, data)
    assert all(type(value) is int for name, value in data.items() if name in NUMBERS), data
    for message in data.get("messages", ()):
        check_data("message", message)
        assert message["thread_id"] == data["thread_id"]


def check_event(event):
    bare = event["type"] == "pong"
    assert list(event) == (["type", "timestamp"] if bare else ["type", "timestamp", "data"]), event
    assert type(event["timestamp"]) is int and abs(event["timestamp"] / 1000 - time.time()) < 600
    if not bare:
        check_data(event["type"], event["data"])


def messages_of(event):
    return event["data"]["messages"] if event["type"] == "batch" else [event["data"]]


class Stream(Wire):
    """A client of /ws/stream."""

    def __init__(self, repo, instance="", **more):
        super().__init__(repo, f"/ws/stream?instance_id={instance}", **more)

    def say(self, kind, **data):
        self.send({"type": kind, "data": data} if data else {"type": kind})

    def take(self):
        event = super().take()
        check_event(event)
        return event

    def next(self, *kinds):
        """The next event of these kinds; of others only the ones in PASSING may come before."""
        while True:
            event = self.take()
            if event["type"] in kinds:
                return event
            assert event["type"] in PASSING, event

    def error(self):
        """The code of the next error."""
        return self.next("error")["data"]["code"]

    def subscribe(self, thread, from_seq=0):
        """The batch that confirms it."""
        self.say("subscribe", thread_id=thread, from_seq=from_seq)
        event = self.next("batch")
        assert event["data"]["thread_id"] == thread
        return event["data"]

    def ack(self, thread, seq):
        self.say("ack", thread_id=thread, ack_seq=seq)

    def rows(self, count):
        """The next messages, so many."""
        found = []
        while len(found) < count:
            found += messages_of(self.next("batch", "message"))
        assert len(found) == count, (len(found), count)
        return found

    def ping(self):
        """The events up to the answer to a ping."""
        self.say("ping")
        found = []
        while (event := self.take())["type"] != "pong":
            found.append(event)
        return found


def numbers(rows):
    return [row["message_seq"] for row in rows]


def ids(rows):
    return [row["id"] for row in rows]


def span(first, last):
    return list(range(first, last + 1))


def make(tmp_path_factory, name, *agents, **settings):
    """A repository with agents and its daemon; `settings` of the daemon."""
    repo = Repo(Path(tmp_path_factory.mktemp(name)))
    repo.git("init", "-q")
    repo.ok("init")
    for agent in agents:
        repo.join(agent)
    for setting, value in settings.items():
        repo.ok("config", "set", "daemon." + setting, value)
    if settings:
        repo.ok("daemon", "restart")
    return repo


@contextlib.contextmanager
def patched(repo, patch):
    """A daemon as our child, with lines of Python executed before; it is killed if it is still there."""
    code = (f"import sys; sys.path.insert(0, {str(ROOT)!r}); import thrum\n{patch}\n"
            f"thrum.main(['daemon', 'run', '--repo', {str(repo.path)!r}])")
    process = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
                               text=True, cwd="/", env=CLEAN)
    try:
        line = process.stderr.readline()
        assert "serving" in line, line
        yield process
    finally:
        process.kill()
        process.communicate()


def calm(repo):
    """Nobody is connected any more, and the daemon has nothing to complain of."""
    assert sockets_open(repo) == 0
    log = "".join(path.read_text() for path in sorted(repo.var.glob("daemon.log*")))
    assert "ERROR" not in log and "Traceback" not in log, log[-3000:]


def call(repo, method, **params):
    with repo.client() as client:
        return client.call(method, **params)


def send(repo, content="m", thread="", author="ada", **more):
    return call(repo, "message.send", content=content, caller_agent_id=author, **({"thread_id": thread} if thread else {}), **more)


def fill(repo, thread, count, content="row {}", **more):
    """Write so many messages into a thread from several connections at once; their ids, in the order of the journal."""
    numbered, sent = itertools.count(1), []

    def write():
        with repo.client() as client:
            while (number := next(numbered)) <= count:
                done = client.call("message.send", content=content.format(number), thread_id=thread, caller_agent_id="ada", **more)
                sent.append((done["seq"], done["message_id"]))
    with ThreadPoolExecutor(WRITERS) as pool:
        for one in [pool.submit(write) for _ in range(min(WRITERS, count))]:
            one.result()
    assert len(sent) == count
    return [message_id for _, message_id in sorted(sent)]


def thread_of(repo, count, **more):
    """(id, ids of the messages in order) of a new thread."""
    first = send(repo, "begin", **more)
    thread = "thr_" + first["message_id"][4:]
    return thread, [first["message_id"], *fill(repo, thread, count - 1, **more)]
