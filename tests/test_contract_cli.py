"""The contract of the command line: each row of spec/cli.md that this stage keeps, and the assertions of its section 20.

`ROWS` names the test that proves each row, or the decision of the design that overrules it.  Two agents in two
worktrees of one repository, through the launcher, as users call it; what needs a fresh repository makes one.
"""

import contextlib
import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

import thrum
from conftest import CLEAN, QUICK
from rows import unproved
from shapes import SHAPES, shaped
from team import END_S, Team, error_line, finish, one_document, raw_in, script, shown, start
from test_daemon import gone

pytestmark = pytest.mark.slow
GHOST = "msg_00000000000000000000000000"
COMMAND = "test_commands."

ROWS = {
    # 1.1 command tree, 1.2 global flags, 1.3 parsing
    "1.1 tree": "test_the_tree", "1.1 groups print help": "test_groups_alone_print_their_help",
    "1.1 same behaviour": "test_pairs_are_the_same",
    "1.2 flags": COMMAND + "test_global_flags_before_and_after", "1.2 help": "test_help_fits_a_screen",
    "1.2 version": COMMAND + "test_version", "1.2 verbose": "test_verbose_is_accepted_everywhere",
    "1.3 order": COMMAND + "test_global_flags_before_and_after", "1.3 dashes": "test_flags_take_what_follows",
    "1.3 no abbreviation": COMMAND + "test_parse_errors_are_those_of_the_contract",
    "1.3 last wins, lists": COMMAND + "test_the_last_flag_wins_and_lists_collect",
    "1.3 positionals": "test_flags_take_what_follows", "1.3 empty": "test_flags_take_what_follows",
    "1.3 extra words": "test_flags_take_what_follows",
    "1.3 unknown subcommand": COMMAND + "test_parse_errors_are_those_of_the_contract",
    "1.3 mistakes": COMMAND + "test_parse_errors_are_those_of_the_contract, test_refusals",
    # 1.4 - 1.6
    "1.4 #1": COMMAND + "test_global_flags_before_and_after", "1.4 #2": COMMAND + "test_from_a_subdirectory_and_from_elsewhere",
    "1.4 #3": "test_init_under_thrum_home", "1.4 #4": COMMAND + "test_environment_says_who",
    "1.4 redirect": "test_init.test_a_redirect_by_hand", "1.4 local to the checkout": "test_files_are_local_to_the_checkout",
    "1.5 environment": COMMAND + "test_environment_says_who", "1.5 COLUMNS": "test_width",
    "1.6 caller": COMMAND + "test_environment_says_who", "1.6 several": "test_newest_identity_of_the_worktree",
    "1.6 failures": "test_who_am_i_fails_clearly", "1.6 identity file": COMMAND + "test_quickstart",
    "1.6 names": "test_refusals", "1.6 socket": "test_client.test_where_it_may_not_be_started",
    "1.6 wrapping": "decision 15", "1.6 order of checks": "test_flags_are_checked_first",
    # 1.7 - 1.10
    "1.7 exit codes": "decision 1", "1.7 streams": "test_refusals", "1.7 conflict": COMMAND + "test_registration_conflicts",
    "1.7 background": "test_daemon.test_the_background_process_holds_nothing_of_its_parent",
    "1.8 JSON": "test_json_has_its_shape", "1.9 json": "test_json_has_its_shape, test_text_commands_ignore_json",
    "1.9 quiet": COMMAND + "test_quiet_says_nothing, test_quiet_of_the_new_commands", "1.9 json beats quiet": "test_json_has_its_shape",
    "1.10 times": "test_screen.test_ago, test_screen.test_span", "1.10 marks": "test_what_people_see", "1.10 width": "test_width",
    "1.10 raw text": "test_nothing_raw_reaches_a_terminal",
    "2 shapes": "test_json_has_its_shape",
    # 3
    "3.1 flags": "test_init_dry_run, test_init_stealth, test_init_force, test_init_with_an_identity", "3.1 runtime": "test_init_refuses",
    "3.1 #1": "issue: agents", "3.1 #2": "test_init.test_init_in_a_linked_worktree", "3.1 #3": "test_init.test_init",
    "3.1 #3 failure": "test_init.test_init_outside_of_git, test_init_outside_of_git_with_flags", "3.1 #4-6": "issue: agents",
    "3.1 #7": "decision 9", "3.1 #9": "decision 9", "3.1 tokens": "test_a_fresh_init",
    "3.3 setup": "test_init.test_init_in_a_linked_worktree, test_setup_of_all_worktrees",
    "3.3 errors": "test_init.test_init_in_a_linked_worktree",
    "3.5 migrate": "test_migrate", "3.5 config show": "test_config_show", "3.5 config sources": "test_config_sources",
    # 4
    "4 quickstart": COMMAND + "test_quickstart", "4 input rules": "test_refusals, test_commands.test_quickstart",
    "4 dry-run": "test_quickstart_dry_run", "4 preamble": "test_quickstart_writes_context_and_preamble",
    "4 tokens": "test_what_people_see", "4 replaces": "decision 6",
    # 5
    "5.1 prime": "test_prime", "5.1 without daemon": "test_prime_without_a_daemon", "5.2 overview": "test_overview",
    "5.2 identity": "decision 27", "5.2 human": "test_work_in_words", "5.3 status": "test_what_people_see, test_work_in_words",
    "5.4 team": "test_team_in_words, test_json_has_its_shape", "5.4 nobody": "test_team_in_words",
    "5.5 whoami": "test_what_people_see, test_commands.test_whoami_without_a_daemon", "5.5 errors": "test_who_am_i_fails_clearly",
    "5.6 version": "test_version_links", "5.6 completion": "test_completion", "5.6 help": "test_help_fits_a_screen",
    # 6
    "6.1 flags": COMMAND + "test_to_a_role_a_group_and_everyone, test_labels_of_a_send", "6.1 errors": "test_refusals",
    "6.1 streams": COMMAND + "test_to_a_role_a_group_and_everyone", "6.2 reply": "test_reply_repeats_the_audience",
    "6.2 errors": "test_refusals", "6.3 flags": COMMAND + "test_pages_filters_and_order",
    "6.3 marks": COMMAND + "test_reading_marks_exactly_what_was_shown",
    "6.3 order": "decision 16", "6.3 human": "test_what_people_see, test_an_empty_inbox", "6.3 errors": "test_refusals",
    "6.4 sent": COMMAND + "test_sent_filters", "6.4 show": "test_refusals", "6.5 get": "test_what_people_see",
    "6.5 edit": COMMAND + "test_edit_and_delete", "6.5 delete": COMMAND + "test_edit_and_delete", "6.5 read": "test_read_all",
    "6.5 errors": "test_refusals", "6.6 wait": "decision 1", "6.6 after": COMMAND + "test_wait_wakes_for_what_it_is_asked_for",
    "6.6 reconnect": "test_client.test_wait_survives_a_restart", "6.6 outcomes": COMMAND + "test_wait_has_three_ends",
    "6.7 flags": "test_refusals", "6.7 preview": "test_purge", "6.7 specifications": "test_purge_specifications",
    # 7
    "7.1 register": COMMAND + "test_agents_and_sessions", "7.1 conflict": COMMAND + "test_registration_conflicts",
    "7.1 files": "test_register_writes_identity_and_preamble", "7.2 list": COMMAND + "test_agents_and_sessions",
    "7.2 context": "test_agent_context, test_work_in_words", "7.3 delete": "test_agent_delete", "7.3 cleanup": "test_agent_cleanup",
    "7.3 errors": "test_refusals",
    # 8, 9
    "8 start": COMMAND + "test_agents_and_sessions", "8 end": COMMAND + "test_agents_and_sessions", "8 list": "test_what_people_see",
    "8 heartbeat": "test_what_people_see, test_work_in_words", "8 set-intent": COMMAND + "test_agents_and_sessions",
    "8 set-task": COMMAND + "test_agents_and_sessions",
    "8 errors": "test_refusals", "8 intent in the identity file": "test_intent_goes_into_the_identity_file",
    "9 create": "test_what_people_see", "9 delete": "test_groups_to_the_end", "9 add": "test_what_people_see",
    "9 remove": "test_groups_to_the_end", "9 list": "test_what_people_see", "9 info": "test_groups_to_the_end",
    "9 members": "test_groups_to_the_end", "9 errors": "test_refusals", "9 no identity": "test_groups_without_identity",
    # 10
    "10 who-has": "test_coordination, test_work.test_paths_are_those_of_the_caller, test_json_has_its_shape", "10 ping": "test_ping",
    # 12.1
    "12.1 save": "test_context", "12.1 show": "test_context", "12.1 clear": "test_context", "12.1 preamble": "test_context_preamble",
    "12.1 agent": "test_context_of_another", "12.1 sync": "issue: sync", "12.1 update": "issue: agents",
    "12.1 prime": "test_pairs_are_the_same",
    "12.1 errors": "test_refusals",
    # 20
    "20 #2": "test_nothing_of_thrum_is_in_the_environment", "20 #3": "test_a_fresh_init", "20 #5": "test_init.test_a_redirect_by_hand",
    "20 #6": "test_newest_identity_of_the_worktree", "20 #7": "test_a_fresh_init", "20 #8": "test_a_fresh_init",
    "20 #9": "test_both_checkouts", "20 #10": "test_both_checkouts", "20 #11": "test_both_checkouts",
    "20 #13": "test_a_fresh_init, test_init.test_init", "20 #14": "test_init_force, test_init.test_init",
    "20 #15": "test_init.test_init_outside_of_git", "20 #16": "test_the_daemon_goes_and_comes", "20 #17": "test_the_daemon_goes_and_comes",
    "20 #18": "test_the_daemon_goes_and_comes", "20 #19": "test_the_daemon_goes_and_comes", "20 #20": "test_the_daemon_goes_and_comes",
    "20 #22": "test_registering_a_role_twice", "20 #23": "test_registering_a_role_twice", "20 #24": "test_quickstart_in_words",
    "20 #25": "test_registering_a_role_twice", "20 #27": "test_sessions_in_words", "20 #28": "test_sessions_in_words",
    "20 #29": "test_sessions_in_words", "20 #30": "test_sessions_in_words", "20 #31": "test_quickstart_without_a_name",
    "20 #32": "test_sessions_in_words", "20 #33": "test_each_way_to_send_arrives", "20 #34": "test_labels_of_a_send",
    "20 #35": "test_a_send_to_nobody", "20 #36": "test_editing_and_deleting_in_words", "20 #37": "test_editing_and_deleting_in_words",
    "20 #38": "test_reply_repeats_the_audience", "20 #39": "test_each_way_to_send_arrives", "20 #40": "test_read_all",
    "20 #41": "test_a_send_to_nobody", "20 #42": "test_each_way_to_send_arrives", "20 #45": "test_groups_in_words",
    "20 #46": "test_groups_in_words", "20 #47": "test_groups_in_words", "20 #48": "test_groups_in_words", "20 #49": "decision 3",
    "20 #51": "test_ping", "20 #54": "test_sessions_in_words", "20 #55": "test_sessions_in_words", "20 #57": "test_status_in_words",
    "20 #58": "test_overview", "20 #59": "test_status_in_words", "20 #60": "test_status_in_words",
    "20 #62": "test_wait_in_words", "20 #64": "test_agent_delete", "20 #65": "test_agent_delete", "20 #66": "test_agent_delete",
    "20 #67": "test_agent_cleanup", "20 #77": "test_prime", "20 #78": "test_refusals",
    "20 #79": "test_init.test_init_in_a_linked_worktree", "20 #80": "test_a_fresh_init", "20 #81": "test_wait_in_words",
    "20 #82": "test_ping", "20 #84": "decision 1", "20 #85": "test_a_send_to_nobody", "20 #86": "test_each_way_to_send_arrives",
    "20 #87": "test_wait_in_words", "20 #88": "test_each_way_to_send_arrives", "20 #89": "test_a_name_is_no_role",
    **{f"20 #{n}": "test_coordination" for n in (12, 43, 50, 52, 53, 56, 93)},
    "20 #4": "test_port.test_the_port_stays_the_same_and_gives_way",
    "20 #21": "test_port.test_origin, test_pages.test_a_file_is_served_with_its_type_policy_and_tag",
    "11 subscribe": "test_watch.test_subscriptions", "11 unsubscribe": "test_watch.test_subscriptions",
    "11 subscriptions": "test_watch.test_subscriptions", "20 #61": "test_watch.test_subscriptions",
    "20 #63": "test_watch.test_subscriptions",
    "11 errors": "test_watch.test_what_a_subscription_cannot_be, test_watch.test_subscribing_needs_an_identity_and_a_session",
    "11 RPC failed": "decision 15",
    **{f"20 #{n}": "issue: sync" for n in (75, 76)}, **{f"20 #{n}": "issue: agents" for n in (68, 69, 70, 71, 83)},
    **{f"20 #{n}": "issue: page" for n in (26, 44, 90)}, **{f"20 #{n}": "issue: operate" for n in (72, 73, 74)},
}


def test_each_row_has_its_proof():
    assert not unproved(ROWS, "test_contract_cli")
    sections = {row.split()[0] for row in ROWS}
    assert sections >= set("1.1 1.2 1.3 1.4 1.5 1.6 1.7 1.8 1.9 1.10 2 3.1 3.3 3.5 4 5.1 5.2 5.3 5.4 5.5 5.6 6.1 6.2 6.3 6.4 6.5 6.6 6.7 "
                           "7.1 7.2 7.3 8 9 10 11 12.1 20".split())
    assert {f"20 #{n}" for n in range(2, 91)} <= set(ROWS)


# ---- two agents

@pytest.fixture(scope="module")
def team(tmp_path_factory):
    made = Team(tmp_path_factory.mktemp("contract"))
    made.ada.ok("group", "create", "staff")
    yield made
    made.close()


@pytest.fixture(autouse=True)
def tidy(team):
    """Who was registered from a worktree of the two is not who speaks there afterwards."""
    yield
    for repo, name in ((team.ada, "ada"), (team.bob, "bob")):
        for path in (repo.path / ".thrum" / "identities").glob("*.json"):
            if path.stem != name:
                path.unlink()


@pytest.fixture
def fresh(team):
    """The team with nothing unread."""
    team.clear()
    return team


def fill(team, words):
    """A command line whose places are filled with things made for it."""
    make = {"{theirs}": lambda: team.mail("to ada", team.bob, "@ada"), "{own}": lambda: team.mail("to bob"),
            "{new}": lambda: f"g{team.seq()}", "{agent}": lambda: registered(team), "{file}": lambda: note(team),
            "{line}": lambda: line(team)}
    return [re.sub(r"\{\w+\}", lambda found: make[found[0]](), word) for word in words.split("|" if "|" in words else None)]


def registered(team):
    name = f"temp{team.seq()}"
    with team.ada.client() as client:
        client.call("agent.register", name=name, role="temporary", module="m", force=True)
    return name


def note(team):
    path = team.folder / "note.md"
    path.write_text("# Note\n")
    return str(path)


def line(team):
    """A line of a file that is committed."""
    path = team.ada.path / "why.txt"
    if not path.exists():
        path.write_text("because\n")
        team.ada.git("add", path.name)
        team.ada.git("commit", "-q", "-m", "a line", "--", path.name)
    return path.name + ":1"


def listed(repo):
    return [agent["agent_id"] for agent in repo.json("agent", "list")["agents"]["agents"]]


def on_terminal(repo, answer, *args):
    """(status, what the screen shows) of a command on a terminal where somebody has typed an answer."""
    ours, theirs = os.openpty()
    process = start(repo, *args, stdin=theirs, stdout=theirs, stderr=theirs)
    os.close(theirs)
    os.write(ours, answer.encode())
    shown = b""
    with contextlib.suppress(OSError):      # EIO: nobody holds the other end any more
        while data := os.read(ours, 65536):
            shown += data
    os.close(ours)
    return finish(process)[0], shown.decode()


# ---- 1.1 - 1.3

TREE = [word.replace("_", " ") for word in """init setup migrate quickstart prime overview status whoami team version send reply inbox wait
purge sent who-has ping completion help search trace sent_show config_show config_get config_set config_unset message_get message_edit
message_delete message_read agent_register agent_list agent_context agent_whoami agent_delete agent_cleanup agent_start agent_end
agent_set-intent agent_set-task agent_heartbeat session_start session_end session_list session_heartbeat session_set-intent
session_set-task group_create group_delete group_add group_remove group_list group_info group_members context_save context_show
context_load context_clear context_preamble context_prime daemon_start daemon_stop daemon_status daemon_restart""".split()]
GROUPS = ("config", "message", "agent", "session", "group", "context", "daemon", "completion")


def test_the_tree(capfd):
    """Every command of the contract answers to its name, and the first help names all at the top."""
    missing = [name for name in TREE if thrum.main(["help", *name.split()])]
    assert not missing
    capfd.readouterr()
    text = shown(capfd, "help")
    assert not [name for name in TREE if not re.search(rf"\b{name.split()[0]}\b", text)]


def test_groups_alone_print_their_help(team):
    for name in GROUPS:
        done = team.ada.run(name, check=0)
        assert done.stdout and not done.stderr and done.stdout == team.ada.ok("help", name) == team.ada.ok(name, "--help"), name


def test_help_fits_a_screen(team, capfd):
    """At most 80 columns, 24 lines for a command (the list of all may be longer), an example each, stdout, status 0."""
    for name in ("", *TREE):
        text = shown(capfd, *name.split(), "--help")        # what the launcher calls, without 140 starts of Python
        lines = text.splitlines()
        assert max(map(len, lines)) <= 80 and len(lines) <= (24 if name else 48), f"{name}: {len(lines)} lines"
        assert "Usage: thrum" in text and "Example: thrum" in text, name
        assert text == shown(capfd, "help", *name.split()), name
    for name in ("", "send", "agent list"):
        assert team.ada.ok(*name.split(), "--help") == team.ada.ok("help", *name.split()) == shown(capfd, "help", *name.split())


def test_verbose_is_accepted_everywhere(team):
    for words in ("inbox --verbose", "--verbose status", "version --verbose", "daemon status --verbose"):
        team.ada.ok(*words.split())


PAIRS = [("agent list", "agent list"), ("whoami", "agent whoami"), ("prime", "context prime"), ("context show", "context load"),
         ("inbox --all --limit 3", "inbox --all --page-size 3"), ("inbox -a --limit 3", "inbox --all --limit 3"),
         ("sent --limit 2", "sent --page-size 2")]


@pytest.mark.parametrize(("one", "other"), PAIRS)
def test_pairs_are_the_same(fresh, one, other):
    def numberless(text):
        return re.sub(r"\d+(ms|[smhd])?", "N", text)
    fresh.mail("something to list")
    assert numberless(fresh.ada.ok(*one.split())) == numberless(fresh.ada.ok(*other.split()))


def test_flags_take_what_follows(fresh):
    """A value may begin with a dash, a positional after `--` too, and may be empty."""
    assert fresh.ada.run("wait", "--after", "-30s", "--timeout", "0s", "--from", "nobody").returncode == 1
    sent = json.loads(fresh.ada.ok("send", "--json", "--to", "@bob", "--", "-x --to @ghost"))
    assert fresh.unread() == ["-x --to @ghost"] and sent["resolved_to"] == 1
    assert fresh.ada.ok("session", "set-intent", "") == "✓ Intent cleared\n"
    for words in ("inbox", "sent", "status", "group list"):
        assert fresh.ada.ok(*words.split(), "extra", "--json").startswith("{"), "words that a command does not take are ignored"


# ---- 1.4 - 1.6

def test_init_under_thrum_home(make_repo):
    """`init` starts from THRUM_HOME, not from a parent that has a .thrum."""
    outer = make_repo()
    outer.ok("init")
    inner = make_repo("repo2")
    script(outer, "init", env={"THRUM_HOME": str(inner.path)}, check=0)
    assert (inner.path / ".thrum" / "identities").is_dir()


def test_files_are_local_to_the_checkout(fresh):
    """identities/ and context/ belong to a worktree, the socket to all."""
    fresh.bob.ok("context", "save", input="of bob")
    assert (fresh.bob.path / ".thrum/context/bob.md").read_text() == "of bob"
    assert not (fresh.ada.path / ".thrum/context/bob.md").exists()
    assert (fresh.bob.path / ".thrum/identities/bob.json").exists() and not (fresh.bob.path / ".thrum/var/thrum.sock").exists()


def test_newest_identity_of_the_worktree(team):
    """20 #6: several files, no THRUM_NAME, a role of the environment: the newest of this worktree."""
    other = team.ada.worktree(f"several{team.seq()}")
    for name in ("older", "newer"):
        other.join(f"{name}-{team.seq()}", "coordinator", "all")
    env = {"THRUM_ROLE": "tester", "THRUM_MODULE": "e2e"}
    assert other.json("whoami", env=env)["agent_id"].startswith("newer-")
    for words in ("inbox", "status", "session list", "overview", "send hello"):
        other.ok(*words.split(), env=env)


def test_who_am_i_fails_clearly(make_repo):
    """5.5 and 1.6: not initialized, nobody registered, a THRUM_NAME without a file, and one that is no name."""
    repo = make_repo()
    assert "not initialized" in error_line(repo.run("whoami"))
    repo.ok("init")
    assert error_line(repo.run("whoami")).startswith("no agent identities registered")
    for words in ("agent whoami", "inbox", "send x", "message read --all"):
        error = error_line(repo.run(*words.split(), input="x"))
        assert "no agent identities registered" in error and "quickstart" in error, words
    assert "ghost.json" in error_line(repo.run("inbox", env={"THRUM_NAME": "ghost"})) or \
        "ghost" in error_line(repo.run("inbox", env={"THRUM_NAME": "ghost"}))
    assert "invalid THRUM_NAME" in error_line(repo.run("inbox", env={"THRUM_NAME": "../x"}))


def test_flags_are_checked_first(make_repo):
    """A bad flag is told before identity and daemon are asked for."""
    repo = make_repo()
    repo.ok("init")
    assert error_line(repo.run("inbox", "--scope", "x")).startswith("scope must be in 'type:value' format, got: x")
    assert "unknown flag" in error_line(repo.run("send", "x", "--nope"))


# ---- 1.9, 2: JSON

SHAPED = {
    "quickstart --name ada --role planner --module core": "quickstart", "prime": "prime", "overview": "overview", "status": "status",
    "whoami": "whoami", "agent whoami": "agent whoami", "version": "version", "config show": "config show",
    "send hello --to @bob --scope a:b --ref c:d": "send", "send hello --to @implementer": "send", "send hello": "send",
    "reply {theirs} answer": "reply", "inbox": "inbox", "inbox --unread": "inbox", "inbox --all": "inbox", "sent": "sent",
    "sent show {own}": "sent show", "message get {theirs}": "message get", "message edit {own} text": "message edit",
    "message delete {own} --force": "message delete", "message read {theirs}": "message read",
    "wait --unread --all --after-seq 0": "wait", "agent register --name ada --role planner --module core": "agent register",
    "agent register --name {agent}x --role helper --module {new}": "agent register",
    "agent list": "agent list", "agent list --role planner": "agent list", "agent list --context": "agent list --context",
    "team": "team", "team --all": "team", "who-has README.md": "who-has", "who-has .": "who-has",
    "claim src/a.py docs --note words --ttl 1h": "claim", "claims": "claims", "claims --mine src": "claims", "release": "release",
    "conflicts": "conflicts", "conflicts --all @ada": "conflicts", "guard status": "guard status", "guard check": "guard check",
    "worktree list": "worktree list", "why {line}": "why",
    "agent context": "agent context", "agent context @ada": "agent context", "agent delete {agent} --force": "agent delete",
    "agent cleanup --dry-run": "agent cleanup", "session start": "session start", "session list": "session list",
    "session heartbeat": "session heartbeat", "session set-intent words": "session set-intent",
    "session set-task words": "session set-task", "agent start": "session start", "agent heartbeat": "session heartbeat",
    "group create {new}": "group create", "group add staff @bob": "group add", "group list": "group list", "group info staff": "group info",
    "group info everyone": "group info", "group members staff": "group members", "group members everyone --expand": "group members",
    "group remove staff @bob": "group remove", "ping @ada": "ping", "ping @nobody": "ping", "daemon status": "daemon status",
    "session end": "session end", "agent end": "session end", "inbox --scope no:where": "inbox", "sent --to @nobody": "sent",
    "agent register --name ada --role planner --module core --re-register": "agent register", "session list --agent nobody": "session list",
    "agent set-intent words": "session set-intent", "agent set-task words": "session set-task", "message read --all": "message read",
    "agent heartbeat --add-scope x:y": "session heartbeat", "group add staff --role planner": "group add", "context prime": "prime",
    "agent list --role nobody": "agent list", "session list --active": "session list",
}


def test_the_shapes_are_all_used():
    assert set(SHAPED.values()) | {"group delete"} == set(SHAPES["cli"])


@pytest.mark.parametrize("words", SHAPED)
def test_json_has_its_shape(team, words):
    """One document, indented by two, on stdout; nothing on stderr; --quiet changes nothing."""
    if "wait" in words:
        team.mail()
    try:
        for more in (["--json"], ["--quiet", "--json"]):
            if words.endswith(" end"):
                team.ada.ok("session", "start")
            if words == "message read --all":       # which says in words that there is none
                team.mail("to ada", team.bob, "@ada")
            done = team.ada.run(*fill(team, words), *more, check=0)
            assert done.stderr == "" and done.stdout.startswith('{\n  "')
            shaped(one_document(done.stdout), "cli " + SHAPED[words])
    finally:
        if words.endswith(" end"):
            team.ada.ok("session", "start")


def test_json_of_a_deleted_group(team):
    team.ada.ok("group", "create", "short-lived")
    shaped(team.ada.json("group", "delete", "short-lived"), "cli group delete")


def test_text_commands_ignore_json(team):
    """1.9: those that print text always do so; nothing of them begins like an object."""
    for words in ("purge --before 1d", "context show", "context clear"):
        done = team.ada.run(*words.split(), "--json", check=0)
        assert done.stdout and done.stderr == ""


def test_quiet_of_the_new_commands(team):
    team.ada.ok("group", "create", "hushed")
    for words in ("group add hushed @bob", "group info hushed", "group members hushed", "group remove hushed @bob", "group delete hushed"):
        done = team.ada.run(*words.split(), "--quiet", check=0)
        assert (done.stdout, done.stderr) == ("", ""), words


# ---- 1.10 and what people see

SEEN = [
    ("quickstart --name ada --role planner --module core", r"✓ Registered as @ada", r"✓ Session started: ses_\w{26}", r"✓ Intent set: \S"),
    ("status", r"Agent", r"@planner|planner", r"Inbox", r"Daemon", r"Sync"), ("whoami", r"Agent ID:  ada\n", r"Role:      @planner\n",
     r"Module:"),
    ("send hello --to @bob", r"^✓ Message sent: msg_\w{26}\n"), ("reply {theirs} yes", r"^✓ Reply sent: msg_\w{26}\n"),
    ("message get {theirs}", r"Message: +msg_", r"From:", r"Time:", r"to ada"), ("message edit {own} x",
     r"^✓ Message edited: msg_\w{26} \(version 1\)\n$"),
    ("message delete {own} --force", r"^✓ Message deleted: msg_\w{26}\n$"), ("message read {theirs}", r"^✓ Marked 1 message as read\n"),
    ("inbox", r"[●○]", r"Showing \d+-\d+ of \d+ messages"), ("sent", r"msg_\w{26}", r"\d+/\d+ read"),
    ("agent register --name {agent}z --role helper --module {new}", r"^✓ Agent registered: temp\w+\n"),
    ("agent register --name ada --role planner --module core --re-register", r"^✓ Agent re-registered: ada\n"),
    ("agent list", r"^Registered agents \(\d+\):\n", r"● @ada .*active\)", r"○ @temp"),
    ("agent delete {agent} --force", r"^✓ Agent temp\w+ deleted successfully\n"),
    ("session start", r"^✓ Session started: ses_\w{26}\n", r"Agent:", r"Started:"),
    ("session list", r"^Sessions \(\d+\):\n", r"ses_\w{26} \[active\]|ses_\w{26}.*active", r"Agent:", r"Started:"),
    ("session heartbeat", r"^✓ Heartbeat sent: ses_\w{26}\n"), ("session set-intent words", r"^✓ Intent set: words\n$"),
    ("session set-task t-1", r"^✓ Task set: t-1\n$"), ("group create {new}", r"^✓ Group created: g\d+ \(grp_\w{26}\)\n$"),
    ("group add staff @bob", r"^✓ Added @bob to staff\n$"), ("group add staff --role planner", r"^✓ Added role:planner to staff\n$"),
    ("group list", r"(?m)^staff .*2 members", r"\(no description\)", r"(?m)^everyone .*1 member", r"(?m)^everyone .*All agents"),
    ("group info staff", r"Group:", r"ID:", r"grp_\w{26}", r"Created:.* by @?ada", r"Members \(2\):", r"@bob", r"role:planner"),
    ("group info everyone", r"All agents", r"Members \(1\):", r"role:\* \(all agents\)"),
    ("group members staff --expand", r"Members \(2\):", r"Expanded \(\d+ agents\):", r"@ada", r"@bob"),
    ("group remove staff --role planner", r"^✓ Removed role:planner from staff\n$"), ("group remove staff @bob",
     r"^✓ Removed @bob from staff\n$"),
    ("ping @ada", r"^@ada: active, last heartbeat \S"), ("ping ada", r"^@ada: active"), ("ping @nobody", r"^@nobody: not found"),
    ("overview", r"Agent ID|ada", r"Inbox: ", r"Sync: "), ("prime", r"Agent: @", r"Inbox: ", r"Daemon: ", r"Commands:", r"thrum send"),
    ("context save --file {file}", r"^Context saved for ada \(7 bytes\)\n"), ("context show",
     r"^# Context for ada \(7 bytes, updated .*\)\n", r"# Note"),
    ("context clear", r"^Context cleared for ada\n$"), ("purge --before 400d", r"^Purge preview \(before .*\):\n", r"Messages:  0",
     r"--confirm"),
    ("version", r"^thrum v\d+\.\d+"), ("config show", r"Thrum Configuration", r"Config file:", r"Daemon", r"Local-only:", r"Sync interval:",
                                       r"WS port:", r"Status:", r"Identity", r"Agent:"),
    ("daemon status", r"Daemon:   running \(PID \d+\)", r"Uptime:", r"Version:", r"Sync:"),
]


@pytest.mark.parametrize("words", [row[0] for row in SEEN])
def test_what_people_see(team, words):
    """The tokens that people and scripts know, in order of their rows; nothing on stderr."""
    if words.startswith("inbox"):
        team.mail("to ada", team.bob, "@ada")
    done = team.ada.run(*fill(team, words), check=0)
    patterns = next(row[1:] for row in SEEN if row[0] == words)
    missing = [pattern for pattern in patterns if not re.search(pattern, done.stdout)]
    assert not missing and done.stderr == "", done.stdout + done.stderr


def test_an_empty_inbox(fresh):
    assert fresh.bob.ok("inbox", "--unread") == "No unread messages for @bob.\n"
    assert "No messages matching filter --scope no:where" in fresh.bob.ok("inbox", "--scope", "no:where")


def test_width(fresh):
    """COLUMNS counts where there is no terminal; lines are cut or wrapped, but for an id with its author and age."""
    fresh.mail("word " * 100)
    for columns in (40, 80, 120):
        for words in ("inbox --unread", "agent list", "group list", "sent", "session list"):
            out = (fresh.bob if "inbox" in words else fresh.ada).ok(*words.split(), env={"COLUMNS": str(columns)})
            lines = [line for line in out.splitlines() if not re.search(r"(msg|ses)_\w{26}", line)]
            assert max(map(len, lines)) <= max(columns, 60), (words, columns)


def test_nothing_raw_reaches_a_terminal(fresh):
    """Text of others in every new view: names, descriptions, intents, contexts."""
    poison = "a\x1b[2Jb\u202ec"
    with fresh.ada.client() as client:
        session = client.call("session.start", agent_id="bob")["session_id"]
        client.call("session.setIntent", session_id=session, intent=poison)
        sent = client.call("message.send", content=poison, mentions=["@ada"], caller_agent_id="bob")["message_id"]
    for words in ("overview", "prime", "ping @bob", "agent context", "agent context @bob", "agent list --context", "agent list",
                  "search ab", f"message get {sent}", "inbox --all", "session list"):
        done = fresh.ada.run(*words.split(), check=0)
        assert not raw_in(done.stdout), words


# ---- refusals

REFUSED = {
    # words: how the error begins; `|` separates words that hold blanks
    "send|": "content is required", "send x --scope nope": "invalid scope: scope must be in 'type:value' format, got: nope",
    "send x --ref nope": "invalid ref: ref must be in 'type:value' format, got: nope",
    "send x --structured [1]": "invalid structured data: ", "send x --structured {": "invalid structured data: ",
    "send x --format html": "invalid format: html (must be 'markdown', 'plain', or 'json')",
    "send x --everyone -b": "--broadcast and --to are mutually exclusive",
    "send x -b --to @bob": "--broadcast and --to are mutually exclusive",
    "send x -p critical": "unknown shorthand flag: 'p' in -p", "send x --priority high": "unknown flag: --priority",
    f"reply {GHOST} x": f"failed to get parent message: message not found: {GHOST}|message not found: {GHOST}",
    f"message get {GHOST}": f"message not found: {GHOST}", f"message edit {GHOST} x": f"message not found: {GHOST}",
    f"message delete {GHOST} --force": f"message not found: {GHOST}", "message delete {own}": "use --force to confirm deletion",
    "message edit {theirs} x": "only message author can edit (author: bob, current: ada)",
    "message read": "requires at least 1 arg(s) or --all flag", "sent show {theirs}": "message msg_",
    "inbox --scope nope": "scope must be in 'type:value' format, got: nope", "inbox --limit x": 'invalid argument "x" for "--limit" flag: ',
    "purge": "either --before or --all is required", "purge --all --before 1d": "--before and --all are mutually exclusive",
    "purge --before 0d": "invalid --before value: day count must be positive, got 0",
    "purge --before -5m": "invalid --before value: duration must be positive, got -5m",
    "purge --before never": 'invalid --before value: unrecognized time specification "never"; accepted formats: ',
    "purge --before 2026-02-30": "invalid --before value: ", "purge --before 1.5d": "invalid --before value: ",
    "agent register --name Bad --role r --module m": "invalid agent name: agent name 'Bad' contains invalid characters",
    "agent register --name daemon --role r --module m": "invalid agent name: agent name 'daemon' is reserved and cannot be used",
    "agent register --name x": "role and module are required", "quickstart --name x": "--role and --module are required",
    "quickstart --name Bad --role r --module m": "invalid agent name: ",
    "quickstart --name tester --role tester --module m": 'agent name "tester" cannot be the same as its role',
    "quickstart --name planner --role r --module m": "agent name \"planner\" conflicts with existing role 'planner'",
    "quickstart --name x9 --role bob --module m": "role \"bob\" conflicts with existing agent name 'bob'",
    "agent delete nobody-here --force": "agent not found: nobody-here", "agent delete Bad --force": "invalid agent name: ",
    "agent cleanup --force --dry-run": "--dry-run and --force are mutually exclusive",
    "agent cleanup --threshold x": 'invalid argument "x" for "--threshold" flag: ',
    "session end --session-id ses_0": "session not found",
    "session heartbeat --add-scope nope": 'invalid scope format "nope", expected type:value',
    "session heartbeat --add-ref nope": 'invalid ref format "nope", expected type:value',
    "group create staff": 'group "staff" already exists', "group create everyone": 'group "everyone" already exists',
    "group delete everyone": "cannot delete built-in @everyone group", "group delete ghosts": 'group "ghosts" not found',
    "group add ghosts @bob": 'group "ghosts" not found', "group add everyone @bob": "cannot modify members of built-in @everyone group",
    "group remove everyone --role planner": "cannot modify members of built-in @everyone group",
    "group remove ghosts @bob": 'group "ghosts" not found', "group remove staff": "provide a member argument or --role flag",
    "group add staff": "provide a member argument or --role flag", "group add staff --role ghost": 'role "ghost" not found',
    "group add staff @ghost": 'agent "ghost" not found — agent must be registered before being added to a group',
    "group info ghosts": 'group "ghosts" not found', "group members ghosts": 'group "ghosts" not found',
    "group info": "accepts 1 arg(s), received 0", "group members a b": "accepts 1 arg(s), received 2",
    "group delete": "accepts 1 arg(s), received 0", "agent delete": "accepts 1 arg(s), received 0", "ping": "accepts 1 arg(s), received 0",
    "context save --file /nowhere/note.md": "read context file: ", "context preamble --file /nowhere/note.md": "read preamble file: ",
    "quickstart --name ada --role planner --module core --preamble-file /nowhere/p.md": 'failed to read preamble file "/nowhere/p.md": ',
    "search": "accepts 1 arg(s), received 0", "config get": "accepts 1 arg(s), received 0", "trace": "accepts 1 arg(s), received 0",
    f"trace {GHOST}": f"message not found: {GHOST}", "nope": 'unknown command "nope" for "thrum"',
}


@pytest.mark.parametrize("words", REFUSED)
def test_refusals(fresh, words):
    """One line on stderr, nothing on stdout, status 1, no trace."""
    line = fill(fresh, words)
    before = fresh.trace()
    text = error_line(fresh.ada.run(*line))
    assert text.startswith(tuple(REFUSED[words].split("|"))), text
    assert fresh.trace() == before


# ---- 3: setup

def everything(folder):
    """All files of a worktree and of its git directory, with their bytes and modes; not what git itself keeps about what it did."""
    own = re.compile(r"\.git/(index|logs|objects|gc|COMMIT_EDITMSG|ORIG_HEAD|FETCH_HEAD)")
    return {str(path.relative_to(folder)): (path.lstat().st_mode, path.read_bytes() if path.is_file() else b"")
            for path in sorted(Path(folder).rglob("*")) if not own.search(str(path))}


def test_a_fresh_init(make_repo):
    """20 #3, #7, #8, #13, #80: init leaves a running daemon, nobody registered, and no settings of other tools."""
    repo = make_repo()
    out = repo.ok("init")
    for token in ("✓ Thrum initialized successfully", "a-sync branch", ".gitignore", "✓ Daemon started"):
        assert token in out, token
    for name in (".thrum/identities", ".thrum/var", ".git/thrum-sync/a-sync/events.jsonl", ".git/thrum-sync/a-sync/messages",
                 ".thrum/config.json"):
        assert (repo.path / name).exists(), name
    assert json.loads((repo.path / ".thrum/config.json").read_text())["daemon"]["local_only"] is True
    assert "a-sync" in repo.git("branch", "--list", "a-sync")
    settings = repo.path / ".claude" / "settings.json"
    assert not settings.exists() or "mcpServers" not in settings.read_text()
    assert listed(repo) == [], "decision 9"
    pid = repo.json("daemon", "status")["pid"]
    assert "coordinator" in repo.ok("quickstart", "--role", "coordinator", "--module", "all", "--name", "e2e_coordinator",
                                    "--intent", "Coordinate the tests")
    assert repo.pid() == pid
    begin = start(repo, "daemon", "stop")
    assert finish(begin)[0] == 0 and gone(pid)


def test_init_force(make_repo):
    """20 #14: once more with --force makes all anew and keeps the mail."""
    repo = make_repo()
    repo.ok("init")
    repo.join("ada", "planner")
    repo.ok("send", "kept")
    out = repo.ok("init", "--force")
    assert "initialized" in out and "fatal" not in out
    for name in (".thrum/identities", ".thrum/var", ".git/thrum-sync/a-sync/events.jsonl", ".git/thrum-sync/a-sync/messages"):
        assert (repo.path / name).exists(), name
    assert "kept" in repo.ok("sent")


def test_init_dry_run(make_repo):
    repo = make_repo()
    before = everything(repo.path)
    out = repo.ok("init", "--dry-run")
    assert out and everything(repo.path) == before and not (repo.path / ".thrum").exists()


def test_init_stealth(make_repo):
    """Ignored by .git/info/exclude: nothing that git could commit has changed."""
    repo = make_repo()
    out = repo.ok("init", "--stealth")
    assert ".git/info/exclude" in out and not (repo.path / ".gitignore").exists()
    assert ".thrum/" in (repo.path / ".git/info/exclude").read_text()
    assert repo.git("status", "--porcelain") == ""
    repo.ok("init", "--stealth")
    assert (repo.path / ".git/info/exclude").read_text().splitlines().count(".thrum/") == 1


def test_init_with_an_identity(make_repo):
    """Decision 9: with --agent-* it registers, starts a session, sets an intent, and says so."""
    repo = make_repo()
    out = repo.ok("init", "--agent-name", "cleo", "--agent-role", "reviewer", "--agent-module", "web")
    assert "cleo" in out and listed(repo) == ["cleo"]
    me = repo.json("whoami")
    assert (me["agent_id"], me["role"], me["module"]) == ("cleo", "reviewer", "web") and me["session_id"]
    assert me["intent"] == f"Review code and PRs in {repo.path.name}"


def test_init_refuses(make_repo):
    repo = make_repo()
    for words in ("--nope", "--agent-name Bad --agent-role r --agent-module m", "--agent-name r --agent-role r --agent-module m"):
        error_line(repo.run("init", *words.split()))
        assert not (repo.path / ".thrum").exists(), words


def test_init_outside_of_git_with_flags(tmp_path):
    """20 #15: whatever the flags, nothing is left where there is no repository."""
    for words in ("", "--stealth", "--force", "--dry-run", "--agent-name a --agent-role r --agent-module m"):
        done = subprocess.run([*QUICK, "init", *words.split()], cwd=tmp_path, env=CLEAN,
                              capture_output=True, text=True, timeout=END_S)
        assert re.search("(?i)git|repository", error_line(done)), words
        assert not list(tmp_path.iterdir())


def test_init_remove(make_repo):
    """Design, section 5: it leaves without a trace."""
    repo = make_repo()
    (repo.path / ".gitignore").write_text("mine\n")
    (repo.path / "file").write_text("x")
    repo.git("add", ".")
    repo.git("commit", "-q", "-m", "second")
    refs, before = repo.git("for-each-ref"), everything(repo.path)
    repo.ok("init")
    repo.join("ada", "planner")
    repo.ok("send", "to nobody")
    pid = repo.pid()
    done = repo.run("init", "--remove", "--yes")
    assert done.returncode == 0, done.stderr
    assert gone(pid) and not (repo.path / ".thrum").exists() and repo.git("status", "--porcelain") == ""
    assert repo.git("for-each-ref") == refs and everything(repo.path) == before


def test_setup_of_all_worktrees(make_repo):
    repo = make_repo()
    repo.ok("init")
    others = [repo.worktree(name) for name in ("one", "two")]
    repo.ok("setup", "--all")
    for other in others:
        assert (other.path / ".thrum/redirect").read_text() == f"{repo.path}/.thrum\n" and (other.path / ".thrum/identities").is_dir()
    repo.ok("setup", "--all")


def test_migrate(make_repo):
    """Journals that an old version tracked on the main branch move to the a-sync worktree; nothing else changes."""
    repo = make_repo()
    assert "initialized" in error_line(repo.run("migrate")) or repo.ok("migrate") == "No migration needed.\n"
    old = {".thrum/events.jsonl": {"type": "agent.register", "timestamp": "2026-01-01T00:00:00.000000001Z",
                                   "event_id": "evt_01KABCDEFGHJKMNPQRSTVWXYZ0", "v": 1, "origin_daemon": "d_old", "agent_id": "otter",
                                   "kind": "agent", "role": "swimmer", "module": "river"},
           ".thrum/messages/otter.jsonl": {"type": "message.create", "timestamp": "2026-01-01T00:00:01.000000001Z",
                                           "event_id": "evt_01KABCDEFGHJKMNPQRSTVWXYZ1", "v": 1, "origin_daemon": "d_old",
                                           "message_id": "msg_01KABCDEFGHJKMNPQRSTVWXYZ2", "agent_id": "otter", "session_id": "ses_1",
                                           "body": {"format": "plain", "content": "from before"}}}
    for name, event in old.items():
        (repo.path / name).parent.mkdir(parents=True, exist_ok=True)
        (repo.path / name).write_text(json.dumps(event) + "\n")
    (repo.path / ".gitattributes").write_text("*.png binary\n.thrum/events.jsonl merge=union\n")
    repo.git("add", "-f", ".")
    repo.git("commit", "-q", "-m", "old layout")
    repo.ok("init")
    done = repo.run("migrate", check=0)
    assert "Migration needed. Found old-layout data:" in done.stdout and "Migration complete:" in done.stdout
    assert "otter" in listed(repo)
    repo.join("ada", "planner")
    assert "from before" in repo.ok("inbox", "--all")
    assert not repo.git("ls-files", ".thrum"), "untracked from main"
    assert "png binary" in (repo.path / ".gitattributes").read_text() and "merge=union" not in (repo.path / ".gitattributes").read_text()
    assert repo.run("migrate", check=0)
    assert repo.ok("inbox", "--all").count("from before") == 1


def test_config_show(team):
    shown = team.ada.json("config", "show")
    assert shown["daemon"]["status"] == f"running (PID {team.ada.pid()})" and shown["daemon"]["pid"] == team.ada.pid()
    assert shown["daemon"]["local_only"] == {"value": "true", "source": "config.json"}
    assert shown["daemon"]["sync_interval"]["value"] == "60s"
    assert shown["identity"]["agent"] == "ada" and shown["identity"]["role"] == "planner"
    assert shown["runtime"]["primary"]


def test_config_sources(make_repo):
    """Works without a daemon; says for each value where it comes from; set, get, unset; keys that nobody knows are kept."""
    repo = make_repo()
    repo.ok("init")
    repo.ok("daemon", "stop")
    assert repo.json("config", "show")["daemon"]["status"] == "not running"
    path = repo.path / ".thrum/config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, "theirs": {"x": [1]}}))
    repo.ok("config", "set", "daemon.sync_interval", "30")
    assert repo.ok("config", "get", "daemon.sync_interval").strip() in ("30", "30s")
    shown = repo.json("config", "show", env={"THRUM_SYNC_INTERVAL": "5", "THRUM_LOCAL": "1"})
    assert shown["daemon"]["sync_interval"] == {"value": "5s", "source": "env"}
    assert {o["env_var"] for o in shown["overrides"]} == {"THRUM_SYNC_INTERVAL", "THRUM_LOCAL"}
    assert repo.json("config", "show")["daemon"]["sync_interval"] == {"value": "30s", "source": "config.json"}
    repo.ok("config", "unset", "daemon.sync_interval")
    assert repo.json("config", "show")["daemon"]["sync_interval"] == {"value": "60s", "source": "default"}
    assert json.loads(path.read_text())["theirs"] == {"x": [1]}
    before = path.read_bytes()
    for words in ("set daemon.sync_interval soon", "set daemon.sync_interval -1", "set daemon.sync_interval", "set daemon.ws_port 99999",
                  "set daemon.local_only perhaps"):
        error_line(repo.run("config", *words.split()))
        assert path.read_bytes() == before, words


# ---- 4: quickstart

def test_quickstart_dry_run(fresh):
    before = fresh.trace()
    out = fresh.ada.ok("quickstart", "--name", "nobody1", "--role", "tester", "--module", "m", "--dry-run")
    assert out and fresh.trace() == before and "nobody1" not in listed(fresh.ada)


def test_quickstart_writes_context_and_preamble(team):
    other = team.ada.worktree(f"qs{team.seq()}")
    preamble = team.folder / "p.md"
    preamble.write_text("Be brief.\n")
    other.ok("quickstart", "--name", "hal", "--role", "operator", "--module", "m", "--preamble-file", str(preamble))
    context = other.path / ".thrum/context"
    text = (context / "hal_preamble.md").read_text()
    assert text.endswith("Be brief.\n") and "---" in text and (context / "hal.md").exists()
    (context / "hal_preamble.md").write_text("my own\n")
    other.ok("quickstart")
    assert (context / "hal_preamble.md").read_text() == "my own\n", "only where it is missing"


def test_quickstart_in_words(team):
    """20 #24."""
    other = team.ada.worktree(f"sc{team.seq()}")
    out = other.ok("quickstart", "--role", "coordinator", "--module", "sc05", "--display", "Coordinator", "--intent", "Testing",
                   "--name", "e2e_coordinator_sc05")
    assert re.search("(?i)registered|quickstart|session|coordinator", out) and other.ok("status")


def test_quickstart_without_a_name(team):
    """20 #31."""
    other = team.ada.worktree(f"noname{team.seq()}")
    other.ok("quickstart", "--role", "tester", "--module", "e2e", "--intent", "No name")
    assert "tester" in other.ok("agent", "list")
    other.ok("session", "end")
    assert re.search("tester(.|\n)*(?i:offline|inactive)", other.ok("agent", "list"))


def test_a_name_is_no_role(team):
    """20 #89."""
    other = team.ada.worktree(f"same{team.seq()}")
    done = other.run("quickstart", "--name", "same1", "--role", "same1", "--module", "m")
    assert re.search("name.*cannot.*same.*role", error_line(done))
    assert not re.search("name.*cannot.*same.*role", other.ok("quickstart", "--name", "same2", "--role", "other2", "--module", "m"))


# ---- 5: orientation

def test_prime(fresh):
    """20 #77, and the sections."""
    fresh.mail("fresh and direct")
    out = fresh.bob.ok("prime")
    assert re.search(r"[1-9]\d* unread", out) and "fresh and direct" in out
    data = fresh.bob.json("prime")
    assert data["identity"]["agent_id"] == "bob" and data["messages"]["unread"] == 1 and data["session"]["session_id"]
    assert data["agents"]["total"] >= 2 and data["agents"]["active"] <= data["agents"]["total"] == len(data["agents"]["list"])
    assert data["messages"]["recent"][0]["body"]["content"] == "fresh and direct" and data["sync_state"]["daemon_status"]
    assert fresh.unread() == ["fresh and direct"], "to be shown a line is not to have read it"


def test_prime_without_a_daemon(make_repo):
    repo = make_repo()
    done = repo.run("prime")
    assert done.returncode == 0 and done.stdout.startswith("Thrum not initialized (run: thrum init"), done.stderr


def test_overview(fresh):
    """20 #58; decision 27: without an identity it says so."""
    fresh.mail("for the overview")
    out = fresh.bob.ok("overview")
    assert re.search(r"Inbox: 1 unread \(\d+ total\)", out) and "Sync: " in out and "@ada" in out
    data = fresh.bob.json("overview")
    assert data["agent"]["agent_id"] == "bob" and data["inbox"]["unread"] == 1 and fresh.unread() == ["for the overview"]
    nobody = fresh.ada.worktree(f"empty{fresh.seq()}")
    nobody.ok("setup")
    done = nobody.run("overview")
    assert "Not registered" in done.stdout and done.returncode == 0


def test_status_in_words(team):
    """20 #57, #59, #60."""
    out = team.ada.ok("status")
    assert "agent" in out.lower() and "daemon" in out.lower()
    status = team.ada.json("status")
    assert status["health"]["status"] == "ok" and status["agent"]["role"] == "planner"
    assert all(isinstance(team.ada.json(*words.split()), dict) for words in ("inbox", "agent list"))


def test_version_links(team):
    """5.6: three lines, the repository and the page as links."""
    lines = team.ada.ok("version").splitlines()
    assert len(lines) == 3 and re.match(r"thrum v\d+\.\d+.* \(build: .+, .*[Pp]ython.*\d+\.\d+", lines[0])
    assert all("https://" in line for line in lines[1:])


SHELLS = {"bash": ["bash", "-n"], "zsh": ["zsh", "-n"], "fish": ["fish", "-n"], "powershell": None}


@pytest.mark.parametrize("shell", SHELLS)
def test_completion(team, tmp_path, shell):
    """A script on stdout that the shell, where it is here, can read; what it offers is asked below."""
    out = team.ada.ok("completion", shell)
    assert "thrum" in out and "complete" in out.lower()
    assert team.ada.ok("completion", shell, "--no-descriptions")
    command = SHELLS[shell]
    if command and shutil.which(command[0]):
        path = tmp_path / "script"
        path.write_text(out)
        assert subprocess.run([*command, str(path)], capture_output=True, text=True, timeout=END_S).returncode == 0


def test_completion_in_bash(team):
    """In the real shell: the commands, then the flags of one."""
    if not shutil.which("bash"):
        pytest.fail("this machine has no bash")
    code = ('eval "$(%s completion bash)"\n'
            'function=$(complete -p thrum | sed -E "s/.*-F ([^ ]+).*/\\1/")\n'
            'ask() { COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); COMP_LINE="$*"; COMP_POINT=${#COMP_LINE}; COMPREPLY=()\n'
            '$function thrum "${COMP_WORDS[$COMP_CWORD]}" "${COMP_WORDS[$((COMP_CWORD - 1))]}"; echo "${COMPREPLY[@]}"; }\n'
            "ask thrum inb\nask thrum agent cle\nask thrum inbox --unr\n") % team.ada.launcher
    done = subprocess.run(["bash", "-c", code], cwd=team.ada.path, env=CLEAN, capture_output=True, text=True, timeout=END_S)
    lines = [line.strip() for line in done.stdout.splitlines()]
    assert lines == ["inbox", "cleanup", "--unread"], done.stdout + done.stderr


# ---- 6: messages

def test_each_way_to_send_arrives(fresh):
    """20 #33, #39, #42, #86, #88."""
    for words, warned in (("plain", False), ("named --to @bob", False), ("mentioned --mention @bob", False), ("b --broadcast", False),
                          ("everyone --to @everyone", False), ("flag --everyone", False), ("role --to @implementer", True)):
        done = fresh.ada.run("send", *words.split(), "--json" if not warned else "--quiet", check=0)
        if not warned:
            assert json.loads(done.stdout)["message_id"].startswith("msg_") and "resolved to a group" not in done.stdout + done.stderr
        messages = fresh.bob.json("inbox", "--unread")["messages"]
        assert messages[0]["body"]["content"] == words.split()[0]
    assert "resolved to a group" in fresh.ada.run("send", "x", "--to", "@implementer", check=0).stderr
    assert len(fresh.unread()) == 8


def test_labels_of_a_send(fresh):
    """20 #34."""
    sent = fresh.ada.json("send", "labelled", "--scope", "module:auth", "--ref", "commit:abc123", "--to", "@bob")["message_id"]
    message = fresh.bob.json("message", "get", sent)["message"]
    assert (message["body"]["content"], message["message_id"]) == ("labelled", sent)
    assert {"type": "module", "value": "auth"} in message["scopes"] and {"type": "commit", "value": "abc123"} in message["refs"]
    assert [m["message_id"] for m in fresh.bob.json("inbox", "--scope", "module:auth")["messages"]][:1] == [sent]


def test_a_send_to_nobody(fresh):
    """20 #35, #41, #85."""
    before = fresh.trace()
    assert "unknown" in error_line(fresh.ada.run("send", "x", "--to", "@does-not-exist"))
    assert re.search("unknown|ghost_agent", error_line(fresh.ada.run("send", "x", "--to", "@bob", "--mention", "@ghost_agent")))
    assert error_line(fresh.ada.run("send", "x", "--to", "@bob", "--to", "@ghost_agent"))
    assert fresh.trace() == before and fresh.unread() == [] == fresh.unread(fresh.ada)


def test_editing_and_deleting_in_words(fresh):
    """20 #36, #37."""
    sent = fresh.mail("before")
    assert re.search("(?i)edited|version", fresh.ada.ok("message", "edit", sent, "after"))
    message = fresh.ada.json("message", "get", sent)["message"]
    assert message["body"]["content"] == "after" and message["updated_at"]
    assert "(edited)" in fresh.bob.ok("inbox", "--unread")
    assert "deleted" in fresh.ada.ok("message", "delete", sent, "--force").lower()
    assert fresh.ada.json("message", "get", sent)["message"]["deleted"] is True
    assert error_line(fresh.ada.run("message", "delete", sent, "--force")).endswith(f"message already deleted: {sent}")


def test_reply_repeats_the_audience(fresh):
    """6.2, 20 #38: whom the parent named, and its author; not oneself."""
    parent = fresh.ada.json("send", "to two", "--to", "@bob", "--mention", "@implementer")["message_id"]
    out = fresh.bob.ok("reply", parent, "thanks")
    assert re.search("(?i)reply sent|thread", out)
    reply = fresh.ada.json("inbox", "--unread")["messages"][0]
    assert reply["reply_to"] == parent and reply["thread_id"]
    refs = fresh.ada.json("message", "get", reply["message_id"])["message"]["refs"]
    assert {"type": "mention", "value": "ada"} in refs and {"type": "group", "value": "implementer"} in refs
    assert fresh.ada.json("message", "get", parent)["message"]["body"]["content"] == "to two"
    assert fresh.unread() == [], "who answers has read"


def test_read_all(fresh):
    """20 #40."""
    for n in range(3):
        fresh.mail(str(n))
    out = fresh.bob.ok("message", "read", "--all")
    assert re.search("(?i)marked", out) and "read" in out and "3 messages" in out
    assert fresh.bob.json("inbox", "--unread")["messages"] == []
    assert fresh.bob.ok("message", "read", "--all") == "No unread messages.\n"


def test_wait_in_words(fresh):
    """20 #62, #81, #87: woken by scope, by mention, by anything; two in a row; own mail does not count."""
    for wait, send in (("--scope module:auth", "--scope module:auth"), ("--mention @bob", "--mention @bob"), ("--after +0s", "--to @bob")):
        waiting = start(fresh.bob, "wait", *wait.split(), "--timeout", "10s")
        while waiting.poll() is None:       # sent again until the wait has begun
            fresh.ada.ok("send", "wake up", *send.split())
            try:
                waiting.wait(0.3)
            except subprocess.TimeoutExpired:
                continue
        status, out, _ = finish(waiting)
        assert status == 0 and "MESSAGES_RECEIVED" in out, wait
    for _ in range(2):
        done = fresh.bob.run("wait", "--timeout", "100ms", "--from", "nobody")
        assert done.returncode == 1 and "already exists" not in done.stderr
    fresh.clear()
    fresh.bob.ok("send", "my own broadcast")
    assert fresh.bob.run("wait", "--after", "-5s", "--timeout", "200ms", "--scope", "no:where").returncode == 1


def test_purge(make_repo):
    """6.7: preview by default, --confirm does it, agents and groups stay; no identity is needed."""
    repo = make_repo()
    repo.ok("init")
    repo.join("ada", "planner")
    repo.ok("group", "create", "kept")
    for n in range(3):
        repo.ok("send", f"old {n}")
    preview = repo.ok("purge", "--all")
    assert preview.startswith("Purge preview (before ") and re.search(r"Messages:\s+3", preview)
    assert "Run with --confirm to execute." in preview
    assert repo.json("sent")["total"] == 3
    for identity in (repo.path / ".thrum/identities").glob("*.json"):
        identity.rename(identity.with_suffix(".away"))
    done = repo.ok("purge", "--all", "--confirm")
    assert done.startswith("Purged (before ") and re.search(r"Messages:\s+3", done) and "Done." in done
    assert "ada" in listed(repo) and "kept" in repo.ok("group", "list")
    repo.join("bob", "implementer")
    assert repo.json("inbox", "--all")["total"] == 0


def test_purge_specifications(team):
    """Days, durations, a date, a moment; each previews the same nothing."""
    for spec in ("400d", "9600h", "2001-02-03", "2001-02-03T04:05:06Z", "2001-02-03T04:05:06+02:00", "2001-02-03T04:05:06.789Z"):
        assert re.search(r"Messages:\s+0", team.ada.ok("purge", "--before", spec)), spec


# ---- 7: agents

def test_registering_a_role_twice(team):
    """20 #22, #23, #25."""
    other = team.ada.worktree(f"owner{team.seq()}")
    line = ("agent", "register", "--role", "owner", "--module", "all", "--force", "--display", "Leon")
    assert "registered" in other.ok(*line) and other.ok("agent", "whoami")

    def owners():
        return [a for a in other.json("agent", "list")["agents"]["agents"] if a["role"] == "owner"]
    count = len(owners())
    assert "registered" in other.ok(*line) and len(owners()) == count
    assert {"owner", "planner", "implementer"} <= {a["role"] for a in other.json("agent", "list")["agents"]["agents"]}


def test_register_writes_identity_and_preamble(team):
    other = team.ada.worktree(f"reg{team.seq()}")
    other.ok("agent", "register", "--name", "ines", "--role", "writer", "--module", "docs")
    assert json.loads((other.path / ".thrum/identities/ines.json").read_text())["worktree"] == other.path.name
    preamble = other.path / ".thrum/context/ines_preamble.md"
    assert preamble.exists()
    preamble.write_text("mine")
    other.ok("agent", "register", "--name", "ines", "--role", "writer", "--module", "docs", "--re-register")
    assert preamble.read_text() == "mine"


def test_agent_context(team):
    assert "No active work contexts found." in team.ada.ok("agent", "context", "--branch", "nowhere") or \
        team.ada.json("agent", "context", "--branch", "nowhere")["contexts"] == []
    rows = team.ada.json("agent", "context")["contexts"]
    assert {"ada", "bob"} <= {row["agent_id"] for row in rows}
    assert {row["agent_id"] for row in team.ada.json("agent", "context", "--agent", "planner")["contexts"]} == {"ada"}, "decision 27"
    assert {row["agent_id"] for row in team.ada.json("agent", "context", "@bob")["contexts"]} == {"bob"}
    out = team.ada.ok("agent", "list", "--context")
    assert re.match(r"AGENT\s+SESSION\s+BRANCH\s+COMMITS\s+FILES\s+INTENT\s+UPDATED", out)


def test_work_in_words(make_repo):
    """5.2, 5.3, 7.2 and 8: what status, overview, heartbeat and the details of a context say of a branch with work on it."""
    repo = make_repo()
    repo.ok("init")
    repo.git("checkout", "-q", "-b", "feat")
    for name in ("one.py", "two.py"):
        (repo.path / name).write_text("1\n")
        repo.git("add", name)
    repo.git("commit", "-q", "-m", "Add two")
    sha = repo.git("rev-parse", "HEAD").strip()
    repo.join("ada", "planner")
    (repo.path / "one.py").write_text("2\n")
    repo.ok("session", "set-intent", "Plan it")
    repo.ok("session", "set-task", "t-1")
    assert re.fullmatch(r"✓ Heartbeat sent: ses_\w{26}\n  Context: branch: feat, 1 commits?, 3 files\n", repo.ok("session", "heartbeat"))
    (work,) = repo.json("agent", "context", "@ada")["contexts"]
    assert work["unmerged_commits"] == [{"sha": sha, "message": "Add two", "files": ["one.py", "two.py"]}]
    assert (work["branch"], work["worktree_path"], work["current_task"]) == ("feat", str(repo.path), "t-1")
    assert sorted(work["changed_files"]) == ["one.py", "two.py"] and sorted(work["uncommitted_files"]) == [".gitignore", "one.py"]
    assert re.fullmatch(
        rf"Agent: @ada \({work['session_id']}\)\nBranch: feat\nWorktree: {re.escape(str(repo.path))}\nIntent: Plan it \(set [^)]+\)\n"
        rf"Task: t-1.*\nUnmerged Commits \(1\):\n  {sha[:7]} Add two \[one.py, two.py\]\nChanged Files \(vs main\): 2\nUncommitted: 2\n",
        repo.ok("agent", "context", "@ada"))
    out = repo.ok("status")
    assert re.search(r"(?m)^Task: +t-1$", out) and re.search(r"(?m)^Commits: +1 ahead$", out)
    assert re.search(r"(?m)^Files: +2 changed, 2 uncommitted$", out)
    out = repo.ok("overview")
    assert re.search(r"(?m)^Task: +t-1$", out) and re.search(r"(?m)^Branch info: 1 commits?, 3 files$", out)
    assert re.search(r"(?m)^    Branch: feat \(1 commits?\)$", repo.ok("agent", "list"))
    assert re.fullmatch(r"@ada: active, last heartbeat [^\n]+\n  Intent: Plan it\n  Task: +t-1\n  Branch: feat\n", repo.ok("ping", "ada"))
    assert "1" in repo.ok("agent", "context", "--file", "two.py").splitlines()[1].split()
    repo.ok("session", "end")
    assert repo.ok("agent", "context", "@ada") == "No active work contexts found.\n", "6.5: open sessions only"


def test_coordination(make_repo):
    """20 #12, #43, #50, #52, #53, #56, #93: what the end-to-end tests do with the views."""
    repo = make_repo()
    (repo.path / "README.md").write_text("one\n")
    repo.git("add", "README.md")
    repo.git("commit", "-q", "-m", "readme")
    roles = ("coordinator", "implementer", "reviewer", "tester", "planner")
    for role in roles:
        repo.ok("quickstart", "--name", "e2e_" + role, "--role", role, "--module", "main", env={"THRUM_NAME": "e2e_" + role})
    me = {"THRUM_NAME": "e2e_coordinator"}
    out = repo.ok("agent", "list", env=me)
    assert "@coordinator" in out and "@implementer" in out
    repo.ok("agent", "heartbeat", env=me)
    for words in (["who-has", "README.md"], ["who-has", "no/such/file"]):
        out = repo.ok(*words, env=me)
        assert out and "error" not in out.lower() and isinstance(repo.json(*words, env=me), dict)
        assert out == f"No agents are currently editing {words[1]}\n"
    (repo.path / "README.md").write_text("two\n")
    repo.ok("agent", "heartbeat", env=me)
    out = repo.ok("who-has", "README.md", env=me)
    assert re.search("is editing|no agent", out, re.I) and "@e2e_coordinator is editing README.md (+1 -1, modified " in out
    assert "branch" in repo.ok("agent", "context", env=me).lower()
    out = repo.ok("agent", "list", "--context", env={**me, "COLUMNS": "80"})
    assert "e2e_co" in out and re.search("intent|branch|commits|files", out, re.I)
    assert re.search("coordinator|implementer", repo.ok("team", env=me))
    members = repo.json("team", env=me)["members"]
    assert all(member["agent_id"] and member["role"] for member in members) and {member["role"] for member in members} >= set(roles)


def test_team_in_words(make_repo):
    """5.4, line by line."""
    repo = make_repo()
    repo.ok("init")
    assert repo.ok("team") == "No active agents. Use --all to include offline agents.\n"
    assert repo.ok("team", "--all") == "No agents are registered.\n"
    repo.git("add", ".gitignore")
    repo.git("commit", "-q", "-m", "ignore")
    repo.join("ada", "planner", "core")
    repo.ok("session", "set-intent", "Plan it")
    repo.ok("session", "set-task", "t-1")
    repo.ok("session", "heartbeat")
    repo.ok("send", "to all")
    out = repo.ok("team")
    session = repo.json("whoami")["session_id"]
    assert re.fullmatch(
        rf"● @ada \(core\) — Plan it \[main\]\n  Worktree: repo\n  Host: +\S+\n  Session:  {session[:16]}\.\.\. \(active [^)]+\)\n"
        r"  Intent:   Plan it\n  Task:     t-1\n  Inbox:    0 unread / 0 total\n  Branch:   main \(0 commits ahead\)\n"
        r"  Files:    \(no changes\)\n\n--- Shared ---\nBroadcasts: 1 messages\n", out), out
    repo.ok("session", "end")
    assert repo.ok("team").startswith("No active agents. Use --all to include offline agents.\n")
    assert re.match(r"○ @ada \(core\).*\n(  .*\n)*?  Session:  offline \(last seen [^)]+\)\n", repo.ok("team", "--all"))


def test_agent_delete(make_repo):
    """20 #64 - #66, and the question."""
    repo = make_repo()
    repo.ok("init")
    env = {"THRUM_NAME": "victim", "THRUM_ROLE": "doomed", "THRUM_MODULE": "m"}
    repo.ok("agent", "register", "--name", "victim", "--role", "doomed", "--module", "m", env=env)
    repo.ok("session", "start", env=env)
    repo.ok("send", "last words", env=env)
    assert "Deletion canceled." in repo.ok("agent", "delete", "victim", input="n\n") and "victim" in listed(repo)
    assert "Deletion canceled." in repo.ok("agent", "delete", "victim", input=""), "nobody has said yes"
    status, out = on_terminal(repo, "n\n", "agent", "delete", "victim")
    assert status == 0 and "Delete agent 'victim' and all associated data? [y/N]" in out and "Deletion canceled." in out
    assert "victim" in listed(repo)
    repo.ok("agent", "delete", "victim", "--force")
    assert not (repo.path / ".thrum/identities/victim.json").exists()
    assert "victim" not in listed(repo)
    repo.ok("daemon", "stop")
    branch = repo.path / ".git/thrum-sync/a-sync"
    assert not (branch / "messages/victim.jsonl").exists()
    events = [json.loads(line) for line in (branch / "events.jsonl").read_text().splitlines()]
    (event,) = [e for e in events if e["type"] == "agent.cleanup"]
    assert event["agent_id"] == "victim" and event["method"] == "manual" and event["timestamp"] and event["reason"]
    repo.ok("daemon", "start")
    assert "victim" not in listed(repo)
    assert re.search("not found|does not exist", error_line(repo.run("agent", "delete", "victim", "--force")))
    repo.join("ada", "planner")
    status, out = on_terminal(repo, "y\n", "agent", "delete", "ada")
    assert status == 0 and "✓ Agent" in out and listed(repo) == []
    repo.join("bob", "implementer")
    assert "✓ Agent" in repo.ok("agent", "delete", "bob", input="y\n")


def test_agent_cleanup(make_repo):
    """20 #67; --dry-run tells, the question asks, --force does."""
    repo = make_repo()
    repo.ok("init")
    repo.join("ada", "planner")
    assert "mutually exclusive" in error_line(repo.run("agent", "cleanup", "--force", "--dry-run"))
    assert "No orphaned agents found." in repo.ok("agent", "cleanup", "--dry-run")
    with repo.client() as client:
        for name in ("ghost1", "ghost2"):
            client.call("agent.register", name=name, role="z" + name, module="m", worktree="repo")
    out = repo.ok("agent", "cleanup", "--dry-run")
    assert "  Agent: ghost1 (zghost1, module: m)\n" in out and re.search(r"Worktree: +repo \[(exists|DELETED)\]\n", out)
    assert "Orphaned agents (dry-run mode):" in out and "ghost1" in out and "Last seen:" in out and re.search("Messages: +0", out)
    assert {"ghost1", "ghost2"} <= set(listed(repo))
    for answer in ("", "n\n", "yes please\n"):
        assert "Cleanup canceled." in repo.ok("agent", "cleanup", input=answer) and {"ghost1", "ghost2"} <= set(listed(repo)), answer
    status, out = on_terminal(repo, "n\n", "agent", "cleanup")
    assert status == 0 and "[y/N]" in out and "Cleanup canceled." in out and {"ghost1", "ghost2"} <= set(listed(repo))
    out = repo.ok("agent", "cleanup", "--force")
    assert "✓ Deleted 2 orphaned agent(s)" in out and listed(repo) == ["ada"]


def test_ping(team):
    """20 #51, #82, and who is offline."""
    assert re.match("@bob: active", team.ada.ok("ping", "@bob")) and re.match("@implementer: active", team.ada.ok("ping", "@implementer"))
    name = registered(team)
    out = team.ada.ok("ping", "@" + name)
    assert out.startswith(f"@{name}: offline") and "not found" not in out


# ---- 8: sessions

def test_sessions_in_words(team):
    """20 #27 - #30, #32, #54, #55."""
    other = team.ada.worktree(f"ses{team.seq()}")
    other.ok("agent", "register", "--name", f"sess{team.seq()}", "--role", "sessional", "--module", "m", "--force")
    for _ in range(2):
        assert "session" in other.ok("session", "start").lower() and "session" in other.ok("status").lower()
        done = other.run("session", "start")
        assert done.returncode == 0 or "already" in done.stderr
        assert "intent" in other.ok("agent", "set-intent", "Working on authentication module").lower()
        assert "authentication" in other.ok("status") and "task" in other.ok("agent", "set-task", "thrum-test").lower()
        assert re.search("(?i)heartbeat|ok|updated", other.ok("agent", "heartbeat"))
        assert re.search("(?i)active|online|last.seen", other.ok("agent", "list"))
        assert "session" in other.ok("session", "end").lower()
        assert re.search("(?i)no.*session|inactive|ended|stopped|none", other.ok("status"))
    assert "session" in other.ok("session", "list").lower()
    assert error_line(other.run("session", "end")) == "no active session to end"
    for words in ("session set-intent x", "session set-task x", "session heartbeat"):
        assert error_line(other.run(*words.split())) == "no active session - start one with 'thrum session start'"


def test_intent_goes_into_the_identity_file(team):
    team.ada.ok("session", "set-intent", "Sort the words")
    assert json.loads((team.ada.path / ".thrum/identities/ada.json").read_text())["intent"] == "Sort the words"


# ---- 9: groups

def test_groups_in_words(fresh):
    """20 #45 - #48."""
    ada = fresh.ada
    assert re.search("(?i)created|test-team", ada.ok("group", "create", "test-team")) and "test-team" in ada.ok("group", "list")
    ada.ok("group", "add", "test-team", "@ada")
    ada.ok("group", "add", "test-team", "@bob")
    assert re.search("test-team.*2 members", ada.ok("group", "list"))
    ada.ok("group", "create", "planners")
    ada.ok("group", "add", "planners", "--role", "planner")
    assert "planners" in ada.ok("group", "list")
    assert re.search("(?i)sent|msg_", ada.ok("send", "to the team", "--to", "@test-team"))
    assert "to the team" in fresh.bob.ok("inbox", "--unread")


def test_groups_to_the_end(fresh):
    ada = fresh.ada
    ada.ok("group", "create", "chain", "--description", "for a while")
    ada.ok("group", "add", "chain", "@bob")
    assert "for a while" in ada.ok("group", "info", "chain")
    assert ada.json("group", "members", "chain", "--expand")["expanded"] == ["bob"]
    assert ada.ok("group", "remove", "chain", "@bob") == "✓ Removed @bob from chain\n"
    assert ada.ok("group", "delete", "chain") == "✓ Group deleted: chain\n"
    assert "chain" not in ada.ok("group", "list")


def test_groups_without_identity(team):
    """`list`, `info` and `members` need none; the others say who is missing."""
    nobody = team.ada.worktree(f"nobody{team.seq()}")
    nobody.ok("setup")
    for words in ("group list", "group info staff", "group members everyone --expand", "agent list", "session list", "ping @ada",
                  "purge --before 400d"):
        nobody.ok(*words.split())
    for words in ("group create x1", "group add staff @ada", "group remove staff @ada", "group delete staff"):
        assert "no agent identities registered" in error_line(nobody.run(*words.split())), words


# ---- 12.1: context

def test_context(fresh):
    """From stdin and from files, shown with its frame or raw, cleared; the preamble stays."""
    ada, path = fresh.ada, fresh.ada.path / ".thrum/context/ada.md"
    text = "# Where I am\n\nümläut `code`\n"
    size = len(text.encode())
    assert ada.ok("context", "save", input=text) == f"Context saved for ada ({size} bytes)\n" and path.read_bytes() == text.encode()
    shown = ada.ok("context", "show")
    assert re.match(rf"# Context for ada \({size} bytes, updated .*\)\n\n", shown) and text in shown
    assert text in ada.ok("context", "load")
    raw = ada.ok("context", "show", "--raw")
    assert raw.startswith("<!-- preamble: .thrum/context/ada_preamble.md -->\n") and "<!-- end preamble -->" in raw and raw.endswith(text)
    assert "# Context for" not in raw
    assert ada.ok("context", "show", "--raw", "--no-preamble") == text
    (ada.path / "sub").mkdir(exist_ok=True)
    (ada.path / "sub" / "n.md").write_text("from a file")
    assert ada.ok("context", "save", "--file", "n.md", cwd=ada.path / "sub") == "Context saved for ada (11 bytes)\n"
    shutil.rmtree(ada.path / "sub")
    for _ in range(2):
        assert ada.ok("context", "clear") == "Context cleared for ada\n"
    assert "No context saved for ada" in ada.ok("context", "show", "--no-preamble")
    assert (ada.path / ".thrum/context/ada_preamble.md").exists()


def test_context_preamble(fresh):
    ada = fresh.ada
    note_path = note(fresh)
    assert ada.ok("context", "preamble", "--file", note_path) == "Preamble saved for ada (7 bytes)\n"
    assert ada.ok("context", "preamble") == "# Note\n"
    assert re.match(r"Preamble saved for ada \(\d+ bytes\)\n", ada.ok("context", "preamble", "--init", "--file", note_path)), "--init wins"
    assert ada.ok("context", "preamble") != "# Note\n"
    other = "No preamble for somebody (use --init to create default)"
    assert other in ada.ok("context", "preamble", "--agent", "somebody")


def test_context_of_another(team):
    """--agent replaces the caller, who then need not be anybody; no name is a path."""
    nobody = team.ada.worktree(f"ctx{team.seq()}")
    nobody.ok("setup")
    assert nobody.ok("context", "save", "--agent", "elsewhere", input="x") == "Context saved for elsewhere (1 bytes)\n"
    assert "x" in nobody.ok("context", "show", "--agent", "elsewhere")
    for name in ("../up", "/abs", "a/b", ".."):
        error_line(nobody.run("context", "save", "--agent", name, input="x"))
    assert not (nobody.path / ".thrum/up.md").exists()


# ---- 20: the rest

def test_nothing_of_thrum_is_in_the_environment():
    assert not [name for name in CLEAN if name.startswith("THRUM_")]


def test_both_checkouts(team):
    """20 #9 - #11."""
    assert (team.ada.path / ".thrum/identities").is_dir() and (team.bob.path / ".git").is_file()
    assert (team.bob.path / ".thrum/redirect").read_text().strip() == str(team.ada.path / ".thrum")
    for repo, name, role in ((team.ada, "ada", "planner"), (team.bob, "bob", "implementer")):
        assert repo.json("agent", "whoami", env={"THRUM_NAME": name})["agent_id"] == name
        assert role in repo.ok("status")


def test_the_daemon_goes_and_comes(make_repo):
    """20 #16 - #20."""
    repo = make_repo()
    repo.ok("init")
    pid = repo.pid()
    repo.ok("daemon", "stop")
    assert gone(pid) and re.search("not running|stopped", repo.run("daemon", "status").stdout)
    away = "/"
    out = script(repo, "--repo", str(repo.path), "daemon", "start", cwd=away, check=0).stdout
    assert re.search("(?i)start|running", out) and "running" in repo.ok("daemon", "status")
    status = repo.json("daemon", "status")
    assert isinstance(status["pid"], int) and re.match("running|healthy|ok", status["status"])
    done = repo.run("daemon", "start", check=1)
    assert re.search("already running|already started", done.stderr)
    repo.ok("daemon", "restart")
    assert repo.json("daemon", "status")["pid"] != status["pid"]
