"""Help: every row of the tables, of today and to come, on one screen and with an example that works."""

import shlex

import pytest

import thrum
from team import error_line, raw_in, shown

ROWS = {**thrum.COMMANDS, **thrum.HERE}
NAMES = [name for name, row in ROWS.items() if row.help]
TOPS = sorted({name.split(" ")[0] for name in NAMES})
GROUPS = [name for name in TOPS if name not in ROWS]
LINES, COLUMNS = 24, 80         # a screen
HIDDEN = {"complete", "daemon run", "guard message"}
# The last words of commands that change something; a command with another one only reads or tells.
CHANGING = {"add", "archive", "claim", "cleanup", "clear", "create", "delete", "edit", "end", "heartbeat", "init", "install", "migrate",
            "preamble", "purge", "quickstart", "read", "register", "release", "remove", "reply", "restart", "run", "save", "send", "set",
            "set-intent", "set-task", "setup", "start", "stop", "subscribe", "sync", "unset", "unsubscribe", "update", "worktree"}


@pytest.mark.parametrize("name", [*NAMES, *GROUPS, ""])
def test_help_fits_a_screen(name, capfd):
    """Each way to ask gives the same text: usage and example on stdout, within 24 lines of 80 columns."""
    words = name.split()
    ways = [["help", *words], [*words, "--help"], [*words[:1], "--help", *words[1:]], [*words, "-h"]]
    if name not in ROWS:
        ways.append(words)
    texts = {shown(capfd, *argv) for argv in ways}
    assert len(texts) == 1
    text = texts.pop()
    assert text.count("\n") <= LINES and text.endswith("\n") and not raw_in(text), text
    assert "Usage: thrum" in text and text.count("\nExample: thrum ") == 1
    assert not [line for line in text.splitlines() if len(line) > COLUMNS], text


@pytest.mark.parametrize("name", NAMES)
def test_examples_are_commands(name):
    """The example in a help text is a command line that leads to its row and that the row accepts."""
    line = thrum.help_text(name, ROWS[name]).rpartition("Example: ")[2].strip()
    program, *words = shlex.split(line)
    found, rest = thrum.split_command(words, ROWS)
    assert program == "thrum" and ROWS[found] is ROWS[name], line
    assert not thrum.parse_command(ROWS[name], rest).help


@pytest.mark.parametrize("name", NAMES)
def test_everything_is_explained(name):
    """The row has a sentence, and each of its words and flags, and each global flag, is in its help."""
    row = ROWS[name]
    assert row.help.endswith(".") and row.help[0].isupper()
    lines = thrum.help_text(name, row).splitlines()
    for argument in row.arguments:
        assert argument.help, argument.name
        line = next(line for line in lines if f" {argument.name} " in line.replace(",", " ") and line.startswith("  "))
        assert argument.help.split()[0] in line
    assert all(flag.name in lines[-3] + lines[-4] for flag in thrum.GLOBAL_FLAGS), lines


def test_does_tells_the_truth():
    """Whether a row changes something is what somebody goes by who decides what an agent may call."""
    assert {name for name, row in ROWS.items() if not row.help} == HIDDEN
    for name, row in ROWS.items():
        if name not in HIDDEN:
            assert (name.split(" ")[-1] in CHANGING) == (row.does == "changes"), name


def test_the_overview_names_every_command(capfd):
    text = shown(capfd)
    words = text.replace("*", " ").split()
    for name in TOPS:
        assert name in words, name
    for name in GROUPS:
        assert f"{name}*" in text and name in thrum.GROUPS, name
    for name in thrum.FIRST:
        assert f"\n  {name} " in text
    assert not any(name.split()[-1] in words for name in HIDDEN if " " not in name)


def test_a_new_command_is_in_the_overview_without_being_placed(monkeypatch, capfd):
    row = thrum.HERE["version"]
    for name in ("brandnew", "fresh one", "fresh two"):
        monkeypatch.setitem(thrum.HERE, name, row)
    text = shown(capfd)
    assert "\n  More " in text and "brandnew" in text and "fresh*" in text
    assert "fresh one" in shown(capfd, "fresh")


def test_thirty_commands_fit(monkeypatch, capfd):
    """The overview stays on one screen with all the commands of this issue."""
    for name in ("search", "trace", "ping", "overview", "prime", "purge", "context save", "migrate", "team", "who-has", "claim",
                 "ask", "watch", "doctor", "sync on"):
        monkeypatch.setitem(thrum.COMMANDS, name, thrum.COMMANDS["status"])
    text = shown(capfd)
    assert text.count("\n") <= LINES and max(map(len, text.splitlines())) <= COLUMNS, text


def test_group_help_names_its_commands(capfd):
    for group in GROUPS:
        text = shown(capfd, group)
        assert text.startswith(thrum.GROUPS[group])
        for name in NAMES:
            if name.startswith(group + " "):
                assert f"\n  {name} " in text, name


def test_a_command_with_commands_of_its_own_says_so(capfd):
    assert "thrum sent show" in shown(capfd, "sent", "--help")
    assert "See also" not in shown(capfd, "inbox", "--help")


@pytest.mark.parametrize("line, text", [
    ("inbx", "unknown command \"inbx\" for \"thrum\"; did you mean 'inbox'? 'thrum help' lists them"),
    ("help sennd", "unknown command \"sennd\" for \"thrum\"; did you mean 'send' or 'sent'? 'thrum help' lists them"),
    ("agent lst", "unknown command \"lst\" for \"thrum agent\"; did you mean 'list'? 'thrum help agent' lists them"),
    ("help agent lst", "unknown command \"lst\" for \"thrum agent\"; did you mean 'list'? 'thrum help agent' lists them"),
    ("qqqq", "unknown command \"qqqq\" for \"thrum\"; 'thrum help' lists them"),
    ("help inbox nope", "unknown command \"inbox nope\" for \"thrum\""),
    ("complet", "unknown command \"complet\" for \"thrum\"; did you mean 'completion'?"),
])
def test_an_unknown_command_is_named_and_a_likely_one_too(repo, line, text):
    assert error_line(repo.run(*line.split())).startswith(text)


def test_a_long_unknown_word_costs_nothing():
    assert thrum.did_you_mean("x" * 1_000_000, TOPS) == ";"
    assert thrum.did_you_mean("", TOPS) == ";"
