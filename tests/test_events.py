"""event.wait: whatever has happened after a point of the journal, without a gap; and the files it is read from."""

import json
import random
import threading
from pathlib import Path

import pytest

import thrum
from conftest import FakeWorld
from test_methods import LONG, Team, Waiting, served  # noqa: F401

EVERYTHING = 400                # events on one page


@pytest.fixture
def team(tmp_path, monkeypatch):
    """Two agents, on a journal with a file for every few events and a mark at every third."""
    monkeypatch.setattr(thrum, "JOURNAL_FILE_MAX", 4_000)
    monkeypatch.setattr(thrum, "MARK_EVERY", 3)
    made = Team(tmp_path)
    made.sessions = {"a": made.agent("a", "x"), "b": made.agent("b", "y")}
    yield made
    made.close()


def lines_of(team):
    """The journal as its writer reads it: sequence -> event; emptied lines are left out."""
    return {seq: json.loads(line) for seq, line in team.ledger.journal.read(0) if line}


def told_types(**topics):
    return thrum.types_of(list(topics))


def catch_up(team, after=0, **params):
    """Everything after a number, page by page; each page must go on where the one before has ended."""
    events, pages = [], 0
    while (found := team.call("event.wait", after_seq=after, **params)) is not None:
        assert after < found["after_seq"] and found["remaining"] == team.ledger.journal.last - found["after_seq"]
        assert all(after < event["seq"] <= found["after_seq"] for event in found["events"])
        events, after, pages = events + found["events"], found["after_seq"], pages + 1
        if not found["remaining"]:
            break
    assert team.call("event.wait", after_seq=after, **params) is None
    assert [event["seq"] for event in events] == sorted({event["seq"] for event in events})
    return events


def last_event(team, **params):
    return team.call("event.wait", after_seq=team.ledger.journal.last - 1, **params)["events"][0]


# ---- what an event says

def test_a_message_says_what_whoever_was_away_needs(team):
    first = team.send("a", "the question", mentions=["@b"], scopes=[{"type": "module", "value": "core"}], structured={"k": 1})
    event = last_event(team)
    assert event == {
        "seq": team.ledger.journal.last, "type": "message.create", "timestamp": first["created_at"], "message_id": first["message_id"],
        "agent_id": "a", "session_id": team.sessions["a"], "format": "markdown", "content": "the question", "deleted": False,
        "structured": '{"k":1}', "author": {"agent_id": "a", "name": "a", "role": "x", "module": "core"},
        "scopes": [{"type": "module", "value": "core"}], "audiences": [{"type": "mention", "value": "b"}]}
    answer = team.send("b", "the answer", reply_to=first["message_id"])
    event = last_event(team)
    assert (event["thread_id"], event["reply_to"]) == (answer["thread_id"], first["message_id"])
    assert team.call("event.wait", after_seq=event["seq"] - 2)["events"][0]["thread_id"] == answer["thread_id"], "it has become one"
    team.send("a", "for all")
    assert last_event(team)["audiences"] == [{"type": "broadcast", "value": "everyone"}]
    team.call("message.edit", message_id=first["message_id"], content="a better question", caller_agent_id="a")
    edit = last_event(team)
    assert (edit["type"], edit["content"], edit["agent_id"], edit["audiences"]) == (
        "message.edit", "a better question", "a", [{"type": "mention", "value": "b"}])
    assert [e["content"] for e in catch_up(team, topics=["messages"])] == ["the question", "the answer", "for all", "a better question"]


def test_who_wrote_in_whose_name_is_told_only_where_it_was_disclosed(team):
    person = team.person("leon")
    for disclose in (False, True):
        team.send(person, "in its name", acting_as="a", disclose=disclose, mentions=["@b"])
        event = last_event(team)
        assert event["agent_id"] == "a" and (event.get("authored_by") == person) == disclose
        assert disclose or person not in json.dumps(event)


def test_what_was_taken_back_or_removed_says_nothing_any_more(team):
    kept, back, gone = (team.send("a", text, mentions=["@b"])["message_id"] for text in ("kept", "taken back", "removed"))
    team.call("message.edit", message_id=back, content="taken back, edited", structured={"secret": 1}, caller_agent_id="a")
    team.call("message.markRead", message_ids=[gone, kept], caller_agent_id="b")
    team.call("message.delete", message_id=back, reason="wrong", caller_agent_id="a")
    team.call("message.edit", message_id=gone, content="removed, edited", caller_agent_id="a")
    before = catch_up(team)
    assert [e["type"] for e in before if e.get("message_id") == back] == ["message.create", "message.edit", "message.delete"]
    assert {(e["content"], e["deleted"], "structured" in e) for e in before if e["type"] in ("message.create", "message.edit")
            and e["message_id"] == back} == {("", True, False)}
    assert next(e for e in before if e["type"] == "message.delete")["agent_id"] == "a"
    team.call("message.archive", archive_type="agent", identifier="a", caller_agent_id="a")
    after = catch_up(team)
    assert "removed" not in json.dumps([e for e in after if e["type"] != "message.remove"]) and "kept" not in json.dumps(after)
    assert gone in after[-1]["message_ids"] and after[-1]["type"] == "message.remove"


def test_other_events_name_what_they_are_about(team):
    def told(kind, method, **params):
        team.call(method, caller_agent_id="a", **params)
        return next(e for e in reversed(catch_up(team)) if e["type"] == kind)

    for kind, method, params, named in (
            ("claim.take", "claim.take", {"paths": ["src"], "ttl_s": 60}, {"agent_id": "a", "path": "src"}),
            ("claim.renew", "claim.take", {"paths": ["src"], "ttl_s": 90}, {"agent_id": "a", "path": "src", "ttl_s": 90}),
            ("claim.release", "claim.release", {"paths": ["src"]}, {"agent_id": "a", "path": "src", "reason": "released"}),
            ("group.create", "group.create", {"name": "g"}, {"agent_id": "a", "name": "g"}),
            ("group.member.add", "group.member.add", {"group": "g", "member_value": "b"}, {"agent_id": "a", "name": "g"}),
            ("group.member.remove", "group.member.remove", {"group": "g", "member_value": "b"}, {"agent_id": "a", "name": "g"}),
            ("group.delete", "group.delete", {"name": "g"}, {"agent_id": "a", "name": "g"}),
            ("session.update", "session.setIntent", {"session_id": team.sessions["a"], "intent": "think"}, {"intent": "think"}),
            ("agent.session.end", "session.end", {"session_id": team.sessions["b"]}, {"agent_id": "b", "reason": "normal"})):
        event = told(kind, method, **params)
        assert named.items() <= event.items(), kind
        assert not thrum.INTERNAL_FIELDS & set(event) and list(event)[:3] == ["seq", "type", "timestamp"]


def test_topics_choose_and_all_are_the_default(team):
    team.call("group.create", name="g", caller_agent_id="a")
    team.call("claim.take", paths=["src"], caller_agent_id="a")
    message = team.send("a", "x", mentions=["@b"])["message_id"]
    team.call("message.markRead", message_ids=[message], caller_agent_id="b")
    team.call("subscribe", all=True, caller_agent_id="a")       # nothing that anybody is told of
    everything = catch_up(team)
    assert catch_up(team, topics=["*"]) == everything
    for topic, kinds in thrum.EVENT_TOPICS.items():
        assert catch_up(team, topics=[topic]) == [e for e in everything if e["type"] in kinds], topic
        assert (not kinds) == (topic in ("presence", "work", "sync"))
    assert {e["type"] for e in everything} <= told_types() and "subscription.add" in {e["type"] for e in lines_of(team).values()}
    assert team.refused("event.wait", topics=["nope"]).code == -32602


def test_from_to_and_scope(team):
    team.agent("c", "y")
    team.call("group.create", name="g", caller_agent_id="a")
    for who, text, more in (("a", "to b", {"mentions": ["@b"]}), ("b", "to a", {"mentions": ["@a"]}), ("a", "to all", {}),
                            ("b", "to y", {"mentions": ["@y"], "scopes": [{"type": "s", "value": "v"}]})):
        message = team.send(who, text, **more)["message_id"]
    team.call("message.edit", message_id=message, content="to y, edited", caller_agent_id="b")

    def texts(**params):
        return [e.get("content", e["type"]) for e in catch_up(team, **params) if e["type"] not in ("agent.register", "agent.session.start")]

    assert texts(**{"from": "@a"}) == ["group.create", "to b", "to all"]
    assert texts(to="@b") == ["to b", "to all"] and texts(to="@c") == ["to all", "to y", "to y, edited"], "to whom it came"
    assert texts(to="y") == ["to y", "to y, edited"] and texts(to="everyone") == ["to all"] and texts(to="nobody") == []
    assert texts(scope={"type": "s", "value": "v"}) == ["to y", "to y, edited"] and texts(scope={"type": "s", "value": "w"}) == []
    assert texts(to="c", **{"from": "a"}) == ["to all"]


def test_a_damaged_line_costs_only_itself(team):
    for n in range(40):
        team.send("a", f"number {n}", mentions=["@b"])
    expected = catch_up(team)
    firsts = team.ledger.journal.firsts()
    path = Path(team.places.journal) / f"{firsts[1]}.jsonl"
    lines = path.read_bytes().split(b"\n")
    lines[2] = lines[2][:-30] + b"#" * 30
    path.write_bytes(b"\n".join(lines))
    assert catch_up(team) == [e for e in expected if e["seq"] != firsts[1] + 1]


# ---- without a gap

class Life:
    """Random changes, among them removals, and what a listener has been told of them."""

    def __init__(self, team, seed):
        self.team, self.random, self.messages, self.said = team, random.Random(seed), [], 0

    def step(self):
        team, rng = self.team, self.random
        who, which = rng.choice("ab"), rng.random()
        try:
            if which < 0.5 or not self.messages:
                self.said += 1
                to = {"reply_to": rng.choice(self.messages)} if self.messages and rng.random() < 0.3 else {"mentions": ["@b"]}
                self.messages.append(team.send(who, f"text {self.said} " + "x" * rng.randrange(300), **to)["message_id"])
            elif which < 0.6:
                team.call("message.edit", message_id=rng.choice(self.messages), content=f"edit {self.said}")
            elif which < 0.65:
                team.call("message.delete", message_id=rng.choice(self.messages))
            elif which < 0.75:
                team.call("message.markRead", message_ids=rng.sample(self.messages, min(3, len(self.messages))), caller_agent_id=who)
            elif which < 0.85:
                team.call("claim.take", paths=[rng.choice(["src", "docs", "*.md"])], ttl_s=60, caller_agent_id=who)
            elif which < 0.93:
                team.call("session.start", agent_id=who)
            elif which < 0.97:
                team.call("message.archive", archive_type="agent", identifier=who, caller_agent_id="a")
            else:
                team.call("purge.execute", before=thrum.stamp_of(team.world.at - rng.randrange(60) * thrum.NS))
        except thrum.ThrumError:
            pass                # deleted, removed, or claimed by the other

    def ask(self, after, topics):
        """One page, and the proof that nothing in it was removed before."""
        found = self.team.call("event.wait", after_seq=after, topics=topics, limit=self.random.choice((1, 2, 5, EVERYTHING)))
        if not found:
            return [], self.team.ledger.journal.last
        present = {row["message_id"] for row in self.team.ledger.store.rows("select message_id from messages")}
        for event in found["events"]:
            assert event["type"] not in ("message.create", "message.edit", "message.delete", "message.receipt") \
                or event["message_id"] in present, event
        return found["events"], found["after_seq"]


@pytest.mark.parametrize("seed", range(12))
def test_list_and_follow_are_all_events_once_in_order(team, seed, monkeypatch):
    """At random points a listener asks for some pages while more happens and messages are removed for good.

    What it was told is strictly in order, all of it is in the journal, and what it was not told is of no topic or was removed.
    """
    monkeypatch.setattr(thrum, "SCAN_MAX", random.Random(seed).choice((7, 10_000)))
    life = Life(team, seed)
    topics = life.random.choice(([], ["messages"], ["messages", "claims"], ["agents", "groups"]))
    types, told, after, ever = thrum.types_of(topics), [], 0, {}
    for _ in range(120):
        life.step()
        ever.update(lines_of(team))
        for _ in range(life.random.choice((0, 0, 1, 3))):
            events, after = life.ask(after, topics)
            told += events
    while after < team.ledger.journal.last:
        events, after = life.ask(after, topics)
        told += events
    assert len(team.ledger.journal.firsts()) > 3 and team.ledger.history._marks
    numbers = [event["seq"] for event in told]
    assert numbers == sorted(set(numbers))
    assert all(event["type"] == ever[event["seq"]]["type"] in types for event in told)
    left = [event for seq, event in lines_of(team).items() if event["type"] in types and seq not in set(numbers)]
    assert {event["event_id"] for event in left} == team.ledger.store.obsolete(
        [event for event in left if event["type"] in thrum.ABOUT_REMOVABLE]), "what it was not told was removed before"


# ---- other journals, and times

def test_after_another_journal_it_begins_at_the_oldest_unread(team):
    for n in range(6):
        team.send("a", f"number {n}", mentions=["@b"])
    ids = [e["message_id"] for e in catch_up(team, topics=["messages"])]
    seqs = [e["seq"] for e in catch_up(team, topics=["messages"])]
    team.call("message.markRead", message_ids=[ids[0], ids[1], ids[3]], caller_agent_id="b")
    other = {"after_seq": 10**6, "epoch": "of another journal"}
    found = team.call("event.wait", caller_agent_id="b", **other)
    assert found["events"][0]["seq"] == seqs[2] and found["epoch"] == team.ledger.journal.epoch
    assert [e["seq"] for e in found["events"]] == list(range(seqs[2], team.ledger.journal.last + 1)), "of all topics"
    assert team.call("event.wait", caller_agent_id="a", **other) is None, "it has read everything: from now on"
    assert team.call("event.wait", **other)["events"][0]["seq"] == 1, "nobody's marks to go by: from the beginning"
    assert team.call("event.wait", after_seq=10**6, epoch=team.ledger.journal.epoch) is None
    params = {"caller_agent_id": "a", **other}          # as the daemon asks again, with the same dict
    row = thrum.METHODS["event.wait"]
    assert team.reading.within(10, lambda: row.handler(thrum.Context(team.world, team.reading, team.ledger), params)) is None
    assert (params["after_seq"], params["epoch"]) == (team.ledger.journal.last, team.ledger.journal.epoch)


def test_a_journal_made_anew_is_followed_by_time(team):
    """`created_after` finds in a new journal what had not been told before of the old one."""
    for n in range(10):
        team.send("a", f"number {n}", mentions=["@b"])
    told = catch_up(team, topics=["messages"])
    team.ledger.flush(sync=True)
    team.close()
    thrum.shutil.rmtree(team.places.var)
    team.open()
    assert [e["message_id"] for e in catch_up(team, topics=["messages"], created_after=told[5]["timestamp"])] == \
        [e["message_id"] for e in told[6:]]


def test_created_after(team):
    for n in range(30):
        team.send("a", f"number {n}", mentions=["@b"])
    told = catch_up(team)
    for cut in (0, 7, len(told) - 2, len(told) - 1):
        assert catch_up(team, created_after=told[cut]["timestamp"]) == told[cut + 1:]
    assert team.call("event.wait", after_seq=told[20]["seq"], created_after=told[3]["timestamp"])["events"] == told[21:]
    assert team.refused("event.wait", created_after="yesterday").code == -32602


def test_a_page_is_bounded(team, monkeypatch):
    for _ in range(12):
        team.send("a", "x" * 2_000, mentions=["@b"])
    after = catch_up(team)[-12]["seq"] - 1
    assert len(team.call("event.wait", after_seq=after, limit=5)["events"]) == 5
    for limit in (0, -1):
        assert len(team.call("event.wait", after_seq=after, limit=limit)["events"]) == 1
    monkeypatch.setattr(thrum, "EVENTS_BYTES", 5_000)
    found = team.call("event.wait", after_seq=after)
    assert len(found["events"]) == 3 and found["remaining"] == 9
    monkeypatch.setattr(thrum, "SCAN_MAX", 4)
    found = team.call("event.wait", after_seq=after, topics=["groups"])
    assert (found["events"], found["after_seq"], found["remaining"]) == ([], after + 4, 8), "it says how far it has looked"


# ---- the files

class Written:
    """A journal of numbered lines and its reader."""

    def __init__(self, folder):
        self.journal = thrum.Journal(str(folder / "journal"), FakeWorld(), thrum.BadLines(str(folder / "bad")))
        self.journal.open() or self.journal.create()
        self.history = thrum.History(self.journal)

    def append(self, count, size=0):
        self.journal.append([b'{"n":%d,"x":"%s"}' % (n, b"x" * size) for n in range(self.journal.last + 1, self.journal.last + count + 1)])

    def empty(self, rng):
        """Take some lines out of a file, as a purge does."""
        first = rng.choice(self.journal.firsts())
        self.journal.rewrite(first, lambda lines: [b"" if rng.random() < 0.1 else line for line in lines])

    def check(self, after, last):
        found = list(self.history.read(after, last))
        assert [seq for seq, _ in found] == list(range(after + 1, last + 1))
        assert all(not line or json.loads(line)["n"] == seq for seq, line in found)


def test_a_reader_remembers_where_lines_are(tmp_path):
    written = Written(tmp_path)
    for _ in range(40):
        written.append(250)
    assert len(list(written.history.read(0, 10_000))) == 10_000 and len(written.history._marks) == 10_000 // thrum.MARK_EVERY
    with open(written.journal._path(1), "rb") as file:
        for wanted in range(1, 10_001, 97):
            found = written.history._seek(file, 1, wanted)
            assert wanted - thrum.MARK_EVERY < found <= wanted
            assert json.loads(file.readline())["n"] == found
    written.append(5)
    written.check(10_000, 10_005)


@pytest.mark.parametrize("seed", range(20))
def test_a_reader_sees_what_the_writer_sees(tmp_path, monkeypatch, seed):
    """Whatever was appended, begun or rewritten since it last looked."""
    monkeypatch.setattr(thrum, "JOURNAL_FILE_MAX", 2_000)
    monkeypatch.setattr(thrum, "MARK_EVERY", 3)
    rng, written = random.Random(seed), Written(tmp_path)
    for _ in range(150):
        if rng.random() < 0.7:
            written.append(rng.randrange(1, 9), rng.randrange(80))
        else:
            written.empty(rng)
        after = rng.randint(0, written.journal.last)
        last = rng.randint(after, written.journal.last)
        assert list(written.history.read(after, last)) == [pair for pair in written.journal.read(after) if pair[0] <= last]
    assert len(written.journal.firsts()) > 2


def test_readers_and_the_writer_at_once(tmp_path, monkeypatch):
    monkeypatch.setattr(thrum, "JOURNAL_FILE_MAX", 5_000)
    monkeypatch.setattr(thrum, "MARK_EVERY", 4)
    written, problems, done = Written(tmp_path), [], threading.Event()

    def look(seed):
        rng = random.Random(seed)
        try:
            while not done.is_set():
                last = written.journal.last
                written.check(rng.randint(0, last), last)
        except BaseException as error:
            problems.append(error)

    threads = [threading.Thread(target=look, args=(seed,)) for seed in range(3)]
    for thread in threads:
        thread.start()
    rng = random.Random(1)
    for _ in range(250):
        written.append(rng.randrange(1, 6), rng.randrange(60))
        if rng.random() < 0.3:
            written.empty(rng)
    done.set()
    for thread in threads:
        thread.join(LONG)
        assert not thread.is_alive()
    assert not problems, problems[0]


# ---- through a daemon

def ask(repo, **params):
    waiting = Waiting.__new__(Waiting)
    threading.Thread.__init__(waiting, daemon=True)
    waiting.client, waiting.params, waiting.answer = repo.client(), params, None
    waiting.run = lambda: setattr(waiting, "answer", waiting.client.call("event.wait", **params))
    waiting.start()
    return waiting


def test_waiters_are_woken_by_their_topics(served):  # noqa: F811
    with served.client() as client:
        after = client.call("health")["last_seq"]
        any_, groups, from_b = ask(served, after_seq=after), ask(served, after_seq=after, topics=["groups"]), \
            ask(served, after_seq=after, **{"from": "b"})
        client.call("claim.take", paths=["src"], caller_agent_id="a")
        assert [e["type"] for e in any_.result()["events"]] == ["claim.take"]
        client.call("message.send", content="x", mentions=["@a"], caller_agent_id="b")
        assert [e["type"] for e in from_b.result()["events"]] == ["message.create"]
        assert groups.is_alive()
        client.call("group.create", name="g", caller_agent_id="a")
        found = groups.result()
        assert [e["type"] for e in found["events"]] == ["group.create"] and found["remaining"] == 0


def test_a_list_is_a_wait_for_no_time(served):  # noqa: F811
    with served.client() as client:
        state = client.call("health")
        found = client.call("event.wait", after_seq=0, timeout_ms=0)
        assert found["events"][-1]["seq"] <= found["after_seq"] == state["last_seq"] and found["epoch"] == state["epoch"]
        found = client.call("event.wait", after_seq=state["last_seq"], timeout_ms=0)
        assert found == {"events": [], "timed_out": True, "after_seq": state["last_seq"], "epoch": state["epoch"], "remaining": 0}
        assert client.call("event.wait", timeout_ms=0)["events"] == [], "without a point: from now on"
        client.call("group.create", name="g", caller_agent_id="a")
        found = client.call("event.wait", after_seq=state["last_seq"], topics=["claims"], timeout_ms=1)
        assert found["events"] == [] and found["after_seq"] == client.call("health")["last_seq"], "it need not look there again"


def test_many_waits_in_a_row_miss_nothing_while_eight_write(served):  # noqa: F811
    """List, then follow, on one connection, while eight others send."""
    with served.client() as client:
        after = client.call("health")["last_seq"]

        def send(who):
            with served.client() as own:
                for n in range(25):
                    own.call("message.send", content=f"{who} {n}", mentions=["@a"], caller_agent_id="bc"[who % 2])

        threads = [threading.Thread(target=send, args=(who,)) for who in range(8)]
        for thread in threads:
            thread.start()
        told = []
        while len(told) < 200:
            found = client.call("event.wait", after_seq=after, topics=["messages"], limit=7, timeout_ms=LONG * 1000)
            assert found["events"], "nothing came any more"
            told, after = told + found["events"], found["after_seq"]
        for thread in threads:
            thread.join(LONG)
        numbers = [event["seq"] for event in told]
        assert numbers == sorted(set(numbers)) and len({event["content"] for event in told}) == 200
        assert client.call("event.wait", after_seq=after, topics=["messages"], timeout_ms=0)["events"] == []
