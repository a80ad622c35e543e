"""Subscriptions and pushes, over the WebSocket and the Unix socket of a real daemon."""

import json
import socket

import pytest
from conftest import Repo
from wire import Wire

import thrum


@pytest.fixture(scope="module")
def repo(tmp_path_factory):
    repo = Repo(tmp_path_factory.mktemp("live"))
    repo.git("init", "-q")
    repo.ok("init")
    for name, role in (("ada", "planner"), ("bob", "coder"), ("cyd", "tester")):
        repo.join(name, role)
    yield repo
    repo.close()


def call(repo, method, **params):
    with repo.client() as client:
        return client.call(method, **params)


def send(repo, content, to=None, author="ada", **more):
    return call(repo, "message.send", content=content, caller_agent_id=author, **({"mentions": [to]} if to else {}), **more)


def test_a_person_joins_by_itself_and_is_told_of_everything(repo):
    with Wire(repo) as page:
        who = page.call("user.identify")
        assert who["username"]
        told = page.join("eve", all=True)
        assert told["after_seq"] == told["subscription_id"] and told["epoch"] == page.call("health")["epoch"]
        sent = send(repo, "x" * 99 + "äöü" * 9, "@bob", scopes=[{"type": "module", "value": "core"}])
        note = page.push("message")
        assert note["message_id"] == sent["message_id"] and note["preview"] == "x" * 99 + "ä"
        assert note["author"] == {"agent_id": "ada", "name": "ada", "role": "planner", "module": "core"}
        assert note["scopes"] == [{"type": "module", "value": "core"}] == note["message"]["scopes"]
        assert note["matched_subscription"] == {"subscription_id": told["subscription_id"], "match_type": "all"}
        assert note["message"]["body"] == {"content": note["preview"]} and note["thread_id"] == ""
        assert note["seq"] > told["after_seq"] and "edited" not in note


def test_user_register_is_refused_on_the_unix_socket(repo):
    with pytest.raises(thrum.ThrumError, match="^User registration only available via WebSocket$"):
        call(repo, "user.register", username="zoe")


@pytest.mark.parametrize("method", ["daemon.stop", "purge.execute", "context.save", "context.clear", "context.preamble.save", "page.link"])
def test_what_is_for_the_unix_socket_only(repo, method):
    with Wire(repo) as page:
        error = page.reply(method, before="2020-01-01T00:00:00Z")["error"]
        assert (error["code"], error["message"]) == (-32601, "Method not found") and method in error["data"]


def test_what_matches(repo):
    """Section 11.3: scope, mention of a name, a role, the subscriber's own name and role; nothing else is pushed."""
    with Wire(repo) as page:
        page.call("session.list", caller_agent_id="cyd")
        numbers = {}
        for label, wanted in (("scope", {"scope": {"type": "task", "value": "t1"}}), ("mention", {"mention_role": "bob"})):
            numbers[label] = page.call("subscribe", caller_agent_id="cyd", **wanted)["subscription_id"]
        for to, scopes, expected in (
                ("@ada", [], None), ("@bob", [], ("mention", "mention")), ("@cyd", [], ("mention", "mention")),
                ("@tester", [], ("mention", "mention")), ("@coder", [], None), (None, [("task", "t1")], ("scope", "scope")),
                (None, [("task", "t2")], None), (None, [], None), ("@bob", [("task", "t1")], ("scope", "scope"))):
            send(repo, "m", to, scopes=[{"type": kind, "value": value} for kind, value in scopes])
            found = [note for note in page.pushes() if note["method"] == "message"]
            assert [note["matched_subscription"] for note in found] == (
                [{"subscription_id": numbers[expected[0]], "match_type": expected[1]}] if expected else []), (to, scopes)
        for number in numbers.values():
            assert page.call("unsubscribe", caller_agent_id="cyd", subscription_id=number) == {"removed": True}
        assert page.call("unsubscribe", caller_agent_id="cyd", subscription_id=number) == {"removed": False}
        send(repo, "m", "@bob")
        assert page.pushes() == []


def test_a_role_that_changes_is_followed(repo):
    repo.join("dee", "designer", "art")
    with Wire(repo) as page:
        page.call("subscribe", caller_agent_id="dee", mention_role="dee")
        send(repo, "m", "@designer")
        assert len(page.pushes()) == 1
        call(repo, "agent.register", name="dee", role="editor", module="art", re_register=True)
        send(repo, "m", "@editor")
        assert [note["preview"] for note in page.pushes()] == ["m"]


@pytest.mark.parametrize("params, text", [
    ({}, "at least one of scope, mention_role, or all must be specified"),
    ({"mention_role": ""}, "at least one of scope, mention_role, or all must be specified"),
    ({"topics": ["claim"]}, "no topic 'claim'"), ({"topics": ["*", "claims"]}, "no topic '*'"),
    ({"mention_role": "a\nb"}, "mention_role must be"), ({"all": True, "caller_agent_id": "nobody"},
                                                         "get current session: no active session found for agent nobody")])
def test_subscribe_refuses(repo, params, text):
    with pytest.raises(thrum.ThrumError) as caught:
        call(repo, "subscribe", **{"caller_agent_id": "bob", **params})
    assert text in str(caught.value)


def test_the_same_subscription_twice(repo):
    first = call(repo, "subscribe", caller_agent_id="bob", scope={"type": "a", "value": "b"})
    with pytest.raises(thrum.ThrumError, match="^subscribe: subscription already exists$"):
        call(repo, "subscribe", caller_agent_id="bob", scope={"type": "a", "value": "b"})
    second = call(repo, "subscribe", caller_agent_id="bob", topics=["claims"])
    assert [row["id"] for row in call(repo, "subscriptions.list", caller_agent_id="bob")["subscriptions"]] == [
        second["subscription_id"], first["subscription_id"]]
    for made in (first, second):
        call(repo, "unsubscribe", caller_agent_id="bob", subscription_id=made["subscription_id"])
    assert call(repo, "subscriptions.list", caller_agent_id="bob") == {"subscriptions": []}


def test_a_session_that_ends_leaves_nothing(repo):
    repo.join("fay", "writer", "docs")
    session = call(repo, "session.list", agent_id="fay", active_only=True)["sessions"][0]["session_id"]
    with Wire(repo) as page:
        page.call("subscribe", caller_agent_id="fay", all=True)
        page.call("session.end", session_id=session)
        send(repo, "m", "@bob")
        assert [note for note in page.pushes() if note["method"] == "message"] == []
        call(repo, "session.start", agent_id="fay")
        assert page.call("subscriptions.list", caller_agent_id="fay") == {"subscriptions": []}
        send(repo, "m", "@bob")
        assert page.pushes() == []


def test_edits_threads_and_the_unread_count_of_each(repo):
    parent = send(repo, "question?", "@bob")["message_id"]
    with Wire(repo) as ada, Wire(repo) as bob:
        ada.call("subscribe", caller_agent_id="ada", all=True)
        bob.call("subscribe", caller_agent_id="bob", mention_role="bob")
        reply = send(repo, "answer", "@ada", author="bob", reply_to=parent)
        note, thread = ada.pushes()
        assert note["method"] == "message" and note["thread_id"] == reply["thread_id"]
        assert thread["method"] == "thread.updated" and thread["seq"] == note["seq"]
        assert {key: thread[key] for key in ("thread_id", "message_count", "unread_count", "last_sender", "preview")} == {
            "thread_id": reply["thread_id"], "message_count": 2, "unread_count": 1, "last_sender": "bob", "preview": "answer"}
        assert bob.pushes() == []               # it is for ada
        send(repo, "more", "@bob", reply_to=reply["message_id"])
        assert [(note["method"], note.get("unread_count")) for note in bob.pushes()] == [("message", None), ("thread.updated", 2)]
        assert [note.get("unread_count") for note in ada.pushes()] == [None, 1]
        call(repo, "message.edit", message_id=parent, content="question!", caller_agent_id="ada")
        (edit,) = ada.pushes()
        assert edit["method"] == "message" and edit["edited"] and edit["preview"] == "question!" and edit["message_id"] == parent
        assert bob.pushes()[0]["edited"]
        call(repo, "message.markRead", message_ids=[parent], caller_agent_id="bob")
        assert [(note["method"], note["unread_count"]) for note in bob.pushes()] == [("thread.updated", 1)]
    call(repo, "session.end", session_id=call(repo, "agent.whoami", caller_agent_id="bob")["session_id"])
    call(repo, "session.start", agent_id="bob")


def test_the_sender_is_told_before_it_is_answered(repo):
    with Wire(repo) as page:
        page.join("gil", all=True)
        page.send({"jsonrpc": "2.0", "id": "s", "method": "message.send", "params": {"content": "m", "mentions": ["@bob"]}})
        first, second = page.take(), page.take()
        assert first["method"] == "notification.message" and second["id"] == "s"
        assert first["params"]["message_id"] == second["result"]["message_id"] and first["params"]["agent_id"] == "user:gil"


def test_topics(repo):
    """Everything that a page shows is told: it never has to ask again."""
    with Wire(repo) as page:
        page.join("hal", topics=["*"])
        repo.join("ivy", "auditor", "core")
        kinds = {note["method"] for note in page.pushes()}
        assert {"agent.register", "agent.session.start", "session.update"} <= kinds
        message = send(repo, "m", "@ivy")["message_id"]
        assert [note for note in page.pushes() if note["method"] == "message"] == []        # messages were not asked for
        call(repo, "message.markRead", message_ids=[message], caller_agent_id="ivy")
        (receipt,) = [note for note in page.pushes() if note["method"] == "message.receipt"]
        assert receipt["message_ids"] == [message] and receipt["agent_id"] == "ivy" and "event_id" not in receipt
        call(repo, "claim.take", paths=["docs"], caller_agent_id="ivy")
        assert page.push("claim.take")["path"] == "docs"
        call(repo, "claim.release", caller_agent_id="ivy")
        assert page.push("claim.release")["reason"]
        call(repo, "group.create", name="crew", caller_agent_id="ivy")
        assert page.push("group.create")["name"] == "crew"
        call(repo, "message.delete", message_id=message, caller_agent_id="ada")
        assert page.push("message.delete")["message_id"] == message
        call(repo, "agent.whoami")
        call(repo, "message.list", caller_agent_id="someone-new")
        assert page.push("presence")["agent_id"] == "someone-new"


def test_what_is_told_names_whom_and_what(repo):
    """A listener need not ask again whose session, claim, group or message it was."""
    repo.join("lea", "mason", "core")
    session = call(repo, "agent.whoami", caller_agent_id="lea")["session_id"]
    message = send(repo, "m", "@bob", author="lea")["message_id"]
    reply = send(repo, "r", "@lea", author="bob", reply_to=message)
    with Wire(repo) as page, Wire(repo) as queue:
        page.join("mia", topics=["*"])
        call(repo, "group.create", name="masons", caller_agent_id="lea")
        call(repo, "group.member.add", group="masons", member_value="lea", caller_agent_id="lea")
        assert page.push("group.member.add")["name"] == "masons"
        call(repo, "message.delete", message_id=reply["message_id"], caller_agent_id="bob")
        told = page.push("message.delete")
        assert (told["agent_id"], told["thread_id"]) == ("bob", reply["thread_id"])
        call(repo, "claim.take", paths=["walls"], caller_agent_id="lea")
        queue.send({"jsonrpc": "2.0", "id": 1, "method": "claim.take",
                    "params": {"paths": ["walls"], "caller_agent_id": "cyd", "wait_ms": 60_000}})
        told = page.push("claim.queue")
        assert (told["agent_id"], told["paths"], told["waiting"]) == ("cyd", ["walls"], True)
        call(repo, "session.end", session_id=session)
        found = [page.push("agent.session.end", "claim.release") for _ in range(2)]
        assert [(one["method"], one["agent_id"], one.get("path"), one.get("reason")) for one in found] == [
            ("agent.session.end", "lea", None, "normal"), ("claim.release", "lea", "walls", "session ended")]
        assert page.push("claim.take")["agent_id"] == "cyd" and page.push("claim.queue")["waiting"] is False
        call(repo, "claim.release", caller_agent_id="cyd")


def test_who_subscribes_again_follows_from_here(repo):
    """After a reconnect the subscription is still there, and its error says from where on it holds."""
    with Wire(repo) as page:
        number = page.call("subscribe", caller_agent_id="ada", scope={"type": "again", "value": "1"})["subscription_id"]
    missed = send(repo, "missed", scopes=[{"type": "again", "value": "1"}])
    with Wire(repo) as page:
        error = page.reply("subscribe", caller_agent_id="ada", scope={"type": "again", "value": "1"})["error"]
        assert error["message"] == "subscribe: subscription already exists" and error["data"]["subscription_id"] == number
        listed = page.call("message.list", after_seq=number, sort_order="asc", scope={"type": "again", "value": "1"})["messages"]
        assert [row["message_id"] for row in listed] == [missed["message_id"]] and listed[0]["seq"] <= error["data"]["after_seq"]
        sent = send(repo, "now", scopes=[{"type": "again", "value": "1"}])
        note = page.push("message")
        assert note["message_id"] == sent["message_id"] and note["seq"] > error["data"]["after_seq"]
        page.call("unsubscribe", caller_agent_id="ada", subscription_id=number)


def test_the_client_of_the_documents(repo):
    """seeds/event-streaming.md: it only opens the socket, subscribes to all, and is told."""
    for row in call(repo, "subscriptions.list", caller_agent_id="ada")["subscriptions"]:
        call(repo, "unsubscribe", caller_agent_id="ada", subscription_id=row["id"])
    for identity in (repo.path / ".thrum" / "identities").glob("*.json"):
        if identity.stem != "ada":
            identity.unlink()
    with Wire(repo) as page:
        page.send(b'{"jsonrpc":"2.0","method":"subscribe","params":{"all":true},"id":1}')
        reply = page.take()
        assert "result" in reply, reply
        number = reply["result"]["subscription_id"]
        sent = send(repo, "for the page", "@cyd", author="bob")
        assert page.push("message")["message_id"] == sent["message_id"]
        page.call("unsubscribe", subscription_id=number)


def test_a_thread_that_shrinks_and_an_agent_that_goes(repo):
    parent = send(repo, "p", "@bob")["message_id"]
    reply = send(repo, "r", "@ada", author="bob", reply_to=parent)["message_id"]
    repo.join("oda", "guest", "core")
    call(repo, "claim.take", paths=["oda.txt"], caller_agent_id="oda")
    with Wire(repo) as page:
        page.join("pia", all=True, topics=["claims"])
        call(repo, "message.delete", message_id=reply, caller_agent_id="bob")
        told = page.push("thread.updated")
        assert (told["message_count"], told["preview"], told["last_sender"]) == (1, "p", "ada")
        call(repo, "agent.delete", name="oda")
        assert page.push()["method"] == "agent.cleanup"


def test_a_cursor_beyond_the_end_is_the_end(repo):
    epoch = call(repo, "health")["epoch"]
    found = call(repo, "message.wait", after_seq=10**9, epoch=epoch, timeout_ms=0, all=True)
    assert found["timed_out"]
    with repo.client() as client:
        client.call("health")
        sent = send(repo, "m", "@bob")
        assert client.call("message.wait", after_seq=client.call("health")["last_seq"] - 1, all=True)["messages"][0][
            "message_id"] == sent["message_id"]
        assert client.call("event.wait", after_seq=10**9, timeout_ms=0)["after_seq"] == client.call("health")["last_seq"]


def test_tasks_are_told(repo):
    with Wire(repo) as page:
        page.join("ned", topics=["tasks"])
        call(repo, "task.report", task_id="t", stream_type="text", text="x" * 3000, turn_num=1, caller_agent_id="bob")
        told = page.push("task_stream")
        assert (told["task_id"], len(told["text"]), told["agent_id"]) == ("t", 2000, "bob")
        call(repo, "telemetry.report", pid=7, turns=2)
        assert page.push("telemetry")["instance_id"] == "external_7"


def test_many_receipts_are_told_as_one(repo):
    ids = [send(repo, f"m{n}", "@cyd")["message_id"] for n in range(250)]
    with Wire(repo) as page:
        page.join("jan", topics=["receipts"])
        call(repo, "message.markRead", message_ids=ids, caller_agent_id="cyd")
        notes = page.pushes()
        assert [len(note["message_ids"]) for note in notes] == [200, 50]
        assert [id for note in notes for id in note["message_ids"]] == ids


def test_the_unix_socket_is_told_too(repo):
    """A subscriber that only listens; lines of pushes and of replies do not mix."""
    sock = socket.socket(socket.AF_UNIX)
    sock.settimeout(10)
    sock.connect(str(repo.var / "thrum.sock"))
    file = sock.makefile("rwb")

    def ask(id, method, **params):
        file.write(json.dumps({"jsonrpc": "2.0", "id": id, "method": method, "params": params}).encode() + b"\n")
        file.flush()
    ask(1, "subscribe", caller_agent_id="ada", mention_role="@ada")
    number = json.loads(file.readline())["result"]["subscription_id"]
    sent = [send(repo, f"m{n}", "@ada", author="bob")["message_id"] for n in range(5)]
    told = [json.loads(file.readline()) for _ in sent]
    assert [one["params"]["message_id"] for one in told] == sent
    assert {one["method"] for one in told} == {"notification.message"}
    seqs = [one["params"]["seq"] for one in told]
    assert seqs == sorted(seqs)
    ask(2, "unsubscribe", caller_agent_id="ada", subscription_id=number)
    assert json.loads(file.readline())["result"] == {"removed": True}
    sock.close()


def test_a_subscription_made_by_a_command_reaches_a_connection_of_its_agent(repo):
    with Wire(repo) as page:
        page.call("message.list", caller_agent_id="bob")
        number = call(repo, "subscribe", caller_agent_id="bob", all=True)["subscription_id"]
        send(repo, "m", "@cyd")
        assert page.push("message")["matched_subscription"]["subscription_id"] == number
        call(repo, "unsubscribe", caller_agent_id="bob", subscription_id=number)


def test_subscriptions_outlive_the_daemon(repo):
    number = call(repo, "subscribe", caller_agent_id="cyd", all=True)["subscription_id"]
    repo.kill()
    repo.ok("daemon", "start")
    with Wire(repo) as page:
        assert [row["id"] for row in page.call("subscriptions.list", caller_agent_id="cyd")["subscriptions"]] == [number]
        send(repo, "after", "@bob")
        assert page.push("message")["preview"] == "after"
        assert page.call("unsubscribe", caller_agent_id="cyd", subscription_id=number)["removed"]


def test_several_long_answers_at_once_to_a_slow_reader(repo):
    """They wait for the client together: Python 3.9 has room for one who waits."""
    before = call(repo, "health")["last_seq"]
    for _ in range(8):
        send(repo, "x" * 60_000, "@bob")
    with Wire(repo, limit=4096) as page:
        for number in range(6):
            page.peer.send(json.dumps({"jsonrpc": "2.0", "id": number, "method": "message.wait", "params": {
                "all": True, "after_seq": before, "page_size": 100, "timeout_ms": 1000}}).encode())
        page.flush()
        assert sorted(page.take()["id"] for _ in range(6)) == list(range(6))


def test_list_then_follow_has_no_gap(repo):
    """While eight senders write, a client that lists up to `after_seq` and follows sees each message once."""
    import threading
    before = call(repo, "health")["last_seq"]

    def write(name):
        with repo.client() as client:
            for n in range(40):
                client.call("message.send", content=f"{name} {n}", mentions=["@cyd"], caller_agent_id="ada")
    threads = [threading.Thread(target=write, args=(f"w{n}",)) for n in range(8)]
    for thread in threads:
        thread.start()
    with Wire(repo) as page:
        page.join("kit")
        told = page.call("subscribe", all=True)
        listed, cursor = [], before
        while True:
            found = page.call("message.list", after_seq=cursor, sort_order="asc", page_size=100)["messages"]
            fresh = [row for row in found if row["seq"] > cursor]
            if not fresh or cursor >= told["after_seq"]:
                break
            listed += [row["body"]["content"] for row in fresh]
            cursor = fresh[-1]["seq"]
        for thread in threads:
            thread.join()
        followed = [note["preview"] for note in page.pushes() if note["method"] == "message" and note["seq"] > cursor]
    assert sorted(listed + followed) == sorted(f"w{n} {m}" for n in range(8) for m in range(40))
    for n in range(8):
        assert [text for text in listed + followed if text.startswith(f"w{n} ")] == [f"w{n} {m}" for m in range(40)]
