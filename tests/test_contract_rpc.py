"""The contract of the methods: each row of spec/rpc.md that this stage keeps, and its acceptance vectors, by one real daemon.

`ROWS` names the test that proves each row, or the decision of the design that overrules it.
"""

import base64
import itertools
import json
import shutil
import threading
from pathlib import Path

import pytest

import thrum
from conftest import THRUM, Repo
from rows import unproved
from shapes import SHAPES, shape, shaped
from test_daemon import Raw
from test_methods import Team as Local

LONG = 30               # seconds after which a thread that should be done has failed
GHOST = "msg_00000000000000000000000000"

ROWS = {
    # 1.1 Unix socket
    "1.1 path": "test_the_socket_lies_where_clients_look", "1.1 creation": "test_daemon.test_start_stop_restart_and_what_each_says",
    "1.1 creation, old socket": "test_daemon.test_stale_files_are_reclaimed",
    "1.1 client override": "test_client.test_where_it_may_not_be_started",
    "1.1 framing": "test_daemon.test_shapes_of_calls_and_what_is_answered",
    "1.1 request size": "test_daemon.test_the_longest_line_is_read",
    "1.1 batch": "decision 15", "1.1 two objects": "test_daemon.test_shapes_of_calls_and_what_is_answered",
    "1.1 empty line": "test_daemon.test_shapes_of_calls_and_what_is_answered",
    "1.1 line without newline": "test_daemon.test_a_half_closed_socket_gets_its_replies_and_the_end",
    "1.1 concurrency": "test_daemon.test_pipelined_calls_are_answered_in_order, test_daemon.test_mixed_calls_in_parallel",
    "1.1 idle timeout": "test_daemon.test_a_silent_connection_is_closed",
    "1.1 handler deadline": "test_daemon.test_a_question_that_takes_too_long_is_interrupted",
    "1.1 server push": "decision 13", "1.1 authentication": "test_daemon.test_another_user_is_not_served",
    "1.2 bind": "decision 12, test_port.test_the_port_stays_the_same_and_gives_way",
    "1.2 path": "test_port.test_a_websocket_at_the_root_too",
    "1.2 handshake": "test_port.test_handshakes_that_are_wrong", "1.2 origin": "test_port.test_origin", "1.2 host": "test_port.test_host",
    "1.2 frames": "test_port.test_json_rpc_over_the_websocket", "1.2 message size": "test_port.test_too_much_is_1009",
    "1.2 batch": "test_port.test_json_rpc_over_the_websocket", "1.2 concurrency": "test_port.test_pings_are_answered_while_a_request_runs",
    "1.2 keepalive": "test_outbox.test_a_silent_client_is_pinged_and_given_up, test_outbox.test_any_frame_is_a_sign_of_life",
    "1.2 write deadline": "test_outbox.test_a_stalled_write_ends_after_ten_seconds_and_a_slow_one_does_not",
    "1.2 slow client": "decision 14, test_outbox.test_who_is_behind_is_closed_with_what_was_on_its_way",
    "1.2 close codes": "test_port.test_a_close_is_answered, test_port.test_the_daemon_says_goodbye",
    "1.3 routes": "test_pages.test_a_deep_link_is_the_page_and_a_missing_asset_is_none, test_port.test_health",
    "11.1 subscribe": "test_live.test_subscribe_refuses", "11.1 unsubscribe": "test_live.test_what_matches",
    "11.1 subscriptions.list": "test_live.test_the_same_subscription_twice",
    "11.2 lifetime": "test_live.test_a_session_that_ends_leaves_nothing",
    "11.3 matching": "test_live.test_what_matches, test_live.test_a_role_that_changes_is_followed",
    "12.1 triggers": "test_live.test_edits_threads_and_the_unread_count_of_each, test_live.test_topics",
    "12.3 params": "test_live.test_a_person_joins_by_itself_and_is_told_of_everything",
    "12.4 params": "test_live.test_edits_threads_and_the_unread_count_of_each",
    "12.5 binding": "test_live.test_a_subscription_made_by_a_command_reaches_a_connection_of_its_agent",
    "1.1 shutdown": "test_daemon.test_a_stop_answers_what_is_in_flight, test_daemon.test_a_stop_is_over_in_its_time_whatever_clients_do",
    # 2 envelope
    "2 valid call": "test_the_envelope", "2 params missing": "test_the_envelope", "2 params null": "test_the_envelope",
    "2 params of another type": "decision 15", "2 unknown fields": "test_the_envelope", "2 duplicate keys": "test_the_envelope",
    "2 id": "test_the_envelope", "2 id missing": "decision 15", "2 version": "test_the_envelope", "2 method unknown": "test_the_envelope",
    "2 method no string": "decision 15", "2 bad JSON": "test_the_envelope", "2 handler error": "test_the_envelope",
    "2 unencodable result": "test_daemon.test_a_bug_in_a_method_harms_nobody_else",
    # 3 identity
    "3.1 named agent": "test_agent_ids", "3.1 reserved": "test_agent_ids", "3.1 unnamed agent": "test_agent_ids",
    "3.1 legacy agent": "decision 4", "3.1 user": "test_user_register", "3.1 ids": "test_every_id_has_its_prefix_and_they_rise",
    "3.1 built-in groups": "test_group_list_and_everyone", "3.1 daemon id": "decision 8", "3.1 repo id": "decision 25",
    "3.1 shard": "test_events_and_their_files, test_user_register",
    "3.2 #1": "test_who_is_calling", "3.2 #2": "test_who_is_calling", "3.2 #3": "test_vector_11",
    "3.2 failure": "test_who_is_calling", "3.2 client side": "test_commands.test_environment_says_who",
    "3.3 message.send": "test_vector_11", "3.3 message.edit": "test_edit", "3.3 message.markRead": "decision 16",
    "3.3 message.list": "test_list_without_a_session", "3.3 message.outbox": "test_outbox", "3.3 message.get": "test_get",
    "3.3 subscriptions": "test_live.test_subscribe_refuses", "3.3 agent.whoami": "test_whoami", "3.3 group audit": "test_group_info",
    # 4 shapes
    "4 shapes": "test_every_reply_has_its_shape", "4 no reply tells authored_by": "design 6",
    # 6.1 - 6.4
    "6.1 health": "test_health",
    **{f"6.2 #{n}": "test_register_refuses" for n in range(1, 6)},
    "6.2 #6": "test_register_again", "6.2 #7": "test_register_again", "6.2 #8": "test_vector_8", "6.2 #9": "decision 6",
    "6.2 #10": "test_register_again", "6.2 effects": "test_events_and_their_files", "6.2 role group": "decision 3",
    "6.3 filters": "test_agent_list", "6.3 order": "test_agent_list", "6.3 users": "test_user_register",
    "6.4 caller": "test_whoami", "6.4 none": "test_who_is_calling", "6.4 session": "test_whoami", "6.4 intent": "test_whoami",
    # 6.5, 6.8
    "6.5 request": "test_list_context, test_work.test_filters_of_agent_context", "6.5 response": "test_every_reply_has_its_shape",
    "6.5 order": "test_list_context",
    "6.8 members": "test_every_reply_has_its_shape", "6.8 shared_messages": "test_team_list", "6.8 rows": "test_team_list",
    "6.8 status": "test_team_list", "6.8 inbox": "test_team_list, test_store.test_inbox_unread_and_sent_are_those_of_the_model",
    # 6.6, 6.7
    "6.6 response": "test_agent_delete", "6.6 errors": "test_agent_delete_refuses", "6.6 effects": "test_agent_delete",
    "6.6 comes back": "test_an_agent_that_was_deleted_can_come_back", "6.6 stays": "test_what_a_deleted_agent_leaves",
    "6.7 orphan": "test_agent_cleanup", "6.7 threshold": "test_agent_cleanup", "6.7 users": "test_user_register",
    "6.7 messages": "test_agent_cleanup", "6.7 null": "test_agent_cleanup",
    # 6.9
    "6.9 start": "test_session_start", "6.9 start errors": "test_refusals", "6.9 end": "test_session_end",
    "6.9 end errors": "test_refusals", "6.9 ended again": "design 10", "6.9 list": "test_session_list",
    "6.9 heartbeat": "test_heartbeat", "6.9 heartbeat errors": "test_refusals, test_an_ended_session_takes_nothing",
    "6.9 setIntent": "test_intent_and_task", "6.9 setTask": "test_intent_and_task",
    "6.9 git context": "test_work.test_odd_repositories, test_work.test_what_is_stale",
    # 6.10
    "6.10 create": "test_group_create", "6.10 create errors": "test_refusals, test_group_create", "6.10 delete": "test_group_delete",
    "6.10 delete errors": "test_refusals, test_vector_31", "6.10 add": "test_group_members", "6.10 add errors": "test_refusals",
    "6.10 remove": "test_group_remove", "6.10 remove errors": "test_refusals", "6.10 list": "test_group_list_and_everyone",
    "6.10 info": "test_group_info", "6.10 info errors": "test_refusals", "6.10 members": "test_group_members",
    "6.10 audit": "test_group_info", "6.10 names": "decision 3", "6.10 star": "test_a_group_of_all_roles", "6.10 nesting": "decision 3",
    "6.10 twice": "test_group_members", "6.10 delete_messages": "test_group_delete_with_its_messages", "6.10 role group": "decision 3",
    "6.10 everyone": "test_group_list_and_everyone",
    # 6.11
    "6.11 identify": "test_user_identify", "6.11 identify errors": "test_user_identify_without_a_name",
    "6.11 register": "test_user_register", "6.11 register errors": "test_user_register_refuses", "6.11 on U": "test_vector_6",
    "6.11 existing": "test_user_register", "6.11 new": "test_user_register", "6.11 sending": "test_impersonation",
    # 7
    "7.1 content": "test_send_checks_in_order", "7.1 format": "test_send_checks_in_order", "7.1 structured": "test_structured",
    "7.1 reply_to": "test_reply", "7.1 scopes": "test_labels", "7.1 refs": "test_labels", "7.1 mentions": "test_vector_12",
    "7.1 tags": "decision 23", "7.1 thread_id": "decision 2", "7.1 check order": "test_send_checks_in_order",
    "7.1 response": "test_every_reply_has_its_shape", "7.1 errors": "test_send_checks_in_order", "7.1 repeated pairs": "test_vector_40",
    "7.2 get": "test_get", "7.2 errors": "test_refusals", "7.2 audiences": "test_get", "7.2 marks nothing": "test_get",
    **{f"7.3 {name}": "test_list_filters" for name in (
        "scope", "ref", "thread_id", "author_id", "mention_role", "unread", "unread_for_agent", "exclude_self", "for_agent",
        "created_after")},
    "7.3 mentions": "decision 16", "7.3 page_size": "test_pages", "7.3 page": "test_pages", "7.3 sort_by": "test_order",
    "7.3 sort_order": "test_order", "7.3 response": "test_every_reply_has_its_shape",
    "7.4 outbox": "test_outbox", "7.4 errors": "test_outbox", "7.4 to": "test_outbox_to", "7.4 unread": "test_vector_20",
    "7.5 edit": "test_edit", "7.5 errors": "test_edit, test_refusals",
    "7.6 delete": "test_delete", "7.6 errors": "test_vector_24, test_refusals",
    "7.6 permission": "decision 17", "7.7 markRead": "test_mark_read", "7.7 errors": "test_refusals", "7.7 unknown ids": "test_mark_read",
    "7.7 already read": "test_mark_read", "7.7 non-recipient": "design 10", "7.7 stores": "decision 20",
    "7.8 deleteByScope": "test_delete_by_scope", "7.8 deleteByAgent": "test_delete_by_agent", "7.8 archive": "test_archive",
    "7.8 errors": "test_refusals", "7.8 no event": "test_what_was_done_outlives_the_database",
    # 8
    "8.1 group": "test_vector_12", "8.1 agent": "test_vector_13", "8.1 neither": "test_vector_14", "8.1 case": "test_names_are_exact",
    "8.1 self": "test_an_author_is_no_recipient", "8.1 name and group": "decision 3", "8.1 everyone": "test_vector_16",
    "8.1 all, broadcast": "test_names_are_exact", "8.1 no mentions": "test_vector_15", "8.1 labels": "test_labels",
    "8.1 given refs": "test_forged_refs_are_resolved", "8.1 snapshot": "test_later_members_get_nothing",
    "8.1 group scope of the page": "test_forged_refs_are_resolved",
    "8.2 visible": "decision 20", "8.2 M": "test_vector_17", "8.2 G": "test_later_members_get_nothing", "8.2 B": "test_vector_19",
    "8.3 combination": "decision 16", "8.3 deleted": "decision 16", "8.3 unread without session": "test_list_without_a_session",
    "8.3 is_read": "test_mark_read", "8.3 unread": "test_list_filters", "8.3 order": "decision 16", "8.3 paging": "test_pages",
    "8.3 several reply_to": "test_reply", "8.3 time strings": "test_times_are_compared_as_times",
    "8.4 delivered": "test_vector_13", "8.4 seen, read": "test_mark_read",
    # 9, 10
    "9 creation": "test_reply", "9 parent has thread": "test_reply", "9 parent has none": "decision 2", "9 ref": "test_reply",
    "9 addressing": "test_reply", "9 list": "test_reply",
    "10 #1": "test_vector_27", "10 #2": "test_impersonation_is_refused", "10 #3": "test_impersonation_is_refused",
    "10 stored": "test_impersonation", "10 recipients": "test_impersonation", "10 edit": "test_impersonation",
    # 13
    "13 common": "test_events_and_their_files", "13 files": "test_events_and_their_files",
    **{f"13 {kind}": "test_events_and_their_files" for kind in (
        "message.create", "message.edit", "message.delete", "message.receipt", "agent.register", "agent.session.start / end",
        "agent.cleanup", "group.create / delete", "group.member.add / remove", "purge.executed")},
    "13 agent.update": "test_work.test_the_end_of_a_session_tells_what_it_did",
    "13 group.update": "test_store.test_any_order_and_repetition_gives_the_same_answers",
    "13 unknown types": "test_an_unknown_event_is_carried_and_ignored",
    "13 without event": "test_what_was_done_outlives_the_database",
    # 14.4, 14.5, whose shapes the issue names
    "14.4 purge": "test_purge", "14.4 errors": "test_vector_32, test_refusals",
    "14.5 context": "test_context", "14.5 errors": "decision 23",
    # 18 acceptance vectors
    "18 #2": "test_the_envelope", "18 #3": "test_the_envelope", "18 #6": "test_vector_6", "18 #7": "test_vector_7",
    "18 #8": "test_vector_8", "18 #9": "test_register_refuses", "18 #10": "test_register_refuses",
    **{f"18 #{n}": f"test_vector_{n}" for n in (11, 12, 13, 14, 15, 16, 17, 19, 20, 22, 23, 24, 27, 31, 32, 33, 37, 38, 40)},
    "18 #36": "test_daemon.test_who_leaves_in_the_middle_leaves_nothing_behind", "18 #39": "test_daemon.test_mixed_calls_in_parallel",
    **{f"18 #{n}": "decision 15" for n in (1, 4)}, "18 #18": "decision 19", "18 #21": "design 10",
    "18 #25": "decision 16", "18 #26": "design 6",
    "18 #5": "test_port.test_json_rpc_over_the_websocket",
    "18 #28": "decision 13, test_live.test_a_person_joins_by_itself_and_is_told_of_everything",
    "18 #29": "test_live.test_subscribe_refuses, test_live.test_the_same_subscription_twice",
    "18 #30": "test_live.test_a_session_that_ends_leaves_nothing", "18 #34": "issue: sync", "18 #35": "issue: sync",
}


def test_each_row_has_its_proof():
    assert not unproved(ROWS, "test_contract_rpc")
    sections = {row.split()[0] for row in ROWS}
    assert sections >= set("1.1 2 3.1 3.2 3.3 4 6.1 6.2 6.3 6.4 6.5 6.6 6.7 6.8 6.9 6.10 6.11 7.1 7.2 7.3 7.4 7.5 7.6 7.7 7.8 "
                           "8.1 8.2 8.3 8.4 9 10 13 18 1.2 1.3 11.1 11.2 11.3 12.1 12.3 12.4 12.5".split())
    assert {f"18 #{n}" for n in range(1, 41)} <= set(ROWS)


# ---- the crew

@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """One daemon for all tests of this file."""
    path = tmp_path_factory.mktemp("contract")
    repo = Repo(path)
    repo.git("init", "-q", "-b", "main")
    repo.git("commit", "-q", "--allow-empty", "-m", "first")
    repo.git("config", "user.name", "Léon_van der  Berg!")
    repo.git("config", "user.email", "leon@example.org")
    repo.ok("init")
    yield repo
    repo.close()
    shutil.rmtree(path, ignore_errors=True)


@pytest.fixture(scope="module")
def client(served):
    with served.client() as made:
        yield made


class Crew:
    """The vectors' team: a with role x, b and c with role y, all with sessions, under names that no other test has."""

    numbers = itertools.count(1)

    def __init__(self, client, repo):
        self.client, self.repo = client, repo
        self.n = next(Crew.numbers)
        self.a, self.b, self.c, self.x, self.y = (f"{letter}{self.n}" for letter in "abcxy")
        self.sessions = {}
        for name, role in ((self.a, self.x), (self.b, self.y), (self.c, self.y)):
            self.join(name, role)

    def call(self, method, **params):
        return self.client.call(method, **params)

    def join(self, name, role, module="core"):
        assert self.call("agent.register", name=name, role=role, module=module, force=True)["status"] == "registered"
        self.sessions[name] = self.call("session.start", agent_id=name)["session_id"]
        return name

    def refused(self, method, code=-32000, **params):
        """The text of a refusal, which leaves no event."""
        before = self.call("health")["last_seq"]
        with pytest.raises(thrum.ThrumError) as caught:
            self.call(method, **params)
        assert caught.value.code == code, caught.value
        assert self.call("health")["last_seq"] == before and "\n" not in str(caught.value)
        return str(caught.value)

    def send(self, who, content="hello", **more):
        return self.call("message.send", caller_agent_id=who, content=content, **more)

    def get(self, message_id):
        return self.call("message.get", message_id=message_id)["message"]

    def list(self, **more):
        return self.call("message.list", page_size=100, **more)["messages"]

    def texts(self, **more):
        return [m["body"]["content"] for m in self.list(**more)]

    def inbox(self, who, **more):
        return self.texts(for_agent=who, caller_agent_id=who, **more)

    def recipients(self, sent):
        return [r["agent_id"] for r in sent.get("recipients", [])]


@pytest.fixture
def crew(client, served):
    return Crew(client, served)


@pytest.fixture
def local(tmp_path):
    """Methods in this process, where people can register (a Unix socket refuses them): user:leon, and agents a and b."""
    team = Local(tmp_path)
    assert team.call("user.register", username="leon", display="Leon")["user_id"] == "user:leon"
    team.call("session.start", agent_id="user:leon")
    team.agent("a", "x")
    team.agent("b", "y")
    yield team
    team.close()


# ---- 1.1, 2: the envelope

def test_the_socket_lies_where_clients_look(served):
    path = served.path / ".thrum" / "var" / "thrum.sock"
    assert path.is_socket() and path.stat().st_mode & 0o777 == 0o600


OK = {"jsonrpc": "2.0", "id": 1, "result": "Health"}
ENVELOPES = [
    (b'{"jsonrpc":"2.0","id":1,"method":"health"}', OK),
    (b'{"jsonrpc":"2.0","id":1,"method":"health","params":{}}', OK),
    (b'{"jsonrpc":"2.0","id":1,"method":"health","params":null}', OK),
    (b'{"jsonrpc":"2.0","id":1,"method":"health","params":{"unknown":[1]},"also":{}}', OK),
    (b'{"jsonrpc":"2.0","id":7,"id":1,"method":"nope","method":"health"}', OK),
    (b'{"jsonrpc":"2.0","id":"seven","method":"health"}', {**OK, "id": "seven"}),
    (b'{"jsonrpc":"2.0","id":1.25,"method":"health"}', {**OK, "id": 1.25}),
    (b'{"jsonrpc":"2.0","id":null,"method":"health"}', {**OK, "id": None}),
    (b"{}", {"code": -32600, "message": "Invalid request", "data": "jsonrpc field must be '2.0'", "id": None}),          # vector 2
    (b'{"jsonrpc":"1.1","id":1,"method":"health"}',
     {"code": -32600, "message": "Invalid request", "data": "jsonrpc field must be '2.0'", "id": 1}),
    (b'{"jsonrpc":"2.0","id":1,"method":"nope.x"}',                                                                      # vector 3
     {"code": -32601, "message": "Method not found", "data": "method 'nope.x' is not registered", "id": 1}),
    (b'{"jsonrpc":"2.0","id":1,"method":"message.get","params":{"message_id":"msg_0"}}',
     {"code": -32000, "message": "message not found: msg_0", "id": 1}),
    (b"not JSON", {"code": -32700, "message": "Parse error", "id": None}),
]


@pytest.mark.parametrize(("line", "expected"), ENVELOPES, ids=[line.decode()[:60] for line, _ in ENVELOPES])
def test_the_envelope(served, line, expected):
    with Raw(served) as raw:
        reply = raw.send(line + b"\n").end_of_writing().reply()
        assert raw.reply() is None
    assert reply["jsonrpc"] == "2.0" and reply["id"] == expected["id"]
    if "result" in expected:
        shaped(reply["result"], expected["result"])
        assert "error" not in reply
        return
    assert "result" not in reply and [reply["error"][k] for k in ("code", "message")] == [expected[k] for k in ("code", "message")]
    if expected["code"] == -32000:
        assert "data" not in reply["error"]
    elif "data" in expected:
        assert reply["error"]["data"] == expected["data"]


# ---- 3: identity

def test_agent_ids(crew):
    assert crew.call("agent.register", name="a-b_0" * 3, role="z", module="m", force=True)["agent_id"] == "a-b_0" * 3
    for name in ("daemon", "system", "thrum", "all", "broadcast", "A", "a b", "ä", "a.b", "../a", "user:x", "a/b"):
        assert crew.refused("agent.register", -32602, name=name, role="z", module="m").startswith("invalid agent name: "), name
    role = f"tester{crew.n}"
    made = crew.call("agent.register", role=role, module="m")["agent_id"]
    assert made == thrum.unnamed_agent_id(crew.call("health")["repo_id"], role, "m")
    head, _, tail = made.rpartition("_")
    assert head == role and len(tail) == 10 and tail == tail.lower()


def test_every_id_has_its_prefix_and_they_rise(crew):
    ids = [crew.send(crew.a, str(n), mentions=["@" + crew.b])["message_id"] for n in range(20)]
    assert ids == sorted(set(ids))
    for one in ids:
        shaped(one, "msg")
    shaped(crew.sessions[crew.a], "ses")


def test_who_is_calling(served, client):
    """The caller in the request; else the identity of the daemon's own worktree; else a clear refusal."""
    crew = Crew(client, served)
    assert client.call("agent.whoami", caller_agent_id=crew.a)["source"] == "caller"
    folder = served.path / ".thrum" / "identities"
    assert not list(folder.glob("*.json")), "nobody has registered from this worktree"
    assert "no agent identities registered" in crew.refused("message.markRead", message_ids=[GHOST])
    folder.joinpath(crew.a + ".json").write_text(json.dumps({
        "version": 3, "agent": {"kind": "agent", "name": crew.a, "role": crew.x, "module": "core"}, "worktree": served.path.name}))
    try:
        me = client.call("agent.whoami")
        assert (me["agent_id"], me["source"]) == (crew.a, "identity_file")
        shaped(me, "Whoami")
        sent = client.call("message.send", content="without saying who", mentions=["@" + crew.b])
        assert crew.get(sent["message_id"])["author"]["agent_id"] == crew.a
    finally:
        folder.joinpath(crew.a + ".json").unlink()


def test_vector_11(crew):
    name = f"lone{crew.n}"
    crew.call("agent.register", name=name, role="z", module="m", force=True)
    assert crew.refused("message.send", caller_agent_id=name, content="x") == (
        f"resolve agent and session: no active session found for agent {name} (you must start a session first)")


# ---- 4: shapes of all replies

def example(crew):
    """For each method, parameters that are right, in an order in which they work."""
    g, h = f"shape{crew.n}", f"other{crew.n}"
    sent = crew.send(crew.a, "to b", mentions=["@" + crew.b], scopes=[{"type": "module", "value": "m"}])["message_id"]
    crew.call("message.markRead", caller_agent_id=crew.b, message_ids=[sent])
    reply = crew.send(crew.b, "back", mentions=["@" + crew.a], reply_to=sent, structured={"k": 1})["message_id"]
    session = crew.call("session.start", agent_id=crew.c)["session_id"]
    content = base64.b64encode(b"hi").decode()
    return [
        ("health", {}), ("agent.register", {"role": "z", "module": "z", "name": f"new{crew.n}", "force": True}),
        ("agent.register", {"role": crew.x, "module": "core", "name": f"taken{crew.n}"}), ("agent.list", {}),
        ("agent.whoami", {"caller_agent_id": crew.a}), ("agent.listContext", {}),
        ("agent.listContext", {"agent_id": crew.a}), ("team.list", {}), ("team.list", {"include_offline": True}),
        ("work.whoHas", {"file": "README.md"}), ("worktree.status", {}),
        ("session.thread", {"caller_agent_id": crew.b}), ("session.thread", {"caller_agent_id": crew.a}),
        ("claim.take", {"paths": [f"src/{crew.n}", f"docs/{crew.n}/*.md"], "caller_agent_id": crew.a, "ttl_s": 60, "note": "why"}),
        ("claim.take", {"paths": [f"src/{crew.n}"], "caller_agent_id": crew.a}),
        ("work.whoHas", {"file": f"src/{crew.n}"}), ("claim.list", {}), ("claim.list", {"agent_id": crew.b, "paths": ["src"]}),
        ("claim.check", {"paths": [f"src/{crew.n}/x"], "caller_agent_id": crew.b}),
        ("claim.release", {"paths": [f"src/{crew.n}"], "caller_agent_id": crew.a}), ("claim.release", {"caller_agent_id": crew.a}),
        ("conflict.list", {}), ("conflict.list", {"all": True}), ("agent.cleanup", {"dry_run": True, "threshold": 30}),
        ("session.start", {"agent_id": crew.b}), ("session.list", {}), ("session.heartbeat", {"session_id": session}),
        ("session.setIntent", {"session_id": session, "intent": "think"}),
        ("session.setTask", {"session_id": session, "current_task": "t-1"}), ("session.end", {"session_id": session}),
        ("group.create", {"name": g, "description": "d"}), ("group.create", {"name": h}),
        ("group.member.add", {"group": g, "member_type": "agent", "member_value": crew.b, "caller_agent_id": crew.a}),
        ("group.member.add", {"group": g, "member_type": "role", "member_value": crew.x}),
        ("group.member.add", {"group": g, "member_type": "group", "member_value": h}),
        ("group.list", {}), ("group.info", {"name": g}), ("group.members", {"name": g, "expand": True}), ("group.members", {"name": h}),
        ("group.member.remove", {"group": g, "member_type": "agent", "member_value": crew.b}), ("group.delete", {"name": g}),
        ("user.identify", {}),
        ("message.send", {"content": "x", "mentions": ["@" + crew.y], "caller_agent_id": crew.a}),
        ("message.send", {"content": "x", "reply_to": sent, "caller_agent_id": crew.a}),
        ("message.get", {"message_id": sent}), ("message.get", {"message_id": reply}), ("message.list", {}),
        ("message.list", {"for_agent": crew.a, "caller_agent_id": crew.a}), ("message.outbox", {"caller_agent_id": crew.a}),
        ("message.markRead", {"message_ids": [reply, sent], "caller_agent_id": crew.a}),
        ("message.edit", {"message_id": sent, "content": "better", "caller_agent_id": crew.a}), ("message.get", {"message_id": sent}),
        ("message.delete", {"message_id": sent, "reason": "done", "caller_agent_id": crew.a}), ("message.get", {"message_id": sent}),
        ("context.save", {"agent_name": crew.a, "content": content}), ("context.show", {"agent_name": crew.a}),
        ("context.show", {"agent_name": crew.b}), ("context.preamble.save", {"agent_name": crew.a, "content": content}),
        ("context.preamble.show", {"agent_name": crew.a}), ("context.clear", {"agent_name": crew.a}),
        ("message.deleteByScope", {"scope_type": "nothing", "scope_value": "here"}),
        ("message.archive", {"archive_type": "agent", "identifier": crew.b}),
        ("message.deleteByAgent", {"agent_id": crew.c}), ("agent.delete", {"name": crew.c}),
        ("purge.execute", {"before": "2001-01-01T00:00:00Z", "dry_run": True}),
    ]


def test_every_reply_has_its_shape(crew):
    """The golden shape of each method's reply; all problems are told at once."""
    problems, tried = [], set()
    for method, params in example(crew):
        tried.add(method)
        try:
            shaped(crew.call(method, **params), "rpc " + method, method)
        except (AssertionError, thrum.ThrumError) as problem:
            problems.append(f"{method}: {problem}")
    assert tried == set(SHAPES["rpc"]) - {"user.register"}
    assert not problems, "\n".join(problems)


# ---- refusals, word for word

A_SESSION = "SESSION"
REFUSALS = [
    ("6.2", "agent.register", {"module": "m"}, "role is required"), ("6.2", "agent.register", {"role": "z"}, "module is required"),
    ("6.6", "agent.delete", {}, "agent name is required"),
    ("6.9", "session.start", {}, "agent_id is required"),
    ("6.9", "session.start", {"agent_id": "ghost"}, "agent not found: agent ghost not registered"),
    ("6.9", "session.end", {}, "session_id is required"), ("6.9", "session.end", {"session_id": "ses_0"}, "session not found"),
    ("6.9", "session.heartbeat", {}, "session_id is required"),
    ("6.9", "session.heartbeat", {"session_id": "ses_0"}, "session not found"),
    ("6.9", "session.setIntent", {"intent": "x"}, "session_id is required"),
    ("6.9", "session.setIntent", {"session_id": "ses_0", "intent": "x"}, "session not found"),
    ("6.9", "session.setTask", {"session_id": "ses_0", "current_task": "x"}, "session not found"),
    ("6.10", "group.create", {}, "name is required"), ("6.10", "group.create", {"name": "everyone"}, 'group "everyone" already exists'),
    ("6.10", "group.delete", {}, "name is required"), ("6.10", "group.delete", {"name": "ghosts"}, 'group "ghosts" not found'),
    ("6.10", "group.member.add", {"member_type": "agent", "member_value": "ghost"}, "group is required"),
    ("6.10", "group.member.add", {"group": "staff", "member_type": "agent"}, "member_value is required"),
    ("6.10", "group.member.add", {"group": "staff", "member_type": "team", "member_value": "x"}, 'invalid member_type "team"'),
    ("6.10", "group.member.add", {"group": "ghosts", "member_type": "agent", "member_value": "x"}, 'group "ghosts" not found'),
    ("6.10", "group.member.add", {"group": "staff", "member_type": "agent", "member_value": "ghost"},
     'agent "ghost" not found — agent must be registered before being added to a group'),
    ("6.10", "group.member.add", {"group": "staff", "member_type": "role", "member_value": "ghost"},
     'role "ghost" not found — no registered agents with this role'),
    ("6.10", "group.member.remove", {"member_type": "agent", "member_value": "ghost"}, "group is required"),
    ("6.10", "group.member.remove", {"group": "staff", "member_type": "agent"}, "member_value is required"),
    ("6.10", "group.member.remove", {"group": "ghosts", "member_type": "agent", "member_value": "x"}, 'group "ghosts" not found'),
    ("6.10", "group.member.remove", {"group": "everyone", "member_type": "role", "member_value": "*"},
     "cannot modify members of built-in @everyone group"),
    ("6.10", "group.info", {}, "name is required"), ("6.10", "group.info", {"name": "ghosts"}, 'group "ghosts" not found'),
    ("6.10", "group.members", {}, "name is required"), ("6.10", "group.members", {"name": "ghosts"}, 'group "ghosts" not found'),
    ("7.2", "message.get", {}, "message_id is required"), ("7.2", "message.get", {"message_id": GHOST}, "message not found: " + GHOST),
    ("7.3", "message.list", {"sort_by": "size"}, "invalid sort_by: size (must be 'created_at' or 'updated_at')"),
    ("7.3", "message.list", {"sort_order": "up"}, "invalid sort_order: up (must be 'asc' or 'desc')"),
    ("7.4", "message.outbox", {"caller_agent_id": "ghost", "to": " @ "}, "invalid to filter"),
    ("7.5", "message.edit", {"content": "x"}, "message_id is required"),
    ("7.5", "message.edit", {"message_id": GHOST}, "at least one of content or structured must be provided"),
    ("7.5", "message.edit", {"message_id": GHOST, "content": ""}, "at least one of content or structured must be provided"),
    ("7.6", "message.delete", {}, "message_id is required"),
    ("7.6", "message.delete", {"message_id": GHOST}, "message not found: " + GHOST),
    ("7.7", "message.markRead", {"caller_agent_id": "ghost"}, "message_ids is required and must not be empty"),
    ("7.7", "message.markRead", {"caller_agent_id": "ghost", "message_ids": []}, "message_ids is required and must not be empty"),
    ("7.8", "message.deleteByScope", {}, "scope_type and scope_value are required"),
    ("7.8", "message.deleteByScope", {"scope_type": "t"}, "scope_type and scope_value are required"),
    ("7.8", "message.deleteByAgent", {}, "agent_id is required"),
    ("7.8", "message.archive", {"archive_type": "agent"}, "identifier is required"),
    ("7.8", "message.archive", {"archive_type": "role", "identifier": "x"}, 'invalid archive_type: "role" (must be "agent" or "group")'),
    ("14.4", "purge.execute", {}, "before is required"),
]


@pytest.fixture(scope="module")
def staff(client):
    client.call("group.create", name="staff")


@pytest.mark.parametrize(("section", "method", "params", "text"), REFUSALS, ids=[f"{m} {json.dumps(p)}" for _, m, p, _ in REFUSALS])
def test_refusals(crew, staff, section, method, params, text):
    error = crew.refused(method, **params)
    assert error == text or error.startswith((text + " (", text + ":"))


PATHS = ["../x", "/etc/passwd", "a/b", "..", "", "a\0b", "x" * 300]


@pytest.mark.parametrize("path", PATHS, ids=repr)
def test_no_name_is_a_path(crew, path):
    """What becomes a file name is a name, wherever it comes from (rpc 17, 6)."""
    for method, params in (("agent.register", {"name": path or "/", "role": "z", "module": "m"}),
                           ("agent.register", {"role": path, "module": "m"}),
                           ("agent.delete", {"name": path}), ("group.create", {"name": path}),
                           ("context.save", {"agent_name": path, "content": ""}),
                           ("context.show", {"agent_name": path}), ("context.clear", {"agent_name": path}),
                           ("context.preamble.save", {"agent_name": path, "content": ""}), ("session.start", {"agent_id": path})):
        before = crew.call("health")["last_seq"]
        with pytest.raises(thrum.ThrumError) as caught:
            crew.call(method, **params)
        assert caught.value.code in (-32000, -32602) and crew.call("health")["last_seq"] == before, method
    try:
        crew.call("message.archive", archive_type="agent", identifier=path)
    except thrum.ThrumError as error:
        assert error.code in (-32000, -32602)
    assert not (crew.repo.path / "x").exists() and not (crew.repo.path / ".thrum" / "x.jsonl").exists()


# ---- 6: platform, agents, sessions

def test_health(crew):
    first = crew.call("health")
    shaped(first, "Health")
    assert first["version"].startswith(thrum.__version__) and crew.call("health")["uptime_ms"] >= first["uptime_ms"]


def test_vector_7(make_repo):
    repo = make_repo()
    repo.ok("init")
    with repo.client() as client:
        assert client.call("agent.register", name="a", role="x", module="m")["status"] == "registered"
        assert [group["name"] for group in client.call("group.list")["groups"]].count("everyone") == 1
        client.call("agent.register", name="b", role="y", module="m")
        client.call("session.start", agent_id="b")
        sent = client.call("message.send", content="to x", mentions=["@x"], caller_agent_id="b")
        assert [r["agent_id"] for r in sent["recipients"]] == ["a"], "the role is a group"


def test_vector_8(crew):
    before = crew.call("health")["last_seq"]
    answer = crew.call("agent.register", name=f"late{crew.n}", role=crew.x, module="core")
    assert (answer["agent_id"], answer["status"]) == ("", "conflict") and crew.call("health")["last_seq"] == before
    assert answer["conflict"]["existing_agent_id"] == crew.a
    for number, way in enumerate(("force", "re_register")):
        name = f"late{crew.n}-{number}"
        added = crew.call("agent.register", name=name, role=crew.x, module="core", **{way: True})
        assert (added["agent_id"], added["status"]) == (name, "registered")
    assert crew.a in [row["agent_id"] for row in crew.call("agent.list")["agents"]], "decision 6"


def test_register_refuses(crew):
    """6.2, steps 1 to 5, in their order; vectors 9 and 10."""
    a, x = crew.a, crew.x
    for name, role, text in (
            ("Bad Name", "", "role is required"), ("Bad Name", "z", "invalid agent name: agent name 'Bad Name' contains invalid"),
            ("z", "z", 'agent name "z" cannot be the same as its role — use a distinct name (e.g., \'z_main\')'),
            (x, "z", f"agent name \"{x}\" conflicts with existing role '{x}' — choose a different name"),
            (f"y2-{crew.n}", a, f"role \"{a}\" conflicts with existing agent name '{a}' — choose a different role")):
        with pytest.raises(thrum.ThrumError) as caught:
            crew.call("agent.register", name=name, role=role, module="z")
        assert str(caught.value).startswith(text)
    assert crew.call("agent.register", name=a, role=crew.x, module="core", re_register=True)["status"] == "updated"


def test_register_again(crew):
    def register(**more):
        return crew.call("agent.register", name=crew.a, **{"role": crew.x, "module": "core", **more})["status"]
    before = crew.call("health")["last_seq"]
    assert register() == "registered" and crew.call("health")["last_seq"] == before
    assert register(re_register=True) == "updated" and crew.call("health")["last_seq"] == before + 1
    assert register(module="other") in ("registered", "updated")
    (row,) = [row for row in crew.call("agent.list")["agents"] if row["agent_id"] == crew.a]
    assert (row["role"], row["module"]) == (crew.x, "other")


def test_agent_list(crew):
    rows = crew.call("agent.list")["agents"]
    names = [row["agent_id"] for row in rows]
    assert names[:3] == [crew.c, crew.b, crew.a], "newest first"
    assert [row["agent_id"] for row in crew.call("agent.list", role=crew.y)["agents"]] == [crew.c, crew.b]
    assert crew.call("agent.list", role=crew.y, module="nope")["agents"] == []
    assert crew.call("agent.list", role=crew.y + "x")["agents"] == [], "filters are exact"


def test_whoami(crew):
    crew.call("session.setIntent", session_id=crew.sessions[crew.a], intent="think")
    me = crew.call("agent.whoami", caller_agent_id=crew.a)
    assert (me["agent_id"], me["role"], me["module"], me["source"], me["intent"]) == (crew.a, crew.x, "core", "caller", "think")
    assert me["session_id"] == crew.sessions[crew.a] and me["session_start"]
    unknown = crew.call("agent.whoami", caller_agent_id="ghost")
    assert (unknown["agent_id"], unknown["role"], unknown["module"]) == ("ghost", "", "") and "session_id" not in unknown
    crew.call("session.end", session_id=crew.sessions[crew.a])
    assert "session_id" not in crew.call("agent.whoami", caller_agent_id=crew.a)


def test_session_start(crew):
    second = crew.call("session.start", agent_id=crew.a, scopes=[{"type": "t", "value": "v"}], refs=[{"type": "r", "value": "1"}])
    rows = {row["session_id"]: row for row in crew.call("session.list", agent_id=crew.a)["sessions"]}
    first = rows[crew.sessions[crew.a]]
    assert (first["status"], first["end_reason"]) == ("ended", "crash_recovered")
    assert rows[second["session_id"]]["status"] == "active" and second["agent_id"] == crew.a
    assert second["started_at"] == rows[second["session_id"]]["started_at"]


def test_session_end(crew):
    ended = crew.call("session.end", session_id=crew.sessions[crew.a])
    other = crew.call("session.end", session_id=crew.sessions[crew.b], reason="lunch, with words")
    rows = {row["session_id"]: row for row in crew.call("session.list")["sessions"]}
    assert rows[ended["session_id"]]["end_reason"] == "normal" and rows[ended["session_id"]]["ended_at"] == ended["ended_at"]
    assert rows[other["session_id"]]["end_reason"] == "lunch, with words"


def test_session_list(crew):
    again = crew.call("session.start", agent_id=crew.a)["session_id"]
    rows = crew.call("session.list", agent_id=crew.a)["sessions"]
    assert [row["session_id"] for row in rows] == [again, crew.sessions[crew.a]], "newest first"
    for word in ("active_only", "active"):
        assert [row["session_id"] for row in crew.call("session.list", agent_id=crew.a, **{word: True})["sessions"]] == [again]
    assert crew.call("session.list", agent_id="ghost")["sessions"] == []
    crew.call("session.setIntent", session_id=again, intent="sorting")
    assert crew.call("session.list", agent_id=crew.a)["sessions"][0]["intent"] == "sorting"


def test_list_context(crew):
    """6.5: open sessions alone, by exact id, branch and file."""
    mine, = crew.call("agent.listContext", agent_id=crew.a)["contexts"]
    assert (mine["session_id"], mine["agent_id"]) == (crew.sessions[crew.a], crew.a)
    for params in ({"agent_id": crew.a[:-1] + "%"}, {"agent_id": crew.x}, {"agent_id": crew.a, "branch": "nowhere"},
                   {"agent_id": crew.a, "file": "%"}):
        assert crew.call("agent.listContext", **params)["contexts"] == []
    assert [work["agent_id"] for work in crew.call("agent.listContext")["contexts"] if work["agent_id"] in (crew.a, crew.b, crew.c)] \
        == [crew.c, crew.b, crew.a], "the newest first"
    crew.call("session.end", session_id=crew.sessions[crew.a])
    assert crew.call("agent.listContext", agent_id=crew.a)["contexts"] == []


def test_team_list(crew):
    """6.8: one row for each who has a session, or with include_offline for each; mail that waits; what is shared."""
    def team(**more):
        return {member["agent_id"]: member for member in crew.call("team.list", **more)["members"]}

    def shared():
        found = crew.call("team.list").get("shared_messages", {"broadcast_total": 0, "groups": []})
        return found["broadcast_total"], {group["name"]: group["total"] for group in found["groups"]}
    broadcasts, groups = shared()
    direct = crew.send(crew.a, "direct", mentions=["@" + crew.b])["message_id"]
    crew.send(crew.a, "to the role", mentions=["@" + crew.y])
    name = f"team{crew.n}"
    crew.call("group.create", name=name)
    crew.call("group.member.add", group=name, member_type="agent", member_value=crew.b)
    crew.send(crew.a, "to the group", mentions=["@" + name])
    everyone = crew.send(crew.a, "to all")["message_id"]
    assert shared()[0] == broadcasts + 1 and shared()[1] == {**groups, name: 1, crew.y: 1}
    mine = team()[crew.b]
    assert mine["status"] == "active" and mine["session_id"] == crew.sessions[crew.b] and (mine["role"], mine["module"]) == (crew.y, "core")
    assert mine["inbox_unread"] == mine["inbox_total"] >= 2 and team()[crew.a]["inbox_total"] == 0
    crew.call("message.markRead", message_ids=[direct], caller_agent_id=crew.b)
    assert (team()[crew.b]["inbox_total"], team()[crew.b]["inbox_unread"]) == (mine["inbox_total"], mine["inbox_unread"] - 1)
    crew.call("message.delete", message_id=everyone, caller_agent_id=crew.a)
    assert shared()[0] == broadcasts
    crew.call("session.end", session_id=crew.sessions[crew.b])
    assert crew.b not in team() and crew.b not in team(include_offline=False)
    for params in ({"include_offline": True}, {"all": True}):
        gone = team(**params)[crew.b]
        assert gone["status"] == "offline" and "session_id" not in gone
    order = [member["status"] for member in crew.call("team.list", all=True)["members"]]
    assert order == sorted(order), "offline last"


def test_heartbeat(crew):
    session = crew.sessions[crew.a]
    pair = {"type": "t", "value": "v"}
    beat = crew.call("session.heartbeat", session_id=session, add_scopes=[pair], remove_scopes=[pair], add_refs=[pair], remove_refs=[pair])
    assert beat["session_id"] == session
    (row,) = [r for r in crew.call("agent.list")["agents"] if r["agent_id"] == crew.a]
    assert row["last_seen_at"] >= beat["last_seen_at"]


def test_an_ended_session_takes_nothing(crew):
    session = crew.sessions[crew.a]
    crew.call("session.end", session_id=session)
    for method, params in (("session.heartbeat", {}), ("session.setIntent", {"intent": "x"}), ("session.setTask", {"current_task": "x"})):
        assert crew.refused(method, session_id=session, **params) == f"session {session} has already ended"


def test_intent_and_task(crew):
    session = crew.sessions[crew.a]
    assert crew.call("session.setIntent", session_id=session, intent="think")["intent"] == "think"
    assert crew.call("agent.whoami", caller_agent_id=crew.a)["intent"] == "think"
    assert crew.call("session.setIntent", session_id=session, intent="")["intent"] == ""
    assert not crew.call("agent.whoami", caller_agent_id=crew.a).get("intent")
    assert crew.call("session.setTask", session_id=session, current_task="t-1")["current_task"] == "t-1"
    assert crew.call("session.setTask", session_id=session)["current_task"] == ""


def test_agent_delete(crew):
    thrum_dir = crew.repo.path / ".thrum"
    crew.send(crew.b, "of b", mentions=["@" + crew.a])
    (thrum_dir / "context").mkdir(exist_ok=True)
    files = [thrum_dir / "identities" / f"{crew.b}.json", thrum_dir / "context" / f"{crew.b}.md",
             thrum_dir / "context" / f"{crew.b}_preamble.md"]
    files[0].write_text(json.dumps({"version": 3, "agent": {"name": crew.b, "role": crew.y, "module": "core"}}))
    files[1].write_text("notes")
    files[2].write_text("preamble")
    answer = crew.call("agent.delete", name=crew.b)
    assert (answer["agent_id"], answer["deleted"], answer["message"]) == (crew.b, True, f"Agent {crew.b} deleted successfully")
    assert not [file for file in files if file.exists()]
    assert crew.b not in [row["agent_id"] for row in crew.call("agent.list")["agents"]]
    assert crew.call("session.list", agent_id=crew.b)["sessions"] == []
    assert crew.inbox(crew.a) == [], "its messages go with it"
    assert crew.refused("agent.delete", name=crew.b) == f"agent not found: {crew.b}"
    assert crew.c in [row["agent_id"] for row in crew.call("agent.list")["agents"]]


def test_agent_delete_refuses(crew):
    assert crew.refused("agent.delete", name="ghost") == "agent not found: ghost"
    for name in ("user:leon", "agent:role:HASH", "daemon", "Upper"):
        assert crew.refused("agent.delete", -32602, name=name).startswith("invalid agent name: "), name


def test_an_agent_that_was_deleted_can_come_back(crew):
    """rpc 17, 19: one that registers again under the name can send, and nothing of the old one's is its own."""
    crew.send(crew.b, "old words", mentions=["@" + crew.a])
    crew.call("agent.delete", name=crew.b)
    crew.join(crew.b, crew.y)
    assert crew.call("message.outbox", caller_agent_id=crew.b)["messages"] == []
    crew.send(crew.b, "new life", mentions=["@" + crew.a])
    assert crew.inbox(crew.a) == ["new life"]


def test_what_a_deleted_agent_leaves(crew):
    """Group memberships stay, a name that is like a pattern takes no other with it, and mail to it is kept for its sender."""
    other, near = crew.join(f"w_x{crew.n}", "z1"), crew.join(f"wax{crew.n}", "z2")
    crew.send(near, "near", mentions=["@" + crew.a])
    sent = crew.send(crew.a, "to the one who goes", mentions=["@" + other])
    crew.call("agent.delete", name=other)
    assert crew.inbox(crew.a) == ["near"], "`_` is no wildcard"
    assert [m["message_id"] for m in crew.call("message.outbox", caller_agent_id=crew.a)["messages"]] == [sent["message_id"]]


def test_agent_cleanup(make_repo):
    """Who has no identity file, or whose worktree is gone, is an orphan; who was not seen for long, too."""
    repo = make_repo()
    repo.ok("init")
    repo.join("ada", "planner")
    linked = repo.worktree("linked")
    linked.join("bob", "implementer")
    with repo.client() as client:
        client.call("agent.register", name="ghost", role="z", module="m", worktree="repo")
        found = client.call("agent.cleanup", dry_run=True, threshold=30)
        shaped(found, "Cleanup")
        (orphan,) = found["orphans"]
        assert (orphan["agent_id"], orphan["role"], orphan["module"]) == ("ghost", "z", "m")
        assert (orphan["name"], orphan["reason"], found["deleted_count"]) == ("ghost", "no identity file", 0), "the seeds'"
        assert (found["deleted"], found["dry_run"], found["message"]) == ([], True, "Found 1 orphaned agent(s)")
        assert "--force" in client.call("agent.cleanup", threshold=30)["message"]
        assert {row["agent_id"] for row in client.call("agent.list")["agents"]} == {"ada", "bob", "ghost"}, "nothing was deleted"
        client.call("agent.delete", name="ghost")
        assert client.call("agent.cleanup", dry_run=True, threshold=30)["orphans"] == []
        repo.git("worktree", "remove", "--force", str(linked.path))
        found = client.call("agent.cleanup", force=True, threshold=30)
        assert [o["agent_id"] for o in found["orphans"]] == ["bob"] and found["orphans"][0]["worktree_missing"] is True
        assert (found["deleted"], found["deleted_count"], found["message"]) == (["bob"], 1, "Deleted 1 orphaned agent(s)")
        assert [row["agent_id"] for row in client.call("agent.list")["agents"]] == ["ada"]


# ---- 6.10: groups

@pytest.fixture
def group(crew):
    name = f"team{crew.n}"
    crew.call("group.create", name=name, description="who serves", caller_agent_id=crew.a)
    return name


def test_group_create(crew, group):
    assert crew.refused("group.create", name=group) == f'group "{group}" already exists'
    for taken in (crew.a, crew.x):
        assert crew.refused("group.create", name=taken), "decision 3: names cannot shadow agents or roles"


def test_group_list_and_everyone(crew, group):
    groups = crew.call("group.list")["groups"]
    assert [g["name"] for g in groups] == sorted(g["name"] for g in groups)
    rows = {g["name"]: g for g in groups}
    assert rows["everyone"]["group_id"] == "grp_everyone" and rows["everyone"]["description"] == "All agents"
    assert rows["everyone"]["member_count"] == 1 and rows[group]["member_count"] == 0
    info = crew.call("group.info", name="everyone")
    assert info["created_by"] == "system"
    assert [(m["member_type"], m["member_value"]) for m in info["members"]] == [("role", "*")]


def test_group_info(crew, group):
    crew.call("group.member.add", group=group, member_type="agent", member_value=crew.b, caller_agent_id=crew.a)
    crew.call("group.member.add", group=group, member_type="role", member_value=crew.x)
    info = crew.call("group.info", name=group)
    assert (info["name"], info["description"], info["created_by"]) == (group, "who serves", crew.a)
    assert {(m["member_type"], m["member_value"], m["added_by"]) for m in info["members"]} == {
        ("agent", crew.b, crew.a), ("role", crew.x, "system")}


def test_group_members(crew, group):
    for kind, value in (("agent", crew.a), ("role", crew.y), ("agent", crew.a), ("agent", "@" + crew.a)):
        added = crew.call("group.member.add", group=group, member_type=kind, member_value=value)
        assert (added["group"], added["member_type"], added["member_value"]) == (group, kind, value.lstrip("@"))
    plain = crew.call("group.members", name=group)
    assert "expanded" not in plain and len(plain["members"]) == 2
    assert crew.call("group.members", name=group, expand=True)["expanded"] == [crew.a, crew.b, crew.c]


def test_groups_in_groups(crew, group):
    """Decision 3: nested, cycles refused, expanded through."""
    inner = group + "-inner"
    crew.call("group.create", name=inner)
    crew.call("group.member.add", group=inner, member_value=crew.c)
    crew.call("group.member.add", group=group, member_type="group", member_value=inner)
    assert "inside itself" in crew.refused("group.member.add", group=inner, member_type="group", member_value=group)
    assert crew.call("group.members", name=group, expand=True)["expanded"] == [crew.c]
    assert crew.recipients(crew.send(crew.a, mentions=["@" + group])) == [crew.c]
    crew.call("group.delete", name=inner)
    assert crew.call("group.members", name=group, expand=True).get("expanded", []) == []


def test_group_remove(crew, group):
    for word in ("member_value", "member"):
        crew.call("group.member.add", group=group, member_type="agent", **{word: crew.b})
        gone = crew.call("group.member.remove", group=group, member_type="agent", **{word: crew.b})
        assert (gone["group"], gone["member_type"], gone["member_value"], gone["removed"]) == (group, "agent", crew.b, True)
        assert crew.call("group.members", name=group)["members"] == []
    before = crew.call("health")["last_seq"]
    shaped(crew.call("group.member.remove", group=group, member_type="agent", member_value="ghost"), "rpc group.member.remove")
    assert crew.call("health")["last_seq"] == before, "who was none is none: a success that changes nothing"


def test_a_group_of_all_roles(crew, group):
    crew.call("group.member.add", group=group, member_type="role", member_value="*")
    assert {crew.a, crew.b, crew.c} <= set(crew.call("group.members", name=group, expand=True)["expanded"])
    assert {crew.b, crew.c} <= set(crew.recipients(crew.send(crew.a, mentions=["@" + group])))


def test_group_delete(crew, group):
    crew.send(crew.a, "before", mentions=["@" + group])
    gone = crew.call("group.delete", name=group, caller_agent_id=crew.a)
    assert gone["name"] == group
    assert group not in [g["name"] for g in crew.call("group.list")["groups"]]
    assert crew.refused("group.info", name=group) == f'group "{group}" not found'
    assert f"unknown recipients: @{group}" in crew.refused("message.send", content="x", mentions=["@" + group], caller_agent_id=crew.a)
    crew.call("group.create", name=group)
    assert crew.call("group.members", name=group)["members"] == [], "a new group of the name begins empty"


def test_group_delete_with_its_messages(crew, group):
    crew.call("group.member.add", group=group, member_value=crew.b)
    kept = crew.send(crew.a, "to b", mentions=["@" + crew.b])
    crew.send(crew.a, "to the group", mentions=["@" + group])
    crew.call("group.delete", name=group, delete_messages=True)
    assert crew.inbox(crew.b) == ["to b"]
    assert [m["message_id"] for m in crew.call("message.outbox", caller_agent_id=crew.a)["messages"]] == [kept["message_id"]]


def test_vector_31(crew):
    assert crew.refused("group.delete", name="everyone") == "cannot delete built-in @everyone group"
    for name in ("everyone", "@everyone"):
        assert crew.refused("group.member.add", group=name, member_value=crew.b) == "cannot modify members of built-in @everyone group"


# ---- 6.11: people

def test_user_identify(crew):
    me = crew.call("user.identify")
    assert me["display"] == "Léon_van der  Berg!" and me["email"] == "leon@example.org"
    assert me["username"].startswith("l") and me["username"].endswith("-berg") and me["username"] == me["username"].lower()


@pytest.fixture
def nameless(make_repo, monkeypatch):
    """A repository where git knows no name."""
    monkeypatch.setitem(__import__("conftest").CLEAN, "HOME", str(make_repo("home", commit=False).path))
    monkeypatch.setitem(__import__("conftest").CLEAN, "GIT_CONFIG_SYSTEM", "/dev/null")
    repo = make_repo("nameless")
    repo.ok("init")
    return repo


def test_user_identify_without_a_name(nameless):
    with nameless.client() as client, pytest.raises(thrum.ThrumError) as caught:
        client.call("user.identify")
    assert str(caught.value) == "git config user.name not set: configure with 'git config user.name \"Your Name\"'"


def test_vector_6(crew):
    assert crew.refused("user.register", username="leon") == "User registration only available via WebSocket"


def test_user_register(local):
    before = local.ledger.journal.last
    again = local.call("user.register", username="leon")
    assert (again["user_id"], again["username"], again["status"]) == ("user:leon", "leon", "existing")
    shaped(again, "rpc user.register")
    assert local.ledger.journal.last == before, "no event"
    new = local.call("user.register", username="Max_1-x")
    assert new["status"] == "registered" and new["token"] != again["token"]
    (row,) = [row for row in local.call("agent.list")["agents"] if row["agent_id"] == "user:Max_1-x"]
    assert (row["kind"], row["role"], row["module"]) == ("user", "Max_1-x", "ui")
    assert "user:leon" in [r["agent_id"] for r in local.send("a", mentions=["@leon"])["recipients"]]
    assert "user:leon" in [r["agent_id"] for r in local.send("a", "to all")["recipients"]]
    assert "user:" not in json.dumps(local.call("agent.cleanup", dry_run=True)["orphans"])


@pytest.mark.parametrize(("username", "text"), [
    ("", "username is required"), ("agent:x", "username cannot start with 'agent:' prefix"),
    *((bad, "invalid username format: must be alphanumeric, underscore, or hyphen (1-32 chars)")
      for bad in ("two words", "é", "x" * 33, "a/b", "user:x"))])
def test_user_register_refuses(local, username, text):
    assert str(local.refused("user.register", username=username)) == text


def test_impersonation(local):
    """Section 10: the agent speaks, the person is recorded; with `disclose` it is told (decision of design, section 6)."""
    sent = local.send("user:leon", "as a", acting_as="a", disclose=True)
    assert "a" not in [r["agent_id"] for r in sent["recipients"]] and "b" in [r["agent_id"] for r in sent["recipients"]]
    assert local.get(sent["message_id"])["author"]["agent_id"] == "a"
    event = [json.loads(line) for _, line in local.ledger.journal.read(0)][-1]
    assert (event["agent_id"], event["authored_by"], event["disclosed"]) == ("a", "user:leon", True)
    quiet = local.send("user:leon", "as a, quietly", acting_as="a")
    event = [json.loads(line) for _, line in local.ledger.journal.read(0)][-1]
    assert event["authored_by"] == "user:leon" and not event.get("disclosed")
    assert local.call("message.edit", message_id=quiet["message_id"], content="edited", caller_agent_id="a")["version"] == 1
    assert "authored_by" not in str([json.loads(line) for _, line in local.ledger.journal.read(0)][-1])
    local.send("user:leon", "as myself", disclose=True)
    event = [json.loads(line) for _, line in local.ledger.journal.read(0)][-1]
    assert not event.get("disclosed") and not event.get("authored_by"), "only with acting_as"


def test_vector_27(crew):
    assert crew.refused("message.send", content="x", acting_as=crew.b, caller_agent_id=crew.a) == (
        f"only users can impersonate agents (caller: {crew.a})")


def test_impersonation_is_refused(local):
    local.call("user.register", username="max")
    for target, text in (("user:max", "users can only impersonate agents, not other users (target: user:max)"),
                         ("ghost", "target agent does not exist: ghost")):
        assert str(local.refused("message.send", caller_agent_id="user:leon", content="x", acting_as=target)) == text


# ---- 7.1, 8.1: sending and routing

def test_vector_12(crew):
    sent = crew.send(crew.a, mentions=["@" + crew.y])
    assert sent["audiences"] == [{"type": "group", "value": crew.y}] and sent["resolved_to"] == 1
    assert sent["warnings"] == [f"@{crew.y} resolved to a group, not an individual agent"]
    assert crew.recipients(sent) == [crew.b, crew.c]
    message = crew.get(sent["message_id"])
    assert {"type": "group", "value": crew.y} in message["scopes"] and {"type": "group", "value": crew.y} in message["refs"]


def test_vector_13(crew):
    sent = crew.send(crew.a, mentions=["@" + crew.b])
    assert sent["audiences"] == [{"type": "agent", "value": crew.b}] and "warnings" not in sent and sent["resolved_to"] == 1
    assert sent["recipients"] == [{"agent_id": crew.b, "delivered_at": sent["created_at"]}]
    assert crew.get(sent["message_id"])["refs"] == [{"type": "mention", "value": crew.b}]


def test_vector_14(crew):
    error = crew.refused("message.send", caller_agent_id=crew.a, content="x", mentions=["@" + crew.b, "@ghost", "@g2"])
    assert error == "unknown recipients: @ghost, @g2 — no matching agent, role, or group found"
    assert crew.inbox(crew.b) == []


def test_vector_15(crew):
    sent = crew.send(crew.a, "to all")
    assert sent["audiences"] == [{"type": "broadcast", "value": "everyone"}] and sent["resolved_to"] == 0 and "warnings" not in sent
    assert {crew.b, crew.c} <= set(crew.recipients(sent)) and crew.a not in crew.recipients(sent)
    assert crew.recipients(sent) == sorted(crew.recipients(sent))


def test_vector_16(crew):
    sent = crew.send(crew.a, mentions=["@everyone"])
    assert "warnings" not in sent and sent["audiences"] == [{"type": "group", "value": "everyone"}]
    assert {"type": "group", "value": "everyone"} in crew.get(sent["message_id"])["scopes"]
    assert {crew.b, crew.c} <= set(crew.recipients(sent))


def test_vector_17(crew):
    crew.send(crew.a, "for b", mentions=["@" + crew.b])
    assert crew.texts(for_agent=crew.c, for_agent_role=crew.y) == []
    assert crew.texts(for_agent=crew.b, for_agent_role=crew.y) == ["for b"]


def test_vector_19(crew):
    text = f"broadcast {crew.n}"
    crew.send(crew.a, text)
    assert text in crew.texts(for_agent="leon")


def test_vector_40(crew):
    pair = {"type": "module", "value": "m"}
    for mentions in (["@" + crew.b] * 2, ["@" + crew.b, crew.b]):
        sent = crew.send(crew.a, mentions=mentions, scopes=[pair, pair], refs=[pair, pair])
        message = crew.get(sent["message_id"])
        assert message["scopes"] == [pair] and sorted(r["type"] for r in message["refs"]) == ["mention", "module"]
        assert crew.recipients(sent) == [crew.b]
    assert crew.call("health")["bad_lines"] == 0


def test_send_checks_in_order(crew):
    """content, format, session, acting_as, mentions (all unknown ones at once), parent: the first that is wrong is told."""
    lone = f"nosession{crew.n}"
    crew.call("agent.register", name=lone, role="z", module="m", force=True)
    wrong = {"content": "", "format": "html", "caller_agent_id": lone, "acting_as": "ghost", "mentions": ["@g1", "@g2"], "reply_to": GHOST}
    for fix, text in (({}, "content is required"), ({"content": "x"}, "invalid format: html (must be"),
                      ({"format": "plain"}, "resolve agent and session: no active session found"),
                      ({"caller_agent_id": crew.a}, "only users can impersonate agents"),
                      ({"acting_as": ""}, "unknown recipients: @g1, @g2"),
                      ({"mentions": ["@" + crew.b]}, f"reply_to message not found: {GHOST}")):
        wrong.update(fix)
        assert crew.refused("message.send", **wrong).startswith(text)
    assert crew.inbox(crew.b) == []


def test_structured(crew):
    sent = crew.send(crew.a, "x", structured={"b": {"z": 1, "a": None}, "a": "ü"}, mentions=["@" + crew.b], format="json")
    assert crew.get(sent["message_id"])["body"] == {"format": "json", "content": "x", "structured": '{"a":"ü","b":{"a":null,"z":1}}'}
    assert crew.refused("message.send", content="", structured={"a": 1}, caller_agent_id=crew.a) == "content is required"


def test_labels(crew):
    """Scopes and references are labels: kept, searchable, routing nobody."""
    scope, ref = {"type": "module", "value": f"m{crew.n}"}, {"type": "commit", "value": "abc123"}
    sent = crew.send(crew.a, scopes=[scope, {"type": "agent", "value": "ghost"}, {"type": "user", "value": "ghost"}], refs=[ref],
                     mentions=["@" + crew.b], tags=["urgent"])
    message = crew.get(sent["message_id"])
    assert scope in message["scopes"] and {"type": "agent", "value": "ghost"} in message["scopes"]
    assert ref in message["refs"] and {"type": "tag", "value": "urgent"} in message["refs"], "decision 23"
    assert crew.recipients(sent) == [crew.b]
    assert crew.call("message.list", scope=scope)["total"] == 1


def test_names_are_exact(crew):
    for mention in ("@all", "@broadcast", "@" + crew.b.upper(), "@@" + crew.b, crew.b + " ", "@"):
        assert "unknown recipients" in crew.refused("message.send", caller_agent_id=crew.a, content="x", mentions=[mention]), mention


def test_an_author_is_no_recipient(crew):
    sent = crew.send(crew.b, mentions=["@" + crew.y, "@" + crew.b])
    assert crew.recipients(sent) == [crew.c] and sent["resolved_to"] == 2
    assert {"type": "mention", "value": crew.b} in crew.get(sent["message_id"])["refs"]


def test_forged_refs_are_resolved(crew):
    """rpc 17, 8: references and scopes of routing types are mentions, however they come."""
    for more in ({"refs": [{"type": "mention", "value": crew.b}]}, {"scopes": [{"type": "group", "value": crew.y}]},
                 {"refs": [{"type": "group", "value": crew.y}]},
                 {"scopes": [{"type": "group", "value": crew.y}], "mentions": ["@" + crew.y]}):
        sent = crew.send(crew.a, **more)
        assert crew.b in crew.recipients(sent) and crew.a not in crew.recipients(sent) and len(sent["audiences"]) == 1, more
    assert "@ghost" in crew.refused("message.send", caller_agent_id=crew.a, content="x", refs=[{"type": "mention", "value": "ghost"}])


def test_later_members_get_nothing(crew, group):
    """Decision 19: who is a member when it is sent receives it, whoever comes or goes later."""
    crew.call("group.member.add", group=group, member_value=crew.b)
    sent = crew.send(crew.a, "early", mentions=["@" + group])
    crew.call("group.member.add", group=group, member_value=crew.c)
    crew.call("group.member.remove", group=group, member_value=crew.b)
    assert crew.recipients(sent) == [crew.b]
    assert crew.inbox(crew.b) == ["early"] and crew.inbox(crew.c) == []
    crew.send(crew.a, "late", mentions=["@" + group])
    assert crew.inbox(crew.c) == ["late"]


# ---- 7.2 - 7.7: reading, changing

def test_get(crew):
    sent = crew.send(crew.a, "x", mentions=["@" + crew.b, "@" + crew.y])["message_id"]
    message = crew.get(sent)
    assert message["author"] == {"agent_id": crew.a, "session_id": crew.sessions[crew.a]}
    assert message["audiences"] == [{"type": "mention", "value": crew.b}, {"type": "group", "value": crew.y}]
    assert [r["agent_id"] for r in message["recipients"]] == [crew.b, crew.c] and not any("read_at" in r for r in message["recipients"])
    assert crew.get(crew.send(crew.a, "y")["message_id"])["audiences"] == [{"type": "broadcast", "value": "everyone"}]
    assert crew.inbox(crew.b, unread=True)[-1] == "x"


def test_list_filters(crew):
    a, b, c = crew.a, crew.b, crew.c
    one = {"type": "module", "value": f"one{crew.n}"}
    ids = {name: crew.send(who, name, mentions=["@" + to], **more)["message_id"] for name, who, to, more in (
        ("1", a, b, {"scopes": [one]}), ("2", a, b, {"refs": [one]}), ("3", c, b, {}), ("4", b, a, {}))}
    ids["5"] = crew.send(b, "5", reply_to=ids["1"], mentions=["@" + a])["message_id"]
    crew.call("message.markRead", caller_agent_id=b, message_ids=[ids["3"]])
    thread = crew.get(ids["5"])["thread_id"]
    stamp = crew.get(ids["3"])["created_at"]
    for filters, expected in (
            ({"scope": one}, "1"), ({"ref": one}, "2"), ({"thread_id": thread}, "51"), ({"author_id": a}, "21"),
            ({"mention_role": b}, "321"), ({"for_agent": b}, "321"), ({"unread_for_agent": b, "for_agent": b}, "21"),
            ({"unread": True, "for_agent": b, "caller_agent_id": b}, "21"),
            ({"exclude_self": True, "caller_agent_id": b, "thread_id": thread}, "1"),
            ({"for_agent": b, "created_after": stamp}, ""), ({"for_agent": a, "created_after": stamp}, "54"),
            ({"for_agent": b, "scope": one}, "1"), ({"for_agent": b, "author_id": c}, "3"), ({"for_agent": c, "scope": one}, "")):
        assert "".join(crew.texts(**filters)) == expected, filters
    page = crew.call("message.list", for_agent=b, caller_agent_id=b)
    assert (page["total"], page["unread"]) == (3, 2)
    assert [m["is_read"] for m in page["messages"]] == [True, False, False]


def test_list_without_a_session(crew):
    """Decision 16, rpc 17, 25: what is unread does not depend on a session."""
    crew.send(crew.a, "x", mentions=["@" + crew.b])
    crew.call("session.end", session_id=crew.sessions[crew.b])
    assert crew.inbox(crew.b, unread=True) == ["x"]
    assert crew.call("message.markRead", caller_agent_id=crew.b, message_ids=[m["message_id"] for m in crew.list(for_agent=crew.b)])[
        "marked_count"] == 1
    assert crew.inbox(crew.b, unread=True) == []


def test_pages(crew):
    for number in range(25):
        crew.send(crew.a, str(number), mentions=["@" + crew.b])
    seen = []
    for number in (1, 2, 3):
        page = crew.call("message.list", for_agent=crew.b, page=number)
        assert (page["page"], page["page_size"], page["total"], page["total_pages"]) == (number, 10, 25, 3)
        seen += [m["body"]["content"] for m in page["messages"]]
    assert seen == [str(n) for n in range(24, -1, -1)], "decision 16: newest first"
    for asked, given in ((1, 1), (100, 100), (101, 100), (0, 10), (-1, (1, 100))):
        size = crew.call("message.list", for_agent=crew.b, page_size=asked)["page_size"]
        assert size == given or isinstance(given, tuple) and given[0] <= size <= given[1], asked
    assert crew.call("message.list", for_agent=crew.b, page=9)["messages"] == []
    assert crew.texts(for_agent=crew.b, page=-3)[0] == "24"


def test_order(crew):
    ids = [crew.send(crew.a, str(n), mentions=["@" + crew.b])["message_id"] for n in range(3)]
    crew.call("message.edit", message_id=ids[0], content="0!", caller_agent_id=crew.a)
    assert crew.texts(for_agent=crew.b) == ["2", "1", "0!"] == crew.texts(for_agent=crew.b, sort_order="desc", sort_by="created_at")
    assert crew.texts(for_agent=crew.b, sort_order="asc") == ["0!", "1", "2"]
    assert crew.texts(for_agent=crew.b, sort_by="updated_at")[0] == "0!"


def test_times_are_compared_as_times(crew):
    """Any RFC 3339 spelling of the same moment asks the same."""
    first = crew.send(crew.a, "first", mentions=["@" + crew.b])["created_at"]
    crew.send(crew.a, "second", mentions=["@" + crew.b])
    for stamp in (first, first[:-1] + "+00:00", f"{first[:11]}{(int(first[11:13]) + 1) % 24:02}{first[13:-1]}+01:00"):
        if first[11:13] != "23" or "+01" not in stamp:
            assert crew.texts(for_agent=crew.b, created_after=stamp) == ["second"], stamp


def test_outbox(crew):
    a, b = crew.a, crew.b
    first = crew.send(a, "1", mentions=["@" + b])["message_id"]
    second = crew.send(a, "2", mentions=["@" + crew.y])["message_id"]
    page = crew.call("message.outbox", caller_agent_id=a)
    assert [m["message_id"] for m in page["messages"]] == [second, first] and page["total"] == 2
    assert page["messages"][1]["audiences"] == [{"type": "mention", "value": b}] and page["messages"][0]["is_read"] is False
    assert [r["agent_id"] for r in page["messages"][0]["recipients"]] == [b, crew.c]
    assert crew.call("message.outbox", caller_agent_id="ghost")["total"] == 0
    assert crew.call("message.outbox", caller_agent_id=a, page_size=0)["page_size"] == 10
    assert crew.call("message.outbox", caller_agent_id=a, page=0)["page"] == 1


def test_outbox_to(crew, group):
    a, b = crew.a, crew.b
    crew.call("group.member.add", group=group, member_value=b)
    for text, mentions in (("agent", ["@" + b]), ("role", ["@" + crew.y]), ("group", ["@" + group]), ("everyone", ["@everyone"]),
                           ("all", [])):
        crew.send(a, text, mentions=mentions)

    def to(whom):
        return sorted(m["body"]["content"] for m in crew.call("message.outbox", caller_agent_id=a, to=whom)["messages"])
    assert to("@everyone") == to("everyone") == ["all", "everyone"]
    assert to("@" + b) == to(f" @{b.upper()} ") == ["agent", "all", "everyone", "group", "role"], "whatever was delivered to b"
    assert to("@" + crew.y) == ["role"] and to("@" + group) == ["group"] and to("@ghost") == []


def test_vector_20(crew):
    sent = crew.send(crew.a, mentions=["@" + crew.b])["message_id"]
    assert crew.call("message.outbox", caller_agent_id=crew.a, to="@" + crew.b, unread=True)["total"] == 1
    crew.call("message.markRead", caller_agent_id=crew.b, message_ids=[sent])
    assert crew.call("message.outbox", caller_agent_id=crew.a, to="@" + crew.b, unread=True)["messages"] == []
    (row,) = crew.call("message.outbox", caller_agent_id=crew.a, to="@" + crew.b)["messages"]
    assert row["read_count"] == 1


def test_vector_22(crew):
    sent = crew.send(crew.a, mentions=["@" + crew.b])["message_id"]
    reply = crew.send(crew.b, reply_to=sent, mentions=["@" + crew.a])
    shaped(reply["thread_id"], "thr")
    rows = {m["message_id"]: m for m in crew.list(thread_id=reply["thread_id"])}
    assert set(rows) == {sent, reply["message_id"]} and {m["thread_id"] for m in rows.values()} == {reply["thread_id"]}
    assert {"type": "reply_to", "value": sent} in crew.get(reply["message_id"])["refs"] and rows[reply["message_id"]]["reply_to"] == sent


def test_reply(crew):
    """Section 9: a thread opens by the first reply and later ones join it; replying adds no recipient."""
    sent = crew.send(crew.a, mentions=["@" + crew.b])
    assert "thread_id" not in sent
    first = crew.send(crew.b, "1", reply_to=sent["message_id"], mentions=["@" + crew.a])
    second = crew.send(crew.a, "2", reply_to=first["message_id"], mentions=["@" + crew.b])
    assert first["thread_id"] == second["thread_id"] == "thr_" + sent["message_id"][4:], "decision 2"
    assert crew.call("message.list", thread_id=first["thread_id"])["total"] == 3
    everyone = crew.send(crew.b, "3", reply_to=sent["message_id"])
    assert everyone["audiences"][0]["type"] == "broadcast"
    twice = crew.send(crew.b, "4", reply_to=sent["message_id"], refs=[{"type": "reply_to", "value": first["message_id"]}],
                      mentions=["@" + crew.a])
    assert [m["message_id"] for m in crew.list(thread_id=first["thread_id"])].count(twice["message_id"]) == 1
    crew.call("message.delete", message_id=sent["message_id"], caller_agent_id=crew.a)
    assert crew.send(crew.b, "5", reply_to=sent["message_id"], mentions=["@" + crew.a])["thread_id"] == first["thread_id"]


def test_edit(crew):
    sent = crew.send(crew.a, "old", mentions=["@" + crew.b], format="plain", structured={"k": 1})["message_id"]
    edited = crew.call("message.edit", message_id=sent, content="new", caller_agent_id=crew.a)
    assert edited["version"] == 1 and crew.get(sent)["updated_at"] == edited["updated_at"]
    assert crew.get(sent)["body"] == {"format": "plain", "content": "new", "structured": '{"k":1}'}, "what is missing is kept"
    assert crew.call("message.edit", message_id=sent, structured={"k": 2}, caller_agent_id=crew.a)["version"] == 2
    assert crew.get(sent)["body"] == {"format": "plain", "content": "new", "structured": '{"k":2}'}
    assert crew.refused("message.edit", message_id=GHOST, content="x", caller_agent_id=crew.a) == f"message not found: {GHOST}"
    crew.call("message.delete", message_id=sent, caller_agent_id=crew.a)
    assert crew.refused("message.edit", message_id=sent, content="x", caller_agent_id=crew.a) == f"cannot edit deleted message: {sent}"


def test_vector_23(crew):
    sent = crew.send(crew.a, mentions=["@" + crew.b])["message_id"]
    assert crew.refused("message.edit", message_id=sent, content="x", caller_agent_id=crew.b) == (
        f"only message author can edit (author: {crew.a}, current: {crew.b})")
    assert crew.refused("message.delete", message_id=sent, caller_agent_id=crew.b), "decision 17"
    crew.call("message.delete", message_id=sent, caller_agent_id="user:leon")


def test_delete(crew):
    sent = crew.send(crew.a, "text", mentions=["@" + crew.b])["message_id"]
    gone = crew.call("message.delete", message_id=sent, reason="obsolete", caller_agent_id=crew.a)
    message = crew.get(sent)
    assert message["deleted"] is True and message["metadata"] == {"deleted_at": gone["deleted_at"], "delete_reason": "obsolete"}
    assert crew.inbox(crew.b) == [] and crew.call("message.list", for_agent=crew.b, caller_agent_id=crew.b)["unread"] == 0, "decision 16"


def test_vector_24(crew):
    sent = crew.send(crew.a, mentions=["@" + crew.b])["message_id"]
    crew.call("message.delete", message_id=sent)
    assert crew.refused("message.delete", message_id=sent) == f"message already deleted: {sent}"


def test_mark_read(crew):
    one = crew.send(crew.a, "1", mentions=["@" + crew.y])["message_id"]
    two = crew.send(crew.a, "2", mentions=["@" + crew.b])["message_id"]
    first = crew.call("message.markRead", caller_agent_id=crew.b, message_ids=[one, GHOST, two, one])
    assert first["marked_count"] == 2 and "also_read_by" not in first, "unknown and repeated ids do not count"
    (state,) = [r for r in crew.get(one)["recipients"] if r["agent_id"] == crew.b]
    assert state["read_at"] == state["seen_at"] > state["delivered_at"]
    before = crew.call("health")["last_seq"]
    again = crew.call("message.markRead", caller_agent_id=crew.b, message_ids=[one])
    assert again["marked_count"] == 1 and crew.call("health")["last_seq"] == before, "the first time stays, nothing is written"
    assert crew.call("message.markRead", caller_agent_id=crew.c, message_ids=[one])["also_read_by"] == {one: [crew.b]}
    assert [m["is_read"] for m in crew.list(for_agent=crew.b, caller_agent_id=crew.b)] == [True, True]
    assert crew.call("message.markRead", caller_agent_id=crew.c, message_ids=[two])["marked_count"] == 0, "only its recipients read"
    assert [r["agent_id"] for r in crew.get(two)["recipients"]] == [crew.b]


# ---- 7.8: removal of many

def test_delete_by_scope(crew):
    scope = {"type": "module", "value": f"gone{crew.n}"}
    for text in ("1", "2"):
        crew.send(crew.a, text, mentions=["@" + crew.b], scopes=[scope])
    crew.send(crew.a, "stays", mentions=["@" + crew.b])
    assert crew.call("message.deleteByScope", scope_type="module", scope_value=scope["value"])["deleted_count"] == 2
    assert crew.inbox(crew.b) == ["stays"] and crew.call("message.list", scope=scope)["total"] == 0
    assert crew.call("message.deleteByScope", scope_type="module", scope_value=scope["value"])["deleted_count"] == 0


def test_delete_by_agent(crew):
    ids = [crew.send(crew.a, text, mentions=["@" + crew.b])["message_id"] for text in "12"]
    crew.send(crew.c, "stays", mentions=["@" + crew.b])
    assert crew.call("message.deleteByAgent", agent_id=crew.a)["deleted_count"] == 2
    assert crew.inbox(crew.b) == ["stays"]
    assert crew.refused("message.get", message_id=ids[0]) == f"message not found: {ids[0]}"
    assert crew.call("message.deleteByAgent", agent_id="ghost")["deleted_count"] == 0


@pytest.mark.parametrize("kind", ["agent", "group"])
def test_archive(crew, group, kind):
    """The records go to a file and out of the store; a second archive loses nothing of the first (rpc 17, 16)."""
    crew.call("group.member.add", group=group, member_value=crew.b)
    identifier = crew.a if kind == "agent" else group
    texts = ["first", "second", "third"]
    for count, text in ((2, texts[:2]), (1, texts[2:])):
        for one in text:
            crew.send(crew.a, one, mentions=["@" + group], structured={"k": 1})
        done = crew.call("message.archive", archive_type=kind, identifier=identifier)
        assert done["archived_count"] == count
        assert crew.inbox(crew.b) == []
    path = Path(done["archive_path"])
    assert path.is_absolute() and path.stat().st_mode & 0o777 == 0o600 and path.parent == crew.repo.path.resolve() / ".thrum" / "archive"
    kept = []
    for file in sorted(path.parent.glob(f"{identifier}*")):
        kept += [json.loads(line) for line in file.read_text().splitlines()]
    assert sorted(line["body"]["content"] for line in kept) == sorted(texts)
    for line in kept:
        shaped(line, {"message_id": "msg", "agent_id": "name", "created_at": "stamp", "body": "Body", "scopes": ["Pair"], "refs": ["Pair"]})
        assert line["body"]["structured"] == '{"k":1}', "a full record"
    assert crew.call("message.archive", archive_type=kind, identifier=identifier)["archived_count"] == 0


# ---- 13: events

def test_events_and_their_files(make_repo):
    """After a walk through the methods: which event each left, in which file of the branch, with which members."""
    repo = make_repo()
    repo.ok("init")
    with repo.client() as client:
        for name, role in (("a", "x"), ("b", "y"), ("c", "z")):
            client.call("agent.register", name=name, role=role, module="m", display=name.upper())
        sessions = {name: client.call("session.start", agent_id=name)["session_id"] for name in "abc"}
        sent = client.call("message.send", content="1", mentions=["@b"], scopes=[{"type": "s", "value": "v"}],
                           caller_agent_id="a")["message_id"]
        reply = client.call("message.send", content="2", reply_to=sent, mentions=["@a"], caller_agent_id="b")["message_id"]
        client.call("message.markRead", message_ids=[sent], caller_agent_id="b")
        client.call("message.edit", message_id=sent, content="1!", caller_agent_id="a")
        client.call("message.delete", message_id=reply, reason="why", caller_agent_id="b")
        client.call("group.create", name="g", description="d", caller_agent_id="a")
        client.call("group.member.add", group="g", member_value="b", caller_agent_id="a")
        client.call("group.member.remove", group="g", member_value="b", caller_agent_id="a")
        client.call("group.delete", name="g", caller_agent_id="a")
        client.call("session.end", session_id=sessions["b"], reason="done")
        client.call("agent.delete", name="c")
        client.call("purge.execute", before="2001-01-01T00:00:00Z")
    repo.ok("daemon", "stop")
    top = repo.path / ".git" / "thrum-sync" / "a-sync"
    files = {str(path.relative_to(top)): [json.loads(line) for line in path.read_text().splitlines()] for path in top.rglob("*.jsonl")}
    common = {"type": "text", "timestamp": "stamp", "event_id": "evt", "v": "count", "origin_daemon": "text", "sequence": "count"}
    found = {}
    for name, events in files.items():
        for event in events:
            shaped(event, common, f"{name} {event.get('type')}")
            found.setdefault(event["type"], []).append((name, event))
    members = {
        "message.create": {"message_id": "msg", "thread_id?": "thr", "agent_id": "name", "session_id": "ses", "body": "Body",
                           "scopes?": ["Pair"], "refs?": ["Pair"], "recipients?": ["name"]},
        "message.edit": {"message_id": "msg", "body": "Body"}, "message.delete": {"message_id": "msg", "reason": "'why'"},
        "message.receipt": {"message_id": "msg", "agent_id": "'b'", "session_id?": "ses", "receipt_type": "'read'|'seen'"},
        "agent.register": {"agent_id": "name", "kind": "'agent'", "role": "text", "module": "'m'", "display?": "text", "hostname?": "text"},
        "agent.session.start": {"session_id": "ses", "agent_id": "name"}, "agent.session.end": {"session_id": "ses", "reason": "text"},
        "agent.cleanup": {"agent_id": "'c'", "method": "'manual'", "reason": "text"},
        "group.create": {"group_id": "grp", "name": "text", "created_by": "text"}, "group.delete": {"group_id": "grp", "deleted_by": "'a'"},
        "group.member.add": {"group_id": "grp", "member_type": "text", "member_value": "text", "added_by": "text"},
        "group.member.remove": {"group_id": "grp", "member_type": "'agent'", "member_value": "'b'", "removed_by": "'a'"},
        "purge.executed": {"cutoff": "text"},
    }
    assert set(members) <= set(found), f"missing: {set(members) - set(found)}"
    author = {sent: "a", reply: "b"}
    for kind, wanted in members.items():
        for name, event in found[kind]:
            shaped(event, wanted, kind)
            assert name == (f"messages/{author[event['message_id']]}.jsonl" if kind.startswith("message.") else "events.jsonl"), kind
    assert "messages/c.jsonl" not in files


def test_an_unknown_event_is_carried_and_ignored(local):
    """Section 13: a newer peer's event stops nothing."""
    before = local.call("message.list")["total"]
    local.ledger.store.apply({"type": "weather.report", "timestamp": "2026-03-10T09:00:00.000000001Z", "event_id": "evt_0" + "0" * 25,
                              "v": 1, "origin_daemon": "d_elsewhere000", "sequence": 10_000, "text": "rain"}, 10_000, local.world.at)
    assert local.call("message.list")["total"] == before


# ---- 14.4, 14.5

@pytest.mark.parametrize("word", ["yesterday", "2026-03-10", "2026-13-01T00:00:00Z"])
def test_vector_32(crew, word):
    with pytest.raises(thrum.ThrumError) as caught:
        crew.call("purge.execute", before=word)
    assert str(caught.value) == f'invalid before timestamp "{word}": must be RFC 3339'


def test_purge(make_repo):
    """A dry run counts what the real one takes; agents and groups stay; what comes later is kept; nothing comes back."""
    repo = make_repo()
    repo.ok("init")
    with repo.client() as client:
        for name, role in (("a", "x"), ("b", "y")):
            client.call("agent.register", name=name, role=role, module="m")
            client.call("session.start", agent_id=name)
        client.call("group.create", name="g")
        secret = "the secret that must leave the disk"
        old = [client.call("message.send", content=f"{secret} {n}", mentions=["@b"], caller_agent_id="a")["created_at"] for n in range(3)]
        new = client.call("message.send", content="stays", mentions=["@b"], caller_agent_id="a")["created_at"]
        dry = client.call("purge.execute", before=new, dry_run=True)
        assert (dry["dry_run"], dry["before"], dry["messages_deleted"]) == (True, new, 3) and old[-1] < new
        assert client.call("message.list", for_agent="b")["total"] == 4
        done = client.call("purge.execute", before=new)
        assert (done["dry_run"], done["messages_deleted"], done["sessions_deleted"]) == (False, 3, dry["sessions_deleted"])
        assert [m["body"]["content"] for m in client.call("message.list", for_agent="b")["messages"]] == ["stays"]
        assert {row["agent_id"] for row in client.call("agent.list")["agents"]} == {"a", "b"}
        assert "g" in [g["name"] for g in client.call("group.list")["groups"]]
    repo.ok("daemon", "stop")
    holding = [path for folder in (repo.var, repo.path / ".git" / "thrum-sync") for path in folder.rglob("*")
               if path.is_file() and secret.encode() in path.read_bytes()]
    assert not holding, "decision 18: its bytes are freed"
    assert [path.unlink() for path in repo.var.glob("messages.db*")], "the database has another name"
    repo.ok("daemon", "start")
    with repo.client() as client:
        assert [m["body"]["content"] for m in client.call("message.list", for_agent="b")["messages"]] == ["stays"]
        assert client.call("purge.execute", before=new)["messages_deleted"] == 0


def test_vector_33(crew):
    crew.call("context.save", agent_name=crew.a, content=base64.b64encode(b"hi").decode())
    shown = crew.call("context.show", agent_name=crew.a)
    assert (shown["content"], shown["has_context"], shown["size"]) == ("aGk=", True, 2)


def test_context(crew):
    text = "# Notes\n\nümläut\n".encode()
    saved = crew.call("context.save", agent_name=crew.a, content=base64.b64encode(text).decode())
    assert saved["message"] == f"Context saved for {crew.a} ({len(text)} bytes)"
    assert (crew.repo.path / ".thrum" / "context" / f"{crew.a}.md").read_bytes() == text
    shown = crew.call("context.show", agent_name=crew.a)
    assert base64.b64decode(shown["content"]) == text and shown["has_preamble"] is True, "a default preamble was made"
    assert crew.call("context.show", agent_name=crew.a, text=True)["content"] == text.decode(), "decision 23"
    assert "preamble" not in crew.call("context.show", agent_name=crew.a, include_preamble=False)
    preamble = base64.b64encode(b"be kind").decode()
    assert crew.call("context.preamble.save", agent_name=crew.a, content=preamble)["message"] == f"Preamble saved for {crew.a} (7 bytes)"
    assert crew.call("context.preamble.show", agent_name=crew.a)["content"] == preamble
    for _ in range(2):
        cleared = crew.call("context.clear", agent_name=crew.a)
        assert cleared["message"] == f"Context cleared for {crew.a}" and "cleared" in cleared
    shown = crew.call("context.show", agent_name=crew.a)
    assert shown["has_context"] is False and shown["content"] in (None, "") and shown["has_preamble"] is True
    for repo_path in ("/", "/etc", "../..", str(crew.repo.path.parent)):
        with pytest.raises(thrum.ThrumError):
            crew.call("context.save", agent_name=crew.a, content="aGk=", repo_path=repo_path)


# ---- decision 18: what was removed stays away

def answers(client, *, stable):
    """What all reading methods say of everything, without the numbers that a journal made anew may change."""
    def kept(value):
        if isinstance(value, dict):
            return {k: kept(v) for k, v in value.items() if k not in ("last_seq", "epoch", "last_seen_at") and (stable or k != "seq")}
        return [kept(item) for item in value] if isinstance(value, list) else value
    found = {"agents": client.call("agent.list"), "sessions": client.call("session.list"), "groups": client.call("group.list"),
             "all": client.call("message.list", page_size=100)}
    for group in found["groups"]["groups"]:
        found["group " + group["name"]] = client.call("group.info", name=group["name"])
        found["members " + group["name"]] = client.call("group.members", name=group["name"], expand=True)
    for agent in found["agents"]["agents"]:
        name = agent["agent_id"]
        found["inbox " + name] = client.call("message.list", for_agent=name, caller_agent_id=name, page_size=100)
        found["outbox " + name] = client.call("message.outbox", caller_agent_id=name, page_size=100)
        found["whoami " + name] = client.call("agent.whoami", caller_agent_id=name)
    for message in found["all"]["messages"]:
        found[message["message_id"]] = client.call("message.get", message_id=message["message_id"])
    return kept(found)


@pytest.mark.parametrize("lost", ["database", "var"])
def test_what_was_done_outlives_the_database(make_repo, lost):
    """After a walk through all methods, removals included: a rebuild from the journal, or from the branch files, answers the same."""
    repo = make_repo()
    repo.ok("init")
    with repo.client() as client:
        crew = Crew(client, repo)
        for method, params in example(crew):
            if not method.startswith("context."):
                client.call(method, **params)
        crew.join(crew.c, crew.y)
        group = f"kept{crew.n}"
        client.call("group.create", name=group, caller_agent_id=crew.a)
        client.call("group.member.add", group=group, member_value=crew.c, caller_agent_id=crew.a)
        crew.send(crew.a, "to the group", mentions=["@" + group])
        crew.send(crew.b, "gone by scope", mentions=["@" + crew.a], scopes=[{"type": "topic", "value": "gone"}])
        stays = crew.send(crew.b, "stays", mentions=["@" + crew.a, "@" + crew.c])["message_id"]
        client.call("message.markRead", message_ids=[stays], caller_agent_id=crew.c)
        client.call("message.deleteByScope", scope_type="topic", scope_value="gone")
        client.call("session.end", session_id=crew.sessions[crew.c], reason="tired")
        before = answers(client, stable=lost == "database")
    repo.ok("daemon", "stop")
    if lost == "database":
        assert [path.unlink() for path in repo.var.glob("messages.db*")], "the database has another name"
    else:
        shutil.rmtree(repo.var)
    repo.ok("daemon", "start")
    with repo.client() as client:
        after = answers(client, stable=lost == "database")
    assert set(before) == set(after)
    different = {key: (before[key], after[key]) for key in before if before[key] != after[key]}
    assert not different


# ---- 18: the rest

def test_vector_37(crew):
    """A call that waits delays nobody on other connections."""
    with Raw(crew.repo) as waiting:
        waiting.call("message.wait", caller_agent_id=crew.b, timeout_ms=20_000)
        for _ in range(10):
            with crew.repo.client() as other:
                assert other.call("health")["status"] == "ok"


def test_vector_38(crew):
    ids, problems = [], []

    def work(worker):
        try:
            with crew.repo.client() as client:
                for number in range(100):
                    ids.append(client.call("message.send", content=f"{worker} {number}", mentions=["@" + crew.b],
                                           caller_agent_id=crew.a)["message_id"])
        except Exception as error:
            problems.append(error)
    threads = [threading.Thread(target=work, args=(n,)) for n in range(10)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(LONG)
    assert not problems and len(set(ids)) == 1000
    assert crew.call("message.list", for_agent=crew.b)["total"] == 1000


def test_the_table_of_shapes_knows_each_method():
    """A method of the contract that has no shape, or a shape of none, is a slip."""
    assert all(shape("rpc " + name) for name in SHAPES["rpc"])
    assert set(SHAPES["rpc"]) <= set(thrum.METHODS), sorted(set(SHAPES["rpc"]) - set(thrum.METHODS))
    assert THRUM.exists()
