"""Section 9: the projection is a function of the set of events, and says what the design promises.

Histories come from `generate.history`; answers are compared by `generate.answers`, which leaves out `seq`.
"""

import random

import pytest

import thrum
from conftest import FakeWorld
from generate import START, answers, difference, history

SEEDS = 160


OPENED = []


@pytest.fixture(autouse=True)
def close_all():
    """Close what a test has opened and left."""
    yield
    while OPENED:
        OPENED.pop().close()


def empty():
    OPENED.append(thrum.Store(":memory:", FakeWorld(), writable=True))
    OPENED[-1].create()
    return OPENED[-1]


def project(events, rng=None):
    """A store that was given the events in this order, in transactions of random size."""
    store = empty()
    size = len(events) + 1
    for seq, event in enumerate(events, 1):
        if not store.db.in_transaction:
            store.begin()
            size = rng.randrange(1, 12) if rng else len(events)
        store.apply(event, seq, thrum.check_event(event))
        size -= 1
        if not size:
            store.settle()
            store.commit()
    if store.db.in_transaction:
        store.settle()
        store.commit()
    return store


def differs(events, *orders):
    """Where a store given the events in one of the orders answers otherwise than one given them as they happened."""
    first = project(events)
    expected = answers(first, events)
    first.close()
    for name, order, rng in orders:
        store = project(order, rng)
        found = difference(expected, answers(store, events))
        store.close()
        if found:
            return f"as it happened against {name}: {found}"[:900]
    return ""


def shuffled(events, rng, repeat=0.3):
    """The events in any order, a share of them more than once."""
    order = events + [dict(event) for event in events if rng.random() < repeat]
    rng.shuffle(order)
    return order


# ---- any order, any number of times

@pytest.mark.parametrize("start", range(0, SEEDS, 10))
def test_any_order_and_repetition_gives_the_same_answers(start):
    """What two machines hold is equal once they have the same events, whatever way these came."""
    wrong = []
    for seed in range(start, start + 10):
        events, rng = history(seed, 50), random.Random(-seed - 1)
        orders = [("shuffled", shuffled(events, rng), rng), ("reversed", events[::-1], rng)]
        found = differs(events, *orders[:1 if seed % 4 else 2])
        if found:
            wrong.append(f"seed {seed}: {found}")
    if wrong:
        pytest.fail(f"{len(wrong)} of 10 seeds\n" + "\n".join(wrong), pytrace=False)


def test_two_machines_that_exchange_late_agree():
    """Each has its own events first and then all of the other's, as after a day offline."""
    wrong = []
    for seed in range(500, 512):
        events = history(seed)
        daemons = sorted({event["origin_daemon"] for event in events})
        for first in daemons:
            own = [event for event in events if event["origin_daemon"] == first]
            others = [event for event in events if event["origin_daemon"] != first]
            found = differs(events, ("own first", own + others, random.Random(seed)))
            if found:
                wrong.append(f"seed {seed}: {found}")
    if wrong:
        pytest.fail(f"{len(wrong)}\n" + "\n".join(wrong), pytrace=False)


def test_the_same_order_in_other_transactions_is_the_same_table_for_table():
    """A rebuild from the journal equals the live database, numbers included."""
    for seed in range(16):
        events = history(seed)
        tables = []
        for rng in (None, random.Random(seed)):
            store = project(events, rng)
            names = [row[0] for row in store.db.execute("select name from sqlite_master where type = 'table'")]
            tables.append({name: sorted(map(repr, store.db.execute(f"select * from {name}"))) for name in names
                           if name not in ("schema_version", "agents")})
            tables[-1]["agents"] = sorted(map(repr, store.rows("select * from agents")))
            store.close()
        assert not difference(*tables), f"seed {seed}"


def test_applying_twice_says_so_and_changes_nothing():
    events = history(3)
    store = project(events)
    before = answers(store, events)
    for seq, event in enumerate(events, 1000):
        assert store.apply(event, seq, thrum.check_event(event)) is False
    assert not difference(before, answers(store, events))


def test_an_undone_save_point_leaves_nothing_and_spoils_nothing():
    """Between any two events another one is applied and undone: as if it had never been."""
    for seed in range(12):
        events, rng = history(seed), random.Random(seed)
        store = empty()
        store.begin()
        for seq, event in enumerate(events, 1):
            store.save_point()
            for other in rng.sample(events, 2):
                store.apply({**other, "event_id": "evt_undone" + other["event_id"]}, 10_000 + seq, thrum.check_event(other))
            store.undo()
            store.save_point()
            store.apply(event, seq, thrum.check_event(event))
            store.keep()
            if rng.random() < 0.3:
                store.settle()
                store.commit()
                store.begin()
        store.settle()
        store.commit()
        assert not difference(answers(project(events), events), answers(store, events)), f"seed {seed}"


def test_a_rollback_leaves_nothing():
    for seed in range(10):
        events, half = history(seed), 30
        store = project(events[:half])
        before = answers(store, events)
        store.begin()
        for seq, event in enumerate(events[half:], half + 1):
            store.apply(event, seq, thrum.check_event(event))
        store.settle()
        store.rollback()
        assert not difference(before, answers(store, events)), f"seed {seed}"
        store.begin()
        for seq, event in enumerate(events[half:], half + 1):
            store.apply(event, seq, thrum.check_event(event))
        store.settle()
        store.commit()
        assert not difference(answers(project(events), events), answers(store, events)), f"seed {seed}"


# ---- against a model: the rules once more, written from the design without tables

class Model:
    """Who receives what (design, decisions 18 to 20), computed from the set of events by brute force."""

    def __init__(self, events):
        events = {event["event_id"]: event for event in events}.values()
        self.events = sorted(events, key=lambda event: (thrum.ns_of(event["timestamp"]), event["event_id"]))
        self.times = {event["event_id"]: thrum.ns_of(event["timestamp"]) for event in self.events}
        self.removed, self.cutoff, self.names, self.deleted_groups = {}, 0, {}, {}
        for event in self.of("agent.cleanup"):
            self.removed[event["agent_id"]] = self.at(event)
        self.archived = {message for event in self.of("message.remove") for message in event["message_ids"]}
        for event in self.of("purge.executed"):
            self.cutoff = max(self.cutoff, min(thrum.ns_of(event["cutoff"]), self.at(event)))
        for event in self.of("group.create"):
            self.names.setdefault(event["group_id"], (event["name"], self.at(event)))
        for event in self.of("group.delete"):
            self.deleted_groups.setdefault(event["group_id"], self.at(event))

    def of(self, *kinds):
        return [event for event in self.events if event["type"] in kinds]

    def at(self, event):
        return self.times[event["event_id"]]

    def present(self, ns):
        """agent -> role just before `ns`."""
        roles = {}
        for event in self.of("agent.register", "agent.cleanup"):
            if self.at(event) < ns:
                roles[event["agent_id"]] = event.get("role")
        return {agent: role for agent, role in roles.items() if role is not None}

    def behind(self, name, ns, path=()):
        """The agents behind a group or role; people have no role, and a group that was deleted is none."""
        present = {agent: "" if agent.startswith("user:") else role for agent, role in self.present(ns).items()}
        if name == "everyone":
            return set(present)
        groups = [group for group, (known_as, created) in self.names.items()
                  if known_as == name and created < ns <= self.deleted_groups.get(group, ns)]
        if not groups:
            return {agent for agent, role in present.items() if role == name and not path}
        found = set()
        for group in groups:
            members = {}
            for event in self.of("group.member.add", "group.member.remove"):
                if event["group_id"] == group and self.at(event) < ns:
                    members[event["member_type"], event["member_value"]] = event["type"] == "group.member.add"
            for (kind, value), is_in in members.items():
                if is_in and kind == "role":
                    found |= {agent for agent, role in present.items() if value in ("*", role)}
                elif is_in and kind == "agent":
                    found |= {value} & set(present)
                elif is_in and value not in path and value != name:
                    found |= self.behind(value, ns, (*path, name))
        return found

    def mentioned(self, name, ns):
        present = self.present(ns)
        return ({name, "user:" + name} & set(present)) | {agent for agent, role in present.items() if role == name}

    def messages(self):
        """message id -> {author, at, recipients, deleted, content}"""
        found = {}
        for event in self.of("message.create"):
            at, author = self.at(event), event["agent_id"]
            if at < self.cutoff or at <= self.removed.get(author, -1) or event["message_id"] in self.archived:
                continue
            listed = set(event.get("recipients", ()))
            groups = {pair["value"] for pair in event.get("refs", []) + event.get("scopes", []) if pair["type"] == "group"}
            mentions = {pair["value"] for pair in event.get("refs", []) if pair["type"] == "mention"}
            if not groups and not mentions:
                listed |= self.behind("everyone", at)
            elif groups or any(m not in listed and "user:" + m not in listed for m in mentions):
                for group in groups:
                    listed |= self.behind(group, at)
                for mention in mentions:
                    listed |= self.mentioned(mention, at)
            found[event["message_id"]] = {"author": author, "at": at, "recipients": listed - {author}, "read": {}, "seen": {},
                                          "content": event["body"]["content"], "deleted": False}
        for event in self.of("message.receipt", "message.edit", "message.delete"):
            message = found.get(event["message_id"])
            if not message:
                continue
            if event["type"] == "message.edit":
                message["content"] = event["body"]["content"]
            elif event["type"] == "message.delete":
                message["deleted"] = True
            elif event["agent_id"] in message["recipients"]:
                message["seen"].setdefault(event["agent_id"], self.at(event))
                if event["receipt_type"] == "read":
                    message["read"].setdefault(event["agent_id"], self.at(event))
        return found


@pytest.mark.parametrize("start", range(0, SEEDS, 40))
def test_inbox_unread_and_sent_are_those_of_the_model(start):
    for seed in range(start, start + 40):
        events = history(seed, renames=False)
        store, model = project(events), Model(events).messages()
        agents = {event["agent_id"] for event in events if "agent_id" in event}
        for agent in agents:
            inbox = store.page(receiver=agent, limit=1000)
            mine = {i: m for i, m in model.items() if agent in m["recipients"] and not m["deleted"]}
            assert {m["message_id"]: (m["content"], m["is_read"]) for m in inbox["messages"]} == \
                {i: (m["content"], agent in m["read"]) for i, m in mine.items()}, f"seed {seed}, inbox of {agent}"
            left = {i for i, m in mine.items() if agent not in m["read"]}
            unread = store.page(receiver=agent, unread=True, limit=1000)
            assert {m["message_id"] for m in unread["messages"]} == left, f"seed {seed}, unread of {agent}"
            assert (inbox["total"], inbox["unread"], unread["total"]) == (len(mine), len(left), len(left)), f"seed {seed}, {agent}"
            sent = store.outbox(agent, limit=1000)
            assert {m["message_id"] for m in sent["messages"]} == {i for i, m in model.items() if m["author"] == agent}, \
                f"seed {seed}, sent by {agent}"
        for message_id, message in model.items():
            states = {s["agent_id"]: s for s in store.recipients(store.message(message_id))}
            assert set(states) == message["recipients"], f"seed {seed}, {message_id}"
            for agent, state in states.items():
                for word in ("read", "seen"):
                    at = message[word].get(agent)
                    assert state.get(word + "_at") == (at and thrum.stamp_of(at)), f"seed {seed}, {message_id}, {agent}, {word}"
        store.close()


def test_counts_kept_with_the_agent_are_those_counted():
    """`inbox_total`, `inbox_unread` and `unread_by` always equal a count of the rows."""
    for seed in range(SEEDS // 2):
        rng = random.Random(seed)
        store = project(shuffled(history(seed), rng), rng)
        for row in store.rows("select agent, inbox_total, inbox_unread from agents"):
            counted = store.row("select count(*) as total, ifnull(sum(read_at is null), 0) as unread from deliveries "
                                "where agent = ? and not hidden", row["agent"])
            assert (row["inbox_total"], row["inbox_unread"]) == (counted["total"], counted["unread"]), f"seed {seed}"
        for row in store.rows("select seq, unread_by, delivered from messages"):
            rows = store.rows("select agent, read_at from deliveries where seq = ?", row["seq"])
            assert sorted(r["agent"] for r in rows) == sorted(thrum._keys(row["delivered"])), f"seed {seed}"
            assert row["unread_by"] == sum(r["read_at"] is None for r in rows), f"seed {seed}"
        store.close()


def test_threads_are_what_hangs_together():
    """Messages share a thread exactly when a chain of replies and of equal thread ids joins them; thr_X is that of msg_X."""
    for seed in range(SEEDS // 2):
        events = history(seed, removals=False)
        parent = {}

        def root(node, parent=parent):
            while parent.setdefault(node, node) != node:
                node = parent[node]
            return node

        for event in events:
            if event["type"] == "message.create":
                message = event["message_id"]
                root(message)
                for pair in event.get("refs", []):
                    if pair["type"] == "reply_to":
                        parent[root(pair["value"])] = root(message)
                if event.get("thread_id"):
                    parent[root("msg_" + event["thread_id"][4:])] = root(message)
        store, by_thread = project(shuffled(events, random.Random(seed))), {}
        expected = {}
        for event in events:
            if event["type"] == "message.create":
                thread = store.message(event["message_id"])["thread_id"]
                by_thread.setdefault(thread or event["message_id"], set()).add(event["message_id"])
                expected.setdefault(root(event["message_id"]), set()).add(event["message_id"])
        assert sorted(map(sorted, by_thread.values())) == sorted(map(sorted, expected.values())), f"seed {seed}"
        store.close()


# ---- single rules, each with the events that show it

class Story:
    """Writes events by hand: `at` seconds after START, ids that count."""

    def __init__(self):
        self.events = []

    def __call__(self, at, kind, /, **fields):
        number = len(self.events)
        self.events.append({"type": kind, "timestamp": thrum.stamp_of(START + int(at * thrum.NS) + 1), "v": 1,
                            "event_id": f"evt_{number:04}", "origin_daemon": "d_a", **fields})
        return self

    def register(self, at, *agents, role="implementer"):
        for agent in agents:
            self(at, "agent.register", agent_id=agent, kind="agent", role=role, module="core", name=agent)
        return self

    def send(self, at, author, message, to=(), *, content="x", **fields):
        return self(at, "message.create", message_id=message, agent_id=author, body={"format": "markdown", "content": content},
                    **({"recipients": list(to)} if to else {}), **fields)


def mention(*agents):
    return [{"type": "mention", "value": agent} for agent in agents]


def inbox(store, agent):
    return [m["message_id"] for m in store.page(receiver=agent, limit=100)["messages"]]


def every_order(story, limit=20):
    """Stores given a short story in every order, or in `limit` random ones."""
    import itertools
    events = story.events
    if len(events) <= 4:
        orders = list(itertools.permutations(events))
    else:
        orders = [random.Random(n).sample(events, len(events)) for n in range(limit)]
    for order in [events, *orders]:
        store = project(list(order), random.Random(len(order)))
        yield store, [event["event_id"] for event in order]
        store.close()


def two():
    return Story().register(0, "ada", "bob")


RULES = {
    # name: (story, question, answer)
    "a broadcast reaches who was registered before it, not who came later": (
        two().register(20, "eve").send(10, "ada", "m"), lambda s: (inbox(s, "bob"), inbox(s, "eve"), inbox(s, "ada")), (["m"], [], [])),
    "a registration at the very time of a message is not before it": (
        two().register(10, "eve").send(10, "ada", "m"), lambda s: inbox(s, "eve"), []),
    "a role mention reaches the role": (
        two().register(1, "rex", role="reviewer").send(10, "ada", "m", refs=mention("reviewer")),
        lambda s: (inbox(s, "rex"), inbox(s, "bob")), (["m"], [])),
    "who changed the role since is still a recipient, who left the role before is not": (
        two().register(1, "rex", role="reviewer").register(20, "rex", role="planner").register(5, "bob", role="reviewer")
        .register(6, "bob", role="planner").send(10, "ada", "m", refs=mention("reviewer")),
        lambda s: (inbox(s, "rex"), inbox(s, "bob")), (["m"], [])),
    "the first deletion counts and hides": (
        two().send(1, "ada", "m", ["bob"], refs=mention("bob"))(5, "message.delete", message_id="m", reason="late")
        (3, "message.delete", message_id="m", reason="early"),
        lambda s: (inbox(s, "bob"), s.message("m")["delete_reason"], s.page(receiver="bob")["unread"]), ([], "early", 0)),
    "the latest edit counts": (
        two().send(1, "ada", "m", ["bob"], refs=mention("bob"))(5, "message.edit", message_id="m", body={"content": "5"})
        (3, "message.edit", message_id="m", body={"content": "3"}),
        lambda s: (s.message("m")["content"], s.edits(s.message("m")["seq"])), ("5", 2)),
    "of two edits at one time the greater event id counts": (
        two().send(1, "ada", "m", ["bob"], refs=mention("bob"))(5, "message.edit", message_id="m", body={"content": "first"})
        (5, "message.edit", message_id="m", body={"content": "second"}), lambda s: s.message("m")["content"], "second"),
    "a receipt of somebody who is no recipient changes nothing": (
        two().register(0, "eve").send(1, "ada", "m", ["bob"], refs=mention("bob"))
        (3, "message.receipt", message_id="m", agent_id="eve", receipt_type="read"),
        lambda s: (s.page(receiver="bob")["unread"], [r["agent_id"] for r in s.recipients(s.message("m"))]), (1, ["bob"])),
    "the first reading counts": (
        two().send(1, "ada", "m", ["bob"], refs=mention("bob"))
        (7, "message.receipt", message_id="m", agent_id="bob", receipt_type="read")
        (3, "message.receipt", message_id="m", agent_id="bob", receipt_type="read"),
        lambda s: s.recipients(s.message("m"))[0]["read_at"], thrum.stamp_of(START + 3 * thrum.NS + 1)),
    "seen is not read": (
        two().send(1, "ada", "m", ["bob"], refs=mention("bob"))
        (3, "message.receipt", message_id="m", agent_id="bob", receipt_type="seen"),
        lambda s: (s.page(receiver="bob")["unread"], "read_at" in s.recipients(s.message("m"))[0]), (1, False)),
    "the first end of a session counts": (
        two()(1, "agent.session.start", session_id="s", agent_id="ada")(9, "agent.session.end", session_id="s", reason="late")
        (5, "agent.session.end", session_id="s", reason="early"),
        lambda s: (s.session("s")["ended_at"] - START, s.session("s")["end_reason"]), (5 * thrum.NS + 1, "early")),
    "of two ends at one time the smaller event id is the first": (
        two()(1, "agent.session.start", session_id="s", agent_id="ada")(5, "agent.session.end", session_id="s", reason="one")
        (5, "agent.session.end", session_id="s", reason="two"), lambda s: s.session("s")["end_reason"], "one"),
    "of two deletions at one time too": (
        two().send(1, "ada", "m", ["bob"])(5, "message.delete", message_id="m", reason="one")
        (5, "message.delete", message_id="m", reason="two"), lambda s: s.message("m")["delete_reason"], "one"),
    "of two titles at one time too": (
        Story()(1, "thread.create", thread_id="thr_1", title="one")(1, "thread.create", thread_id="thr_1", title="two"),
        lambda s: s.value("select title from threads"), "one"),
    "a session was last seen at the latest of its events": (
        two()(1, "agent.session.start", session_id="s", agent_id="ada")(9, "agent.session.end", session_id="s")
        (5, "agent.session.end", session_id="s"),
        lambda s: s.session("s")["last_seen_at"] - START, 9 * thrum.NS + 1),
    "each field of a group keeps its own latest change": (
        Story()(1, "group.create", group_id="g", name="old")(3, "group.update", group_id="g", fields={"name": "new"})
        (5, "group.update", group_id="g", fields={"description": "what for"}),
        lambda s: (s.row("select name, description from groups")), {"name": "new", "description": "what for"}),
    "a group that each of two machines created keeps its later change": (
        Story()(5, "group.create", group_id="g", name="old")(9, "group.update", group_id="g", fields={"description": "new"})
        (1, "group.create", group_id="g", name="old", description="old"),
        lambda s: s.value("select description from groups"), "new"),
    "the scopes of a session are the latest": (
        two()(1, "agent.session.start", session_id="s", agent_id="ada")
        (5, "session.update", session_id="s", agent_id="ada", scopes=[{"type": "module", "value": "new"}])
        (3, "session.update", session_id="s", agent_id="ada", scopes=[{"type": "module", "value": "old"}]),
        lambda s: s.session_pairs("s")[0], [("module", "new")]),
    "intent and task of a session are the latest, each for itself": (
        two()(1, "agent.session.start", session_id="s", agent_id="ada")
        (5, "session.update", session_id="s", agent_id="ada", intent="new")
        (3, "session.update", session_id="s", agent_id="ada", intent="old", current_task="task"),
        lambda s: (s.work_context("s")["intent"], s.work_context("s")["current_task"]), ("new", "task")),
    "a removed agent's messages are gone, what was sent to it is not delivered again": (
        two().send(1, "ada", "m", ["bob"], refs=mention("bob")).send(2, "bob", "n", ["ada"], refs=mention("ada"))
        (5, "agent.cleanup", agent_id="ada"),
        lambda s: (s.message("m"), inbox(s, "bob"), s.agent("ada"), s.message("n")["agent_id"]), (None, [], None, "bob")),
    "an agent that comes again after its removal is there": (
        two()(5, "agent.cleanup", agent_id="ada").register(9, "ada").send(12, "bob", "m").send(7, "bob", "missed"),
        lambda s: (s.agent("ada")["registered_at"] - START, inbox(s, "ada")), (9 * thrum.NS + 1, ["m"])),
    "a purge takes what is older, also when that comes later": (
        two().send(1, "ada", "old", ["bob"], refs=mention("bob")).send(9, "ada", "new", ["bob"], refs=mention("bob"))
        (20, "purge.executed", cutoff=thrum.stamp_of(START + 5 * thrum.NS)),
        lambda s: (inbox(s, "bob"), s.page(receiver="bob")["unread"], s.message("old")), (["new"], 1, None)),
    "a purge never reaches into the future": (
        two().send(9, "ada", "m", ["bob"], refs=mention("bob"))(5, "purge.executed", cutoff="2030-01-01T00:00:00Z"),
        lambda s: inbox(s, "bob"), ["m"]),
    "an ended session that began before the cutoff leaves no work context": (
        two()(1, "agent.session.start", session_id="s", agent_id="ada")(2, "agent.session.end", session_id="s")
        (3, "agent.update", agent_id="ada", work_contexts=[
            {"session_id": "s", "intent": "gone", "intent_updated_at": "2026-03-01T08:00:02Z"}])
        (9, "purge.executed", cutoff=thrum.stamp_of(START + 5 * thrum.NS)),
        lambda s: s.newest_intent("ada"), None),
    "a reply without a thread opens the one named after its parent": (
        two().send(1, "ada", "msg_7", ["bob"], refs=mention("bob"))
        .send(2, "bob", "msg_8", ["ada"], refs=[{"type": "reply_to", "value": "msg_7"}, *mention("ada")]),
        lambda s: (s.message("msg_7")["thread_id"], s.message("msg_8")["thread_id"]), ("thr_7", "thr_7")),
    "replies on two machines join their threads under the smaller id": (
        two().send(1, "ada", "msg_7", ["bob"], refs=mention("bob"))
        .send(2, "bob", "msg_8", ["ada"], thread_id="thr_b", refs=[{"type": "reply_to", "value": "msg_7"}])
        .send(3, "bob", "msg_9", ["ada"], thread_id="thr_a", refs=[{"type": "reply_to", "value": "msg_7"}]),
        lambda s: ({s.message(m)["thread_id"] for m in ("msg_7", "msg_8", "msg_9")}, s.thread("thr_b")), ({"thr_a"}, "thr_a")),
    "a thread is none any more when the message that made it is removed": (     # its bytes are gone, and a rebuild must agree
        two().register(0, "eve").send(1, "ada", "msg_7", ["bob"], refs=mention("bob"))
        .send(2, "eve", "msg_8", ["ada"], refs=[{"type": "reply_to", "value": "msg_7"}])(5, "agent.cleanup", agent_id="eve"),
        lambda s: s.message("msg_7")["thread_id"], None),
    "a reply that does not name its thread goes by its purged parent": (
        two().send(1, "ada", "msg_7", ["bob"], thread_id="thr_z", refs=mention("bob"))
        .send(9, "bob", "msg_8", ["ada"], refs=[{"type": "reply_to", "value": "msg_7"}])
        (20, "purge.executed", cutoff=thrum.stamp_of(START + 5 * thrum.NS)),
        lambda s: s.message("msg_8")["thread_id"], "thr_7"),
    "a reply that names its thread keeps it when the parent is purged": (
        two().send(1, "ada", "msg_7", ["bob"], thread_id="thr_z", refs=mention("bob"))
        .send(9, "bob", "msg_8", ["ada"], thread_id="thr_z", refs=[{"type": "reply_to", "value": "msg_7"}])
        (20, "purge.executed", cutoff=thrum.stamp_of(START + 5 * thrum.NS)),
        lambda s: s.message("msg_8")["thread_id"], "thr_z"),
    "the first title of a thread counts": (
        Story()(5, "thread.create", thread_id="thr_1", title="late")(1, "thread.create", thread_id="thr_1", title="early"),
        lambda s: s.value("select title from threads"), "early"),
}

@pytest.mark.parametrize("rule", RULES)
def test_rule(rule):
    """Each rule holds whatever the order in which its events come."""
    story, question, expected = RULES[rule]
    found = [(question(store), order) for store, order in every_order(story)]
    wrong = [(answer, order) for answer, order in found if answer != expected]
    assert not wrong, f"{len(wrong)} of {len(found)} orders give another answer than {expected!r}: {wrong[0]}"


# ---- groups

@pytest.mark.parametrize("members, reached", [
    ([("agent", "bob")], {"bob"}),
    ([("agent", "nobody")], set()),
    ([("role", "reviewer")], {"rex"}),
    ([("role", "*")], {"ada", "bob", "rex"}),
    ([("group", "inner")], {"rex"}),
    ([("group", "outer")], set()),
    ([("group", "inner"), ("agent", "ada")], {"rex", "ada"}),
    ([("group", "ring")], {"bob"}),
    ([("group", "missing")], set()),
    ([("other", "bob")], set()),
    ([], set()),
])
def test_who_is_behind_a_group(members, reached):
    """Members may be agents, roles and groups, also in a ring; what is unknown adds nobody."""
    story = two().register(0, "rex", role="reviewer")
    for group, inside in {"outer": members, "inner": [("agent", "rex")],
                          "ring": [("group", "outer"), ("agent", "bob")]}.items():
        story(1, "group.create", group_id="grp_" + group, name=group)
        for kind, value in inside:
            story(2, "group.member.add", group_id="grp_" + group, member_type=kind, member_value=value)
    for store, order in every_order(story, 5):
        assert set(store.agent_ids(store.expand("group", "outer"))) == reached, order


def test_a_name_that_two_machines_gave_is_one_group_of_all_members():
    story = two()(1, "group.create", group_id="grp_1", name="team")(2, "group.create", group_id="grp_2", name="team")
    story(3, "group.member.add", group_id="grp_1", member_type="agent", member_value="ada")
    story(3, "group.member.add", group_id="grp_2", member_type="agent", member_value="bob")
    for store, order in every_order(story, 20):
        assert store.agent_ids(store.expand("group", "team")) == ["ada", "bob"], order
        assert store.group("team")["group_id"] == "grp_1", order
        assert [(row["name"], row["member_count"], row["group_id"]) for row in store.groups()] == [("team", 2, "grp_1")], order


# ---- questions

def big_inbox():
    story = two().register(0, "eve")
    for n in range(30):
        scopes = [{"type": "module", "value": "web" if n % 3 else "core"}]
        story.send(10 + n, ("ada", "eve")[n % 2], f"m{n:02}", ["bob"], refs=mention("bob"), scopes=scopes,
                   **({"thread_id": "thr_1"} if n % 5 == 0 else {}))
    for n in range(0, 30, 4):
        story(60 + n, "message.receipt", message_id=f"m{n:02}", agent_id="bob", receipt_type="read")
    return project(story.events)


def ns_at(seconds):
    return START + seconds * thrum.NS + 1


@pytest.mark.parametrize("question, numbers", [
    ({}, range(30)),
    ({"unread": True}, [n for n in range(30) if n % 4]),
    ({"author": "ada"}, range(0, 30, 2)),
    ({"not_author": "ada"}, range(30)),
    ({"scope": ("module", "core")}, range(0, 30, 3)),
    ({"scope": ("module", "none")}, []),
    ({"mention": "bob"}, range(30)),
    ({"ref": ("mention", "eve")}, []),
    ({"thread_id": "thr_1"}, range(0, 30, 5)),
    ({"after_ns": ns_at(29)}, range(20, 30)),
    ({"thread_id": "thr_1", "unread": True}, [n for n in range(0, 30, 5) if n % 4]),
    ({"author": "ada", "unread": True, "scope": ("module", "core")}, [n for n in range(0, 30, 6) if n % 4]),
    ({"author": "nobody"}, []),
])
def test_filters_of_a_page(question, numbers):
    """Each filter keeps what it says; totals count all that match, pages cut the list and nothing else."""
    store, expected = big_inbox(), [f"m{n:02}" for n in sorted(numbers, reverse=True)]
    page = store.page(receiver="bob", limit=100, **question)
    assert [m["message_id"] for m in page["messages"]] == expected
    assert page["total"] == len(expected)
    assert page["unread"] == sum(int(m[1:]) % 4 > 0 for m in expected)
    oldest = store.page(receiver="bob", limit=100, ascending=True, **question)
    assert [m["message_id"] for m in oldest["messages"]] == expected[::-1]
    paged = []
    for offset in range(0, 30, 7):
        part = store.page(receiver="bob", limit=7, offset=offset, **question)
        assert part["total"] == len(expected)
        paged += [m["message_id"] for m in part["messages"]]
    assert paged == expected


def test_after_a_sequence():
    """What came later than a number of the journal, oldest first, whatever its time says."""
    story = two().send(50, "ada", "a", ["bob"], refs=mention("bob")).send(40, "ada", "b", ["bob"], refs=mention("bob"))
    story.send(30, "ada", "c", ["bob"], refs=mention("bob"))
    store = project(story.events)
    for after, expected in ((0, ["a", "b", "c"]), (2, ["a", "b", "c"]), (3, ["b", "c"]), (4, ["c"]), (5, []), (99, [])):
        page = store.page(receiver="bob", after_seq=after, ascending=True)
        assert [m["message_id"] for m in page["messages"]] == expected


def test_somebody_unknown_sees_what_is_for_everybody():
    store = project(two().send(1, "ada", "all").send(2, "ada", "bobs", ["bob"], refs=mention("bob")).events)
    page = store.page(receiver="nobody")
    assert ([m["message_id"] for m in page["messages"]], page["total"], page["unread"]) == (["all"], 1, 1)


@pytest.mark.parametrize("to, expected", [
    ("", ["m5", "m4", "m3", "m2", "m1"]), ("bob", ["m5", "m4", "m3", "m1"]), ("eve", ["m5", "m4", "m2"]), ("everyone", ["m5", "m4"]),
    ("team", ["m3"]), ("implementer", []), ("nobody", []),
])
def test_outbox_by_recipient(to, expected):
    """`to` is an agent, a group or everyone."""
    story = two().register(0, "eve")(0, "group.create", group_id="g", name="team")
    story(0.5, "group.member.add", group_id="g", member_type="agent", member_value="bob")
    story.send(1, "ada", "m1", ["bob"], refs=mention("bob")).send(2, "ada", "m2", ["eve"], refs=mention("eve"))
    story.send(3, "ada", "m3", ["bob"], refs=[{"type": "group", "value": "team"}])
    story.send(4, "ada", "m4", ["bob", "eve"]).send(5, "ada", "m5", ["bob", "eve"], refs=[{"type": "group", "value": "everyone"}])
    story.send(6, "bob", "m6", ["ada"], refs=mention("ada"))
    store = project(story.events)
    sent = store.outbox("ada", to, limit=100)
    assert ([m["message_id"] for m in sent["messages"]], sent["total"]) == (expected, len(expected))


def test_a_message_by_its_send_key():
    story = two().send(1, "ada", "m", ["bob"], refs=mention("bob"), send_key="k").send(2, "bob", "n", ["ada"], send_key="k")
    store = project(story.events)
    assert (store.message_by_key("ada", "k")["message_id"], store.message_by_key("bob", "k")["message_id"]) == ("m", "n")
    assert store.message_by_key("ada", "other") is None


def test_a_reader_sees_what_was_committed_and_cannot_write(tmp_path):
    """Another connection answers from the last commit, remembers nothing stale, and refuses to change anything."""
    events = history(5)
    path = str(tmp_path / "messages.db")
    reader = None
    writer = thrum.Store(path, FakeWorld(), writable=True)
    writer.create()
    reader = thrum.Store(path, FakeWorld())
    for seq, event in enumerate(events, 1):
        writer.begin()
        writer.apply(event, seq, thrum.check_event(event))
        writer.settle()
        if seq % 10 == 0:
            held = reader.within(5, lambda: answers(reader, events))
            assert held != answers(writer, events) or not difference(held, answers(writer, events))
        writer.commit()
        if seq % 10 == 0:
            assert not difference(answers(writer, events), reader.within(5, lambda: answers(reader, events))), seq
    with pytest.raises(thrum.sqlite3.OperationalError):
        reader.set_meta(seq=0)
    reader.close()
    writer.close()


def test_a_query_that_takes_too_long_is_interrupted():
    store = project(history(1))
    endless = "with recursive n(i) as (select 1 union all select i + 1 from n) select count(*) from n"
    with pytest.raises(thrum.ThrumError, match="took longer"):
        store.within(0.01, lambda: store.value(endless))
    assert store.within(5, lambda: store.value("select 1")) == 1
