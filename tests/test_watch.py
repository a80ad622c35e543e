"""The live feed in a terminal, the commands for subscriptions, and notifications for Python programs."""

import json
import os
import queue
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading

import pytest

import thrum
from conftest import CLEAN, THRUM
from team import END_S, POISON, Proxy, Team, error_line, finish, raw_in, start

pytestmark = pytest.mark.slow
LINE = re.compile(r"\d\d:\d\d:\d\dZ  (.*)")


@pytest.fixture(scope="module")
def team(tmp_path_factory):
    made = Team(tmp_path_factory.mktemp("watch") / "a team")
    yield made
    made.close()


@pytest.fixture
def fresh(tmp_path):
    made = Team(tmp_path / "fresh")
    yield made
    made.close()


class Feed:
    """A `thrum watch` that runs; what it prints comes line by line."""

    def __init__(self, repo, *args, **more):
        self.process = start(repo, "watch", *args, **more)
        self.lines = queue.Queue()
        self.reader = threading.Thread(target=self._read, daemon=True)
        self.reader.start()

    def _read(self):
        for line in self.process.stdout:
            self.lines.put(line.decode().rstrip("\n"))
        self.lines.put(None)

    def next(self):
        return self.lines.get(timeout=END_S)

    def until(self, text):
        """The lines up to one with a text in it, that one included."""
        found = []
        while not found or text not in found[-1]:
            found.append(self.next())
            assert found[-1] is not None, (found, self.process.stderr.read())
        return found

    def stop(self):
        """End it as Ctrl-C does; gives what else it has printed on stdout, and all of stderr."""
        self.process.send_signal(signal.SIGINT)
        assert self.process.wait(END_S) == 130
        self.reader.join(END_S)
        rest = []
        while (line := self.next()) is not None:
            rest.append(line)
        with self.process.stderr as stderr:
            return rest, stderr.read().decode()

    def __enter__(self):
        return self

    def __exit__(self, *what):
        self.process.kill()
        self.process.wait()
        self.reader.join(END_S)
        self.process.stdout.close()
        self.process.stderr.close()


def words(lines):
    """What the lines say, without their times."""
    return [LINE.fullmatch(line)[1] for line in lines]


def begin(repo, *args, **more):
    """A feed that begins at a known point: after what is there now."""
    with repo.client() as client:
        return Feed(repo, "--since", str(client.call("health")["last_seq"]), *args, **more)


# ---- what it says

def test_one_line_for_each_thing(team):
    ada, bob = team.ada, team.bob
    with begin(ada) as feed:
        first = team.mail("Parser is ready\nfor review")
        bob.ok("reply", first, "Looks good")
        ada.ok("send", "to all")
        ada.ok("message", "edit", first, "Parser is done")
        ada.ok("group", "create", "backend")
        ada.ok("group", "add", "backend", "@bob")
        ada.ok("send", "to a group", "--to", "@backend")
        ada.ok("group", "add", "backend", "--role", "planner")
        ada.ok("group", "remove", "backend", "@bob")
        ada.ok("group", "delete", "backend")
        bob.ok("claim", "src/parser.py", "--ttl", "1h", "--note", "new lexer")
        bob.ok("claim", "src/parser.py", "--ttl", "2h", "--note", "")
        bob.ok("release")
        bob.ok("session", "set-intent", "Review")
        bob.ok("session", "set-task", "T-1")
        bob.ok("session", "heartbeat", "--add-scope", "a:b")
        bob.ok("inbox")
        ada.ok("message", "delete", first, "--force", "--reason", "wrong")
        bob.ok("session", "end")
        bob.ok("session", "start")
        bob.ok("session", "start")
        team.mail("the end")
        lines = feed.until("the end")
        feed.stop()
    assert words(lines) == [
        "@ada → @bob: Parser is ready for review", "@bob → @ada: ↳ Looks good", "@ada → @everyone: to all",
        "@ada → @bob (edited): Parser is done", "@ada created the group backend", "@ada added @bob to backend",
        "@ada → @backend: to a group", "@ada added role:planner to backend", "@ada took @bob out of backend",
        "@ada deleted the group backend", "@bob claimed src/parser.py for 1h: new lexer",
        "@bob renewed the claim on src/parser.py for 2h: new lexer", "@bob no longer claims src/parser.py", "@bob intends: Review",
        "@bob is at task T-1", f"@ada took back {first}: wrong", "@bob left", "@bob joined",
        "@bob left: its session had been left open", "@bob joined", "@ada → @bob: the end"]
    with Feed(ada, "--since", "0", "--topic", "messages") as feed:
        assert words(feed.until("the end"))[0] == "@ada → @bob: (taken back)", "the past is told as it is now"


def test_receipts_are_told_only_to_those_who_ask(team):
    team.clear()
    with begin(team.ada, "--topic", "receipts") as feed:
        ids = [team.mail(f"number {n}") for n in range(2)]
        team.bob.ok("message", "read", ids[0])
        team.bob.ok("wait", "--unread")
        lines = words(feed.until("by wait"))
    assert f"@bob read {ids[0]}" in lines and lines[-1] == f"@bob got {ids[1]} by wait"


def test_removals(fresh):
    cara = fresh.ada.worktree("cara")
    cara.join("cara", "tester")
    with begin(fresh.ada) as feed:
        fresh.mail("to be purged")
        fresh.ada.ok("agent", "delete", "cara", "--force")
        fresh.ada.ok("purge", "--all", "--confirm")
        fresh.mail("the end")
        lines = words(feed.until("the end"))
    assert lines[:2] == ["@ada → @bob: to be purged", "@cara was deleted, with everything it wrote"]
    assert re.fullmatch(r"everything from before \d{4}-\d\d-\d\d \d\d:\d\d:\d\d was purged", lines[-2])
    with Feed(fresh.ada, "--since", "0") as feed:
        assert "to be purged" not in "\n".join(feed.until("the end"))


def test_json_is_one_object_a_line_in_the_shape_of_event_wait(team):
    with team.ada.client() as client:
        after = client.call("health")["last_seq"]
        with Feed(team.ada, "--json", "--since", str(after)) as feed:
            team.mail("für dich\u2028\x1b[31m \x7f", None, "@bob", "--scope", "a:b")
            team.bob.ok("claim", "src")
            lines = feed.until("claim.take")
            assert feed.stop() == ([], "")
        assert [json.loads(line) for line in lines] == client.call(
            "event.wait", after_seq=after, topics=["messages", "claims", "agents", "groups"])["events"]
        assert all(line.isascii() and line.isprintable() for line in lines)
    team.bob.ok("release")


@pytest.mark.parametrize("flags, texts", [
    ("--from @bob", ["from bob", "bob's claim"]), ("--from ada", ["to bob", "to planner", "to all"]),
    ("--to @bob", ["to bob", "to all"]), ("--to planner", ["to planner"]), ("--to @everyone", ["to all"]),
    ("--scope module:auth", ["to planner"]), ("--topic claims", ["bob's claim"]), ("--topic groups,claims", ["bob's claim"]),
    ("--topic messages --topic claims --from bob", ["from bob", "bob's claim"])])
def test_filters(team, flags, texts):
    with begin(team.ada, *flags.split()) as feed:
        team.mail("to bob")
        team.mail("to planner", None, "@planner", "--scope", "module:auth")
        team.bob.ok("send", "from bob", "--to", "@ada")
        team.ada.ok("send", "to all")
        team.bob.ok("claim", "src", "--note", "bob's claim")
        team.bob.ok("release")
        lines = feed.until(texts[-1])
    shown = [next((text for text in texts if text in line), line) for line in lines]
    assert shown == texts


def test_since_limit_and_day(team):
    ada = team.ada
    for n in range(4):
        team.mail(f"number {n}")
    assert words(ada.ok("watch", "--since", "1h", "--limit", "2", "--topic", "agents").splitlines()) == \
        ["@ada registered as planner for core", "@ada joined"]
    with ada.client() as client:
        events = client.call("event.wait", after_seq=0, topics=["messages"], limit=400)["events"]
    assert words(ada.ok("watch", "--since", str(events[-3]["seq"]), "--limit", "2").splitlines()) == \
        ["@ada → @bob: number 2", "@ada → @bob: number 3"]
    assert words(ada.ok("watch", "--since", events[-2]["timestamp"], "--limit", "1").splitlines()) == ["@ada → @bob: number 3"]


def test_it_begins_with_now(fresh, tmp_path):
    proxy = Proxy(fresh.ada, tmp_path)
    try:
        for number, flags in ((1, ()), (2, ("--since", "999999999"))):
            fresh.mail("before")
            with Feed(fresh.ada, *flags, env=proxy.env()) as feed:
                while proxy.await_record("S")[0] != number:
                    pass        # of the one before
                fresh.mail("after")
                assert words(feed.until("after")) == ["@ada → @bob: after"]
    finally:
        proxy.close()


class Script(thrum.Console):
    """A console whose daemon answers `event.wait` as a test says: with (numbers and stamps of sessions that end, what remains)."""

    def __init__(self, *answers, cursor="", epoch="one", last=9):
        super().__init__(thrum.World(), top="/", cwd="/", argv=[], environ={}, identities=[], cursor=cursor)
        self.answers, self.epoch, self.last, self.asked, self.done = list(answers), epoch, last, [], []

    async def call(self, method, **params):
        if method == "health":
            return {"epoch": self.epoch, "last_seq": self.last}
        self.asked.append({k: v for k, v in params.items() if k in ("after_seq", "epoch", "created_after", "timeout_ms")})
        events, remaining = self.answers.pop(0)
        return {"events": [{"seq": seq, "type": "agent.session.end", "timestamp": stamp, "agent_id": f"a{seq}"} for seq, stamp in events],
                "after_seq": events[-1][0] if events else params["after_seq"], "epoch": self.epoch, "remaining": remaining}

    async def write(self, stream, text):
        self.done.append(text)

    async def resume_at(self, cursor):
        self.done.append(json.loads(cursor))

    def run(self, *words):
        self.args = thrum.parse_command(thrum.COMMANDS["watch"], list(words))
        assert thrum.run_now(thrum.watch(self, self.args)) == 0
        return [one for one in self.done if type(one) is str], [one["after_seq"] for one in self.done if type(one) is dict]


def test_each_batch_is_followed_by_where_to_go_on():
    script = Script(([(10, "2099-01-01T01:00:00.000000001Z"), (11, "2099-01-01T23:00:00.000000001Z")], 3), ([], 0),
                    ([(14, "2099-01-02T00:00:00.000000001Z")], 0))
    texts, cursors = script.run("--limit", "3")
    assert texts == ["2099-01-01\n01:00:00Z  @a10 left\n23:00:00Z  @a11 left\n", "2099-01-02\n00:00:00Z  @a14 left\n"]
    assert cursors == [9, 11, 14] and [type(one) for one in script.done] == [dict, str, dict, str, dict]
    assert [one["after_seq"] for one in script.asked] == [9, 11, 11] and script.asked[0]["timeout_ms"] == thrum.WAIT_CALL_MS


def test_where_it_goes_on_with_the_same_journal_and_with_another():
    """With the same, after the last number; with another, with what is younger than all that was shown, until it has caught up."""
    first = Script(([(10, "2099-01-01T01:00:00.000000001Z"), (11, "2098-01-01T01:00:00.000000001Z")], 0))
    first.run("--limit", "2")
    cursor = {**first.done[-1], "left": 1}
    same = Script(([(12, "2099-01-01T02:00:00.000000001Z")], 0), cursor=json.dumps(cursor))
    assert same.run("--limit", "9")[0] == ["2099-01-01\n02:00:00Z  @a12 left\n"], "how many are left is in the cursor"
    assert same.asked == [{"after_seq": 11, "epoch": "one", "created_after": None, "timeout_ms": thrum.WAIT_CALL_MS}]
    other = Script(([], 5), ([(3, "2099-01-01T03:00:00.000000001Z")], 0), ([(4, "2000-01-01T03:00:00.000000001Z")], 0),
                   cursor=json.dumps({**cursor, "left": 2}), epoch="two")
    other.run()
    since = {"epoch": "two", "created_after": "2099-01-01T01:00:00.000000001Z", "timeout_ms": 0}
    assert other.asked == [{"after_seq": 0, **since}, {"after_seq": 0, **since}, {
        "after_seq": 3, "epoch": "two", "created_after": None, "timeout_ms": thrum.WAIT_CALL_MS}]


def _console(width=80, **environ):
    return thrum.Console(thrum.World(), top="/", cwd="/", argv=[], environ=environ, identities=[], terminals="1", width=width)


@pytest.mark.parametrize("words, text", [
    ("--topic nope", "no topic 'nope' to watch; there are agents, messages, receipts, claims, groups"),
    ("--topic presence", "no topic 'presence' to watch"), ("--limit 0", "invalid limit"),
    ("--limit x", 'invalid argument "x" for "--limit"'),
    ("--since yesterday", 'invalid --since value: unrecognized time specification "yesterday"'), ("--scope x", "invalid scope: "),
    ("--since -5m", "invalid --since value"), ("--topic", "flag needs an argument: --topic")])
def test_refusals(team, words, text):
    before = team.trace()
    assert error_line(team.ada.run("watch", *words.split())).startswith(text)
    assert team.trace() == before


def test_nothing_raw_and_nothing_too_wide():
    event = {"type": "message.create", "timestamp": "2026-03-10T09:15:00.000000001Z", "agent_id": "ada\x1b[2J", "content": POISON * 9,
             "audiences": [{"type": "mention", "value": POISON}] * 5, "deleted": False, "seq": 1}
    wide = {**event, "content": "解析器的设计" * 40, "agent_id": "ada", "audiences": [{"type": "mention", "value": "bob"}]}
    texts = ("content path name reason note intent current_task role module member_type member_value message_id thread_id route "
             "receipt_type cutoff agent_id").split()
    others = [{**dict.fromkeys(texts, POISON), "message_ids": [POISON], "type": kind, "timestamp": event["timestamp"]}
              for kind in thrum.types_of([])]
    for width in (40, 61, 80, 200):
        for one in (event, wide, *others):
            console = _console(width)
            line = thrum._happening(one, console)
            assert thrum.columns(line) <= width, line
            assert not raw_in(console.harmless(line).replace(thrum.BOLD, "").replace(thrum.NORMAL, ""))
    assert thrum.columns(thrum._happening(wide, _console(80))) >= 79, "it uses the width that there is"
    assert {one["type"] for one in others if not thrum._happening(one, _console())} == {"agent.update"}
    assert thrum.BOLD in thrum._happening(wide, _console()) and thrum.BOLD not in thrum._happening(wide, _console(NO_COLOR="1"))


# ---- without a gap

def test_it_goes_on_with_the_next_daemon(team):
    with begin(team.ada) as feed:
        team.mail("before")
        feed.until("before")
        team.ada.ok("daemon", "restart")
        team.mail("after")
        assert words(feed.until("after")) == ["@ada → @bob: after"]
        team.ada.ok("daemon", "stop")
        team.ada.ok("daemon", "start")
        team.mail("again")
        assert words(feed.until("again")) == ["@ada → @bob: again"]
        rest, err = feed.stop()
    assert rest == [] and err.startswith("Lost connection to daemon, reconnecting...\n") and not err.replace(
        "Lost connection to daemon, reconnecting...\n", "")


@pytest.mark.parametrize("by", ["launcher", "script"])
def test_nothing_is_missed_or_shown_twice_over_kill_9(fresh, by):
    """The daemon is killed again and again in the middle of a burst: what senders were promised is shown, once, in order."""
    command = None if by == "launcher" else [sys.executable, str(THRUM)]
    with begin(fresh.ada, "--json", "--topic", "messages", command=command) as feed:
        count, done = 40, threading.Barrier(4)

        def send(who):
            for n in range(count):
                fresh.ada.json("send", f"{who} {n}", "--to", "@bob")
            done.wait(END_S * 3)

        threads = [threading.Thread(target=send, args=(who,)) for who in range(3)]
        for thread in threads:
            thread.start()
        told = []
        for _ in range(4):
            told += [json.loads(feed.next()) for _ in range(20)]
            fresh.ada.kill()
        told += [json.loads(feed.next()) for _ in range(3 * count - len(told))]
        done.wait(END_S * 3)
        for thread in threads:
            thread.join(END_S)
        fresh.mail("the end")
        told += map(json.loads, feed.until("the end"))
        assert feed.stop() == ([], "")
    with fresh.ada.client() as client:
        everything, after = [], 0
        while (found := client.call("event.wait", after_seq=after, topics=["messages"], timeout_ms=0))["events"]:
            everything, after = everything + found["events"], found["after_seq"]
    assert told == everything[-len(told):] and len({event["content"] for event in told}) == len(told) == 3 * count + 1


def test_what_was_sent_without_its_cursor_is_shown_once(fresh, tmp_path):
    """Text that is followed by nothing is not shown; the next daemon sends it again, and the place to go on from after it."""
    proxy = Proxy(fresh.ada, tmp_path)
    try:
        with Feed(fresh.ada, env=proxy.env()) as feed:
            proxy.await_record("S")
            proxy.cut = lambda number, side, kind: number == 1 and side == "daemon" and kind == "S"
            fresh.mail("only once")
            fresh.mail("the end")
            assert words(feed.until("the end")) == ["@ada → @bob: only once", "@ada → @bob: the end"]
            assert feed.stop()[0] == []
        texts = []
        while not proxy.seen.empty():
            _, side, kind, payload = proxy.seen.get()
            texts += [payload] if (side, kind) == ("daemon", "O") else []
        assert sum(b"only once" in text for text in texts) == 2, "the daemon had sent it before"
    finally:
        proxy.close()


def test_a_journal_made_anew(fresh):
    """Without `var/` the numbers begin again: what was shown stays shown, what came meanwhile comes."""
    with begin(fresh.ada, "--topic", "messages") as feed:
        fresh.mail("before")
        feed.until("before")
        fresh.ada.ok("daemon", "stop")
        shutil.rmtree(fresh.ada.var)
        fresh.mail("meanwhile")
        fresh.mail("after")
        assert words(feed.until("after")) == ["@ada → @bob: meanwhile", "@ada → @bob: after"]
        assert feed.stop()[0] == []


def test_a_reader_that_stops_for_a_while_misses_nothing(fresh):
    """Nobody waits for it: the daemon gives it up, and when it reads again it comes back for the rest."""
    if sys.platform != "linux":
        pytest.skip("looks into /proc")
    big = "x" * 50_000

    def sockets():
        names = [f"/proc/{fresh.ada.pid()}/fd/{name}" for name in os.listdir(f"/proc/{fresh.ada.pid()}/fd")]
        return sum(os.readlink(name).startswith("socket:") for name in names if os.path.islink(name))

    with fresh.ada.client() as client:
        idle = sockets()
        after = client.call("health")["last_seq"]
        process = start(fresh.ada, "watch", "--json", "--topic", "messages", "--limit", "60", "--since", str(after))
        for n in range(60):
            client.call("message.send", content=f"{n} {big}", mentions=["@bob"], caller_agent_id="ada")
        give_up_at = thrum.time.monotonic() + thrum.WRITE_S + END_S
        while sockets() > idle:
            assert thrum.time.monotonic() < give_up_at, "a client that does not read is never given up"
            client.call("event.wait", topics=["groups"], timeout_ms=200)
        status, out, err = finish(process)
    assert (status, err) == (0, "")
    assert [json.loads(line)["content"].split(" ")[0] for line in out.splitlines()] == [str(n) for n in range(60)]


# ---- as a program among others

def test_the_reader_of_the_pipe_may_go(team):
    process = start(team.ada, "watch", "--since", "0")
    head = subprocess.run(["head", "-n", "2"], stdin=process.stdout, capture_output=True, timeout=END_S)
    process.stdout.close()
    assert len(head.stdout.splitlines()) == 2
    team.mail("one")            # it notices when it has something to say
    while process.poll() is None:
        team.mail("another")
    with process.stderr as stderr:
        assert (process.returncode, stderr.read()) == (0, b"")


def test_it_needs_no_agent_and_marks_nothing(fresh):
    fresh.mail("unread")
    seen = fresh.ada.json("agent", "list")
    shutil.rmtree(fresh.bob.path / ".thrum" / "identities")
    seq = fresh.seq()
    with Feed(fresh.bob, "--since", "0", "--topic", "messages,receipts") as feed:
        assert words(feed.until("unread")) == ["@ada → @bob: unread"]
        feed.stop()
    assert fresh.seq() == seq
    assert fresh.ada.json("agent", "list") == seen, "nobody was seen"


def test_from_elsewhere(team):
    done = subprocess.run([sys.executable, str(THRUM), "watch", "--repo", str(team.ada.path), "--since", "0", "--limit", "1", "--json"],
                          cwd="/", env=CLEAN, capture_output=True, text=True, timeout=END_S)
    assert done.returncode == 0 and json.loads(done.stdout)["type"] == "group.create" and done.stderr == ""


# ---- subscribe, unsubscribe, subscriptions

def test_subscriptions(fresh):
    bob = fresh.bob
    assert bob.ok("subscriptions") == "No active subscriptions.\n" and bob.json("subscriptions") == {"subscriptions": []}
    text = bob.ok("subscribe", "--scope", "module:auth")
    session = bob.json("whoami")["session_id"]
    number = int(re.match(r"✓ Subscription created: #(\d+)\n", text)[1])
    assert f"Session:  {session}\n" in text and re.search(r"Created:  \d{4}-\d\d-\d\d \d\d:\d\d:\d\d\n", text)
    second = bob.json("subscribe", "--mention", "@reviewer")
    assert {"subscription_id", "session_id", "created_at"} <= set(second) and second["session_id"] == session
    bob.ok("subscribe", "--all", "--topic", "claims", "--topic", "groups,presence")
    rows = bob.json("subscriptions")["subscriptions"]
    assert [{k: v for k, v in row.items() if k not in ("id", "created_at")} for row in rows] == [
        {"all": True, "topics": ["claims", "groups", "presence"]}, {"mention_role": "reviewer"},
        {"scope_type": "module", "scope_value": "auth"}]
    text = bob.ok("subscriptions")
    assert text.startswith("Active subscriptions (3):\n")
    for part in (f"Subscription #{number}\n", "Type:     Scope (module:auth)\n", "Type:     Mention (@reviewer)\n",
                 "Type:     All messages (firehose) and Topics (claims, groups, presence)\n", "Created:  "):
        assert part in text
    assert fresh.ada.json("subscriptions") == {"subscriptions": []}
    done = fresh.ada.run("unsubscribe", str(number), check=1)       # decision 1: a failure is no success
    assert error_line(done).startswith(f"Failed to remove subscription #{number}: "), "it is somebody else's"
    assert bob.ok("unsubscribe", str(number)) == f"✓ Subscription #{number} removed\n"
    assert json.loads(bob.run("unsubscribe", str(number), "--json", check=1).stdout) == {"removed": False}
    bob.ok("session", "end")
    bob.ok("session", "start")
    assert bob.ok("subscriptions") == "No active subscriptions.\n", "they end with the session"


@pytest.mark.parametrize("words, text", [
    ("subscribe", "must specify one of: --scope, --mention, or --all"),
    ("subscribe --all --scope a:b", "--scope, --mention, and --all are mutually exclusive"),
    ("subscribe --scope a:b --mention c", "--scope, --mention, and --all are mutually exclusive"),
    ("subscribe --scope nope", "invalid scope format, expected type:value"), ("subscribe --scope :", "invalid scope format"),
    ("subscribe --scope=", "invalid scope format"), ("subscribe --mention @", "invalid mention"),
    ("subscribe --mention=", "invalid mention"), ("subscribe --topic nope", "no topic 'nope'; there are agents, messages"),
    ("subscribe --scope twice:x", "subscribe: subscription already exists"), ("unsubscribe x", "invalid subscription ID: x"),
    ("unsubscribe 0", "invalid subscription ID: 0"), ("unsubscribe", "accepts 1 arg(s), received 0"),
    ("unsubscribe 99999999999999999999999", "invalid subscription ID: 99"), ("unsubscribe ٣", "invalid subscription ID")])
def test_what_a_subscription_cannot_be(team, words, text):
    if "twice" in words and not any(row.get("scope_type") == "twice" for row in team.bob.json("subscriptions")["subscriptions"]):
        team.bob.ok("subscribe", "--scope", "twice:x")
    before = team.trace()
    assert error_line(team.bob.run(*words.split())).startswith(text)
    assert team.trace() == before


def test_subscribing_needs_an_identity_and_a_session(fresh):
    fresh.bob.ok("session", "end")
    for words in ("subscribe --all", "unsubscribe 1", "subscriptions"):
        assert "no active session found for agent bob" in error_line(fresh.bob.run(*words.split()))
    shutil.rmtree(fresh.bob.path / ".thrum" / "identities")
    for words in ("subscribe", "unsubscribe x", "subscriptions"):       # who is calling is asked first
        assert error_line(fresh.bob.run(*words.split())).startswith("failed to resolve agent identity")


# ---- notifications for Python programs

def test_notifications_come_between_replies(fresh):
    """A sender's own push comes before the reply to its send; neither is taken for the other."""
    with fresh.ada.client() as ada, fresh.bob.client() as bob:
        number = bob.call("subscribe", all=True, topics=["claims"], caller_agent_id="bob")["subscription_id"]
        sent = bob.call("message.send", content="from bob", mentions=["@ada"], caller_agent_id="bob")
        assert sent["message_id"] and bob.call("health")["status"] == "ok"
        ada.call("message.send", content="from ada", mentions=["@bob"], caller_agent_id="ada")
        ada.call("claim.take", paths=["src"], caller_agent_id="ada")
        told = [bob.next(END_S) for _ in range(3)]
        assert [(method, params.get("preview")) for method, params in told] == [
            ("notification.message", "from bob"), ("notification.message", "from ada"), ("notification.claim.take", None)]
        assert told[0][1]["matched_subscription"]["subscription_id"] == number
        assert [params["seq"] for _, params in told] == sorted(params["seq"] for _, params in told)
        assert bob.next(0) is None and bob.next(0.05) is None and list(bob.notifications(0)) == []
        ada.call("message.send", content="another", mentions=["@bob"], caller_agent_id="ada")
        assert next(bob.notifications())[1]["preview"] == "another"
        fresh.ada.kill()
        with pytest.raises(thrum.Unreachable):
            list(bob.notifications())


class Said:
    """A daemon that says what a test has it say."""

    def __init__(self):
        self.ours, theirs = socket.socketpair()
        self.client = thrum.Client(theirs, answer_s=END_S)

    def notify(self, *numbers):
        self.ours.sendall(b"".join(b'{"jsonrpc":"2.0","method":"n","params":{"seq":%d}}\n' % n for n in numbers))

    def reply(self, id):
        self.ours.sendall(b'{"jsonrpc":"2.0","id":%d,"result":{"of":%d}}\n' % (id, id))

    def close(self):
        self.ours.close()
        self.client.close()


@pytest.fixture
def said():
    made = Said()
    yield made
    made.close()


def test_replies_are_told_from_notifications(said):
    said.notify(1, 2)
    said.reply(7)               # to a call that was given up
    said.notify(3)
    said.reply(1)
    said.notify(4)
    assert said.client.call("x") == {"of": 1}
    assert [said.client.next(END_S)[1]["seq"] for _ in range(4)] == [1, 2, 3, 4]
    assert said.client.next(0) is None
    said.reply(2)
    assert said.client.next(0.01) is None, "a reply that nobody waits for is no notification"
    said.ours.sendall(b'{"jsonrpc":"2.0","method":"n","para')
    assert said.client.next(0.01) is None, "half of one"
    said.ours.sendall(b'ms":{"seq":5}}\n')
    assert said.client.next() == ("n", {"seq": 5})
    said.notify(6)
    said.ours.shutdown(socket.SHUT_WR)
    assert said.client.next() == ("n", {"seq": 6})
    with pytest.raises(thrum.Unreachable, match="closed the connection"):
        said.client.next()


def test_unread_notifications_are_bounded_and_counted(said):
    """A program that never asks for them loses the oldest, not its replies."""
    total = thrum.TOLD_MAX + 50
    writer = threading.Thread(target=lambda: (said.notify(*range(total)), said.reply(1)))
    writer.start()
    assert said.client.call("x") == {"of": 1} and said.client.missed == 50
    writer.join(END_S)
    assert [params["seq"] for _, params in said.client.notifications(0)] == list(range(50, total))


def test_a_call_ends_in_time_whatever_else_is_said(said):
    said.client._answer_s = 0.3
    done = threading.Event()

    def chatter():
        while not done.wait(0.02):
            said.notify(1)

    thread = threading.Thread(target=chatter)
    thread.start()
    try:
        with pytest.raises(thrum.Unreachable, match="unresponsive"):
            said.client.call("x")
    finally:
        done.set()
        thread.join(END_S)
