"""Settings: one table, where their values come from, and the four commands that show and change them."""

import json
import os
import re
import subprocess

import pytest

import thrum
from conftest import THRUM
from shapes import shaped
from team import POISON, error_line, finish, one_document, raw_in, start

SOURCE = ("config.json", "env", "default")
SHOWN = {"value": str, "source": SOURCE}
SHAPE = {"config_file": str, "runtime": {"primary": str, "source": ("config.json", "auto-detected", "default"), "detected?": [str]},
         "daemon": {"local_only": SHOWN, "sync_interval": SHOWN, "ws_port": SHOWN, "status": str, "pid?": int, "socket?": str},
         "identity": {"agent?": str, "role?": str, "module?": str, "file?": str}, "overrides?": [{"env_var": str, "value": str}],
         "settings": [{"key": str, **SHOWN}], "unknown?": [str]}
QUIET = {"THRUM_AUTOSTART": "0"}


@pytest.fixture
def repo(make_repo):
    """A repository with an installation, but without a daemon: these commands need none."""
    repo = make_repo()
    thrum.initialize(str(repo.path))
    return repo


def config_of(repo):
    return json.loads((repo.path / ".thrum/config.json").read_text())


def write(repo, value):
    (repo.path / ".thrum/config.json").write_text(value if isinstance(value, str) else json.dumps(value))


# ---------------------------------------------------------------- the table

def test_the_table_is_complete():
    """Each setting has a help line, a default that it may have, and a variable that is documented."""
    for name, setting in thrum.SETTINGS.items():
        assert setting.help and setting.help[0].islower() and not setting.help.endswith("."), name
        assert setting.default == "" or thrum._fits(setting, setting.default), name
        assert not setting.variable or setting.variable in thrum.ENVIRONMENT, name
        assert not any(other.startswith(name + ".") for other in thrum.SETTINGS), name


def test_a_setting_that_is_read_is_not_called_ineffective():
    """`later` says that nothing reads a setting: the first line that does has to take it away."""
    text = THRUM.read_text()
    for name, setting in thrum.SETTINGS.items():
        read = re.search(rf'(get_setting|setting_in_effect)\([^\n]*"{re.escape(name)}"', text)
        assert bool(read) != setting.later, name


def test_the_daemon_gets_the_variables_of_its_settings(repo, monkeypatch):
    """Identity is the caller's and stays behind; what the daemon is to do goes with it."""
    class Seen(Exception):
        pass

    def popen(*args, env, **more):
        raise Seen(env)
    monkeypatch.setattr(subprocess, "Popen", popen)
    for name in thrum.ENVIRONMENT:
        monkeypatch.setenv(name, "1")
    with pytest.raises(Seen) as seen:
        thrum.start_daemon(thrum.find_places(str(repo.path)))
    passed = {name for name in seen.value.args[0] if name.startswith("THRUM_")}
    assert passed == {"THRUM_HOSTNAME", "THRUM_LOCAL", "THRUM_SYNC_INTERVAL", "THRUM_WS_PORT", "THRUM_WS_ECHO"}


@pytest.mark.parametrize("name, text, value", [
    *[("daemon.local_only", text, value) for text, value in (
        ("true", True), ("1", True), ("yes", True), ("YES", True), ("false", False), ("0", False), ("no", False), (" No ", False))],
    ("daemon.sync_interval", "30", 30), ("daemon.sync_interval", "30s", 30), ("daemon.sync_interval", "5m", 300),
    ("daemon.sync_interval", "1h30m", 5400), ("daemon.sync_interval", "86400", 86400), ("daemon.ws_port", "auto", "auto"),
    ("daemon.ws_port", "9999", "9999"), ("daemon.ws_port", "65535", "65535"), ("wake.max_hops", "3", 3),
    ("backup.retention.daily", "-1", -1), ("backup.schedule", "24h", "24h"), ("runtime.primary", "codex", "codex"),
    ("backup.dir", "/a b/ü", "/a b/ü"), ("daemon.ws_token", "s3cret!", "s3cret!")])
def test_texts_become_values(name, text, value):
    found = thrum.parse_setting(name, text)
    assert found == value and type(found) is type(value)


@pytest.mark.parametrize("name, text", [
    *[("daemon.local_only", text) for text in ("", "on", "2", "tru", "None", "[]", "\x1b[2J")],
    *[("daemon.sync_interval", text) for text in ("", "0", "-5", "86401", "1.5s", "1d", "ten", "1_0", "٣", "9" * 5000, "true", "1e3", "s")],
    *[("daemon.ws_port", text) for text in ("", "0", "65536", "-1", "Auto", "80 ", "٣٣٣", "http", "99999999")[:5]],
    *[("wake.max_hops", text) for text in ("", "0", "1001", "x", "--5", "5 5")], ("backup.retention.daily", "-2"),
    *[("backup.schedule", text) for text in ("", "never", "0", "-1h", "9999999h", "off")],
    *[("daemon.ws_token", text) for text in ("", "a b", "ü", "x" * 5000)], ("runtime.primary", "a\nb"), ("runtime.primary", "\udc80"),
])
def test_other_texts_are_refused_with_what_is_possible(name, text):
    with pytest.raises(thrum.ThrumError, match=f"^{name} must be "):
        thrum.parse_setting(name, text)


def test_where_a_value_comes_from():
    """The variable beats the file, the file the default; a top-level local_only counts where the proper one is absent."""
    def effect(config, environ=None, name="daemon.local_only"):
        return thrum.setting_in_effect(config, name, environ or {})
    assert effect({}) == (False, "default") and effect({"local_only": True}) == (True, "config.json")
    assert effect({"local_only": True, "daemon": {"local_only": False}}) == (False, "config.json")
    for text, value in (("1", True), ("true", True), ("0", False), ("false", False)):
        assert effect({"daemon": {"local_only": not value}}, {"THRUM_LOCAL": text}) == (value, "env")
    assert effect({"local_only": True}, {"THRUM_LOCAL": " "}) == (True, "config.json")
    assert effect({}, {"THRUM_SYNC_INTERVAL": "90"}, "daemon.sync_interval") == (90, "env")
    assert effect({"daemon": {"ws_port": "1"}}, {"THRUM_WS_PORT": "2"}, "daemon.ws_port") == ("2", "env")
    assert effect({"backup": {"retention": {"daily": None}}}, {}, "backup.retention.daily") == (5, "default")
    reference = {"daemon": {"sync_interval": 0, "ws_port": ""}, "runtime": {"primary": ""}, "backup": {"schedule": ""}}
    for name in ("daemon.sync_interval", "daemon.ws_port", "runtime.primary", "backup.schedule"):
        assert effect(reference, {}, name) == (thrum.SETTINGS[name].default, "default"), name
    assert thrum._check_config(reference, "") is reference
    with pytest.raises(thrum.ThrumError, match="^THRUM_WS_PORT must be auto, or a port from 1 to 65,535, not 'x'"):
        effect({}, {"THRUM_WS_PORT": "x"}, "daemon.ws_port")


WRONG = [
    ({"local_only": "yes"}, "local_only"), ({"daemon": {"sync_interval": -1}}, "daemon.sync_interval"),
    ({"daemon": {"sync_interval": False}}, "daemon.sync_interval"),
    ({"wake": "x"}, "wake must be an object"),
    ({"daemon": {"ws_port": 9999}}, "daemon.ws_port must be auto, or a port from 1 to 65,535, in quotes, not 9999"),
    ({"backup": {"retention": 5}}, "backup.retention must be an object, not 5"),
    ({"backup": {"retention": {"daily": [1]}}}, "backup.retention.daily must be .* a list"),
    ({"daemon": {"ws_token": 12345}}, "daemon.ws_token must be .*, not what it is"),
    ({"runtime": {"primary": {"a": 1}}}, "runtime.primary"),
    ({"daemon": {"local_only": "z" * 9000}}, "daemon.local_only"),
]


def test_a_wrong_file_is_named_with_its_key(repo):
    """Every command that reads it says so in one line; what may be corrected by a command is."""
    for config, key in WRONG:
        write(repo, config)
        for words in (["config", "show"], ["config", "get", "wake.max_hops"], ["config", "set", "peers.plaintext", "yes"]):
            text = error_line(repo.run(*words))
            assert re.search(key, text) and "config.json: " in text, (config, words)
        assert config_of(repo) == config


# ---------------------------------------------------------------- show

def test_show_without_a_daemon(repo):
    found = repo.json("config", "show")
    shaped(found, SHAPE)
    assert found["config_file"] == str(repo.path / ".thrum/config.json") and found["identity"] == {} and found["overrides"] == []
    assert found["daemon"] == {"local_only": {"value": "true", "source": "config.json"},
                               "sync_interval": {"value": "60s", "source": "config.json"},
                               "ws_port": {"value": "auto", "source": "config.json"}, "status": "not running"}
    assert found["runtime"] == {"primary": "cli-only", "source": "default"} and "unknown" not in found
    (repo.path / ".thrum/config.json").unlink()
    found = repo.json("config", "show")
    assert {entry["source"] for entry in found["settings"]} == {"default"}
    assert found["daemon"]["local_only"] == {"value": "false", "source": "default"}
    assert not (repo.var / "thrum.sock").exists(), "it started no daemon"


def test_show_with_a_daemon_an_identity_and_variables(make_repo):
    repo = make_repo()
    repo.join("ada", "planner")
    (repo.var / "ws.port").write_text("9999\n")
    env = {"THRUM_NAME": "ada", "THRUM_LOCAL": "0", "THRUM_SYNC_INTERVAL": "90", "THRUM_WS_PORT": "8080", "THRUM_MODULE": "x\x1b[2J"}
    found = repo.json("config", "show", env=env)
    shaped(found, SHAPE)
    assert found["daemon"] == {
        "local_only": {"value": "false", "source": "env"}, "sync_interval": {"value": "90s", "source": "env"},
        "ws_port": {"value": "9999 (active)", "source": "env"}, "status": f"running (PID {repo.pid()})", "pid": repo.pid(),
        "socket": str(repo.var / "thrum.sock")}
    assert found["identity"] == {"agent": "ada", "role": "planner", "module": "x\x1b[2J", "file": ".thrum/identities/ada.json"}
    assert {entry["env_var"]: entry["value"] for entry in found["overrides"]} == env
    text = repo.ok("config", "show", env=env)
    assert not raw_in(text)
    titles = ["Thrum Configuration", "Runtime", "Daemon", "Identity", "Overrides (environment)", "All settings"]
    places = [text.index(title) for title in titles]
    assert places == sorted(places)
    for label, value in (("Config file:", ".thrum/config.json"), ("Primary:", "cli-only (default)"), ("Local-only:", "false (env)"),
                         ("Sync interval:", "90s (env)"), ("WS port:", "9999 (active) (env)"), ("Status:", "running (PID"),
                         ("Socket:", "thrum.sock"), ("Agent:", "ada"), ("Role:", "planner"), ("File:", "ada.json"),
                         ("daemon.autostart", "true (default)"), ("wake.max_hops*", "12 (default)")):
        assert any(line.startswith(f"  {label} ") and value in line for line in text.splitlines()), label
    (repo.var / "ws.port").write_text("nonsense")
    assert repo.json("config", "show")["daemon"]["ws_port"]["value"] == "auto"


def test_show_explains_with_verbose_and_names_what_it_keeps(repo):
    write(repo, {"telegram": {"token": "123:secret"}, "daemon": {"mine": [1], "a.b": 1, POISON: 2}, "": 0, "x": {"y": {}}})
    text = repo.ok("config", "show")
    assert not raw_in(text) and "secret" not in text and "Kept, but not known to this version" in text
    assert repo.json("config", "show")["unknown"] == sorted([
        '""', "daemon." + json.dumps(POISON), 'daemon."a.b"', "daemon.mine", "telegram", "x"])
    wordy = repo.ok("config", "show", "--verbose")
    for setting in thrum.SETTINGS.values():
        assert setting.help not in " ".join(text.split()) and setting.help.split()[0] in wordy
    assert max(map(len, wordy[wordy.index("All settings"):wordy.index("Kept, but")].splitlines())) <= 80
    assert repo.ok("config", "show", "--quiet") == text and "\x1b" not in text


def test_an_identity_that_cannot_be_told_is_no_failure(repo):
    (repo.path / ".thrum/identities/x.json").write_text("{")
    assert "x.json is damaged" in repo.ok("config", "show") and repo.json("config", "show")["identity"] == {}


def test_in_a_linked_worktree_the_settings_are_those_of_the_repository(repo):
    other = repo.worktree("feature")
    other.ok("setup", command=repo.command())
    assert other.ok("config", "set", "wake.max_hops", "7").startswith("✓ wake.max_hops: 12 (default) → 7\n")
    assert config_of(repo)["wake"] == {"max_hops": 7} and not (other.path / ".thrum/config.json").exists()


# ---------------------------------------------------------------- get, set, unset

def test_get_set_and_unset(repo):
    before = config_of(repo)
    assert repo.ok("config", "get", "daemon.autostart") == "true\n"
    assert repo.json("config", "get", "daemon.autostart") == {"key": "daemon.autostart", "value": True, "source": "default"}
    assert repo.ok("config", "set", "daemon.autostart", "no") == "✓ daemon.autostart: true (default) → false\n"
    assert config_of(repo) == {**before, "daemon": {**before["daemon"], "autostart": False}}
    assert repo.json("config", "get", "daemon.autostart") == {"key": "daemon.autostart", "value": False, "source": "config.json"}
    assert repo.json("config", "get", "daemon.autostart", env={"THRUM_AUTOSTART": "1"})["source"] == "env"
    assert repo.ok("config", "set", "daemon.autostart", "0") == "✓ daemon.autostart is false already\n"
    assert repo.json("config", "set", "daemon.autostart", "yes") == {
        "key": "daemon.autostart", "old": False, "value": True, "restart": False}
    assert repo.ok("config", "unset", "daemon.autostart", "--quiet") == ""
    assert config_of(repo) == before
    assert repo.ok("config", "unset", "daemon.autostart") == "✓ daemon.autostart is true (default) already\n"
    assert repo.json("config", "set", "daemon.sync_interval", "2m")["value"] == 120
    assert repo.ok("config", "get", "daemon.sync_interval") == "120\n"
    repo.ok("config", "set", "--", "backup.retention.daily", "-1")
    assert config_of(repo)["backup"] == {"retention": {"daily": -1}}
    repo.ok("config", "unset", "backup.retention.daily")
    assert "backup" not in config_of(repo), "a section that is empty says nothing"
    done = repo.run("config", "set", "daemon.autostart", "no", env={"THRUM_AUTOSTART": "1"}, check=0)
    assert done.stderr == "Note: THRUM_AUTOSTART is set and counts, not the file\n"
    assert (repo.path / ".thrum/config.json").stat().st_mode & 0o777 == 0o600


def test_a_setting_has_its_effect(repo):
    """daemon.autostart: without it a command does not start the daemon; the variable beats it both ways."""
    repo.ok("config", "set", "daemon.autostart", "false")
    assert "'thrum daemon start' starts it" in error_line(repo.run("status"))
    assert "THRUM_AUTOSTART must be true or false, not 'maybe'" in error_line(repo.run("status", env={"THRUM_AUTOSTART": "maybe"}))
    assert "Daemon:    running" in repo.ok("status", env={"THRUM_AUTOSTART": "1"})
    repo.kill()
    repo.ok("config", "unset", "daemon.autostart")
    assert "'thrum daemon start' starts it" in error_line(repo.run("status", env=QUIET))
    assert "Daemon:    running" in repo.ok("status")


def test_what_needs_a_restart_says_so(repo, monkeypatch, capfd):
    monkeypatch.chdir(repo.path)
    monkeypatch.setitem(thrum.SETTINGS, "wake.max_hops", thrum.Setting(int, 12, "x", 1, 99, restart=True))

    def changed(value):
        assert thrum.main(["config", "set", "wake.max_hops", value]) == 0
        return capfd.readouterr().out
    assert changed("5") == "✓ wake.max_hops: 12 (default) → 5\n  The daemon reads it when it starts.\n"
    assert changed("5") == "✓ wake.max_hops is 5 already\n"
    repo.ok("daemon", "start")
    assert changed("6").endswith("'thrum daemon restart' applies it now.\n")
    assert thrum.main(["config", "set", "wake.max_hops", "7", "--json"]) == 0
    assert one_document(capfd.readouterr().out) == {"key": "wake.max_hops", "old": 6, "value": 7, "restart": True}


def test_a_setting_without_effect_says_so(repo):
    assert repo.ok("config", "set", "wake.max_hops", "5") == "✓ wake.max_hops: 12 (default) → 5\n  It has no effect in this version.\n"


def test_a_secret_is_never_printed_whole(repo):
    secret, other = "abcdefghijklmnopqrstuvwxyz", "short"
    outputs = []
    for words in (["set", "daemon.ws_token", secret], ["get", "daemon.ws_token"], ["get", "daemon.ws_token", "--json"], ["show"],
                  ["show", "--json"], ["set", "daemon.ws_token", other, "--json"], ["get", "daemon.ws_token"],
                  ["unset", "daemon.ws_token"]):
        outputs.append(repo.ok("config", *words))
    assert not [text for text in outputs if secret[:8] in text or other in text]
    assert outputs[1] == "abcd...\n" and outputs[6] == "...\n"
    assert secret not in error_line(repo.run("config", "set", "daemon.ws_token", secret + " x"))


REFUSED = [
    ("set daemon.autostrt 1", "unknown setting 'daemon.autostrt' for "), ("set local_only 1", "unknown setting 'local_only'"),
    ("set daemon 5", "unknown setting 'daemon'"), ("get nope", "unknown setting 'nope'"), ("unset nope", "unknown setting 'nope'"),
    ("get daemon", "'daemon' is a section of "), ("unset daemon", "'daemon' is a section of "), ("get .", "unknown setting '.'"),
    ("set daemon.autostart off", "daemon.autostart must be true or false, not 'off'"),
    ("set daemon.autostart", "accepts 2 arg(s), received 1"),
    ("get", "accepts 1 arg(s), received 0"), ("set \x1b[2J 1", "unknown setting"), (f"get {'k' * 5000}", "unknown setting"),
    (f"set wake.max_hops {'9' * 5000}", "wake.max_hops must be a whole number from 1 to 1,000, not "), ("set \udc80 1", "unknown setting"),
]


def test_what_is_refused_leaves_the_file(repo):
    before = (repo.path / ".thrum/config.json").read_bytes()
    for line, text in REFUSED:
        said = error_line(repo.run("config", *line.split()))
        assert said.startswith(text), line
        assert (repo.path / ".thrum/config.json").read_bytes() == before, line
        assert "autostrt" not in line or "did you mean 'daemon.autostart'" in said


def test_unknown_keys_are_kept_and_can_be_read_and_removed(repo):
    theirs = {"telegram": {"token": "123:secret", "allow_from": [1]}, "daemon": {"mine": "ü", "half": "\ud800"}, "x": 1e9, "y": None}
    write(repo, json.dumps(theirs))
    repo.ok("config", "set", "wake.max_hops", "5")
    assert config_of(repo) == {**theirs, "wake": {"max_hops": 5}}
    assert repo.json("config", "get", "daemon.mine") == {"key": "daemon.mine", "value": "ü", "source": "config.json"}
    assert repo.ok("config", "get", "telegram.allow_from") == "[1]\n" and "secret" not in repo.ok("config", "get", "telegram.token")
    assert repo.ok("config", "unset", "daemon.mine") == "✓ daemon.mine: ü → removed\n"
    del theirs["daemon"]["mine"]
    assert config_of(repo) == {**theirs, "wake": {"max_hops": 5}}


def test_the_old_place_of_local_only_is_moved(repo):
    """Where only the top level says it, that counts; a change writes the proper place and takes the other away."""
    write(repo, {"local_only": True, "x": 1})
    assert repo.json("config", "get", "daemon.local_only") == {"key": "daemon.local_only", "value": True, "source": "config.json"}
    assert repo.json("config", "set", "daemon.local_only", "false")["old"] is True
    assert config_of(repo) == {"daemon": {"local_only": False}, "x": 1}
    write(repo, {"local_only": True, "x": 1})
    repo.ok("config", "unset", "daemon.local_only")
    assert config_of(repo) == {"x": 1}


def test_a_wrong_value_can_be_corrected(repo):
    write(repo, {"daemon": {"sync_interval": "60"}, "x": 1})
    assert "'thrum config set' corrects it" in error_line(repo.run("config", "show"))
    assert repo.ok("config", "set", "daemon.sync_interval", "60").startswith("✓ daemon.sync_interval: 60s → 60s\n")
    assert config_of(repo) == {"daemon": {"sync_interval": 60}, "x": 1}
    write(repo, {"daemon": {"sync_interval": "60"}, "x": 1})
    repo.ok("config", "unset", "daemon.sync_interval")
    assert config_of(repo) == {"x": 1}


def test_a_file_that_is_no_object_is_named(repo):
    for content in ("", "[]", "{", '{"a": NaN}', '{"a":' * 100_000, "\0", '{"daemon": [' * 50 + "]}" * 50):
        write(repo, content)
        for words in (["show"], ["get", "daemon.autostart"], ["set", "daemon.autostart", "no"], ["unset", "daemon.autostart"]):
            assert "config.json" in error_line(repo.run("config", *words)), (content[:40], words)
        assert (repo.path / ".thrum/config.json").read_text() == content, content[:40]


def test_deep_nesting_is_kept_or_refused_but_never_a_crash(repo):
    for depth in (100, 900, 5000):
        content = '{"theirs":' + "[" * depth + "]" * depth + "}"
        write(repo, content)
        repo.run("config", "show")
        done = repo.run("config", "set", "wake.max_hops", "5")
        if done.returncode:
            assert "nested too deeply" in error_line(done) and (repo.path / ".thrum/config.json").read_text() == content
        else:
            assert '"max_hops": 5' in (repo.path / ".thrum/config.json").read_text()


def test_changes_that_come_at_once_are_all_kept(repo):
    names = {"wake.max_hops": "5", "peers.plaintext": "yes", "runtime.primary": "codex", "backup.dir": "/b", "backup.schedule": "24h",
             "backup.retention.daily": "1", "backup.retention.weekly": "2", "backup.retention.monthly": "3"}
    running = [start(repo, "config", "set", *item) for item in names.items()]
    assert [finish(process)[0] for process in running] == [0] * len(names)
    found = thrum.load_config(str(repo.path / ".thrum"))
    assert {name: str(thrum.get_setting(found, name)) for name in names} == {**names, "peers.plaintext": "True"}
    assert not [name for name in os.listdir(repo.path / ".thrum") if name.endswith(".tmp")]


def test_outside_of_an_installation(make_repo, tmp_path):
    bare = make_repo("bare")
    for words in (["show"], ["get", "wake.max_hops"], ["set", "wake.max_hops", "5"], ["unset", "wake.max_hops"]):
        assert "thrum is not initialized" in error_line(bare.run("config", *words))
    assert not (bare.path / ".thrum").exists()
