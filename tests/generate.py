"""Histories for the tests, all from a seed: any events that daemons may have written, and large journals.

`history(seed)` gives events as dicts, in the order in which they happened, of several daemons with clocks that
differ.  `fill(journal, messages, agents)` writes a journal of any size at some 200,000 lines a second.
"""

import os
import random

import thrum

DAY = 86_400 * thrum.NS
START = thrum.ns_of("2026-03-01T08:00:00Z")
ROLES = ("planner", "implementer", "reviewer")
MODULES = ("core", "web", "docs")
WORDS = "parser lexer token tests green red merge rebase claim file line <b>&</b> naïve 漢字 \u2028 done".split(" ")
SHARES = (("direct", 0.6), ("group", 0.2), ("broadcast", 0.1), ("reply", 0.1))


def ulid(ns, number):
    """The ULID of a time and a number."""
    return thrum.crockford(ns // 1_000_000 << 80 | number, 26)


def go_stamp(ns):
    """A stamp as the reference writes it: trailing zeros trimmed, no fraction for a whole second."""
    text = thrum.stamp_of(ns)[:-1].rstrip("0")
    return text.rstrip(".") + "Z"


# ---- histories

class Daemon:
    """One daemon of a history: its id, how wrong its clock is, and what it has heard of."""

    def __init__(self, number, rng, rough):
        self.id = "d_" + thrum.hash32(f"host-{number}")[:12].lower()
        self.skew = rng.choice((0, 0, rng.randrange(-3600, 3600), rng.randrange(-2 * 86400, 2 * 86400))) * thrum.NS
        self.rough = rough and rng.random() < 0.5       # as the reference: a coarse clock, answers older than questions
        self.grain = rng.choice((1_000, thrum.NS)) if self.rough else 1
        self.last = 0
        self.sequence = 0
        self.agents = {}                                # agent id -> role, as far as this daemon knows

    def stamp(self, now, after):
        ns = now + self.skew
        if self.rough:
            return ns // self.grain * self.grain
        ns = max(ns, self.last + 1, after + 1)
        self.last = ns + (ns % 10 == 0)
        return self.last


class History:
    """Makes events at random; what each method leaves in `events` is well-formed and could have happened."""

    def __init__(self, seed, rough):
        self.rng = random.Random(seed)
        self.now = START
        self.events = []
        self.count = 0
        self.daemons = [Daemon(n, self.rng, rough) for n in range(self.rng.randrange(1, 4))]
        self.agents = {}        # agent id -> its daemon
        self.sessions, self.subscriptions = [], []     # [session id, agent id, ns, open]
        self.groups = []        # [group id, name, ns]
        self.messages = []      # [message id, author, ns, recipients, thread id]
        self.claims = []        # [claim id, agent id, ns, event ids of grant and renewals]

    def emit(self, daemon, kind, after=0, /, **fields):
        self.now += self.rng.choice((1, 1_000, thrum.NS, 60 * thrum.NS)) * self.rng.randrange(1, 50)
        self.count += 1
        daemon.sequence += 1
        ns = daemon.stamp(self.now, after)
        event = {name: value for name, value in fields.items() if value not in (None, "", [], False)
                 or name.rstrip("?") in thrum.EVENTS[kind].fields}
        event.update(type=kind, timestamp=go_stamp(ns) if daemon.rough else thrum.stamp_of(ns), v=1, origin_daemon=daemon.id,
                     sequence=daemon.sequence,
                     event_id="evt_" + ulid(min(self.now, ns + thrum.FENCE_AHEAD_S * thrum.NS), self.rng.getrandbits(79)))
        self.events.append(event)
        return event, ns

    def new_id(self, kind):
        return f"{kind}_{ulid(self.now, self.rng.getrandbits(79))}"

    def chance(self, share):
        return self.rng.random() < share

    def some(self, values, most):
        values = list(values)
        return sorted(self.rng.sample(values, min(len(values), self.rng.randrange(most + 1))))

    def text(self):
        return " ".join(self.rng.choice(WORDS) for _ in range(self.rng.randrange(1, 6)))

    # ---- one kind of event each

    def everyone(self, daemon):
        """What each daemon writes into an empty log, in the reference with one stamp for both."""
        _, ns = self.emit(daemon, "group.create", group_id="grp_everyone", name="everyone", created_by="system",
                          description="All agents")
        self.emit(daemon, "group.member.add", ns, group_id="grp_everyone", member_type="role", member_value="*",
                  added_by="system")

    def register(self):
        rng, daemon = self.rng, self.rng.choice(self.daemons)
        if self.agents and self.chance(0.35):
            agent = rng.choice(sorted(self.agents))     # again, perhaps in another role or on another machine
        elif self.chance(0.1):
            agent = "user:" + rng.choice(("dana", "eli"))
        else:
            agent = f"agent{len(self.agents)}" if self.chance(0.8) else f"agent:{rng.choice(ROLES)}:{rng.getrandbits(20)}"
        person = agent.startswith("user:")
        role = agent[5:] if person else rng.choice(ROLES)
        self.emit(daemon, "agent.register", agent_id=agent, kind="user" if person else "agent", role=role,
                  module="ui" if person else rng.choice(MODULES), name="" if ":" in agent else agent,
                  hostname="" if person else f"host-{daemon.id[2:5]}", display=rng.choice(("", "Dana", agent.upper())))
        self.agents[agent] = daemon
        daemon.agents[agent] = role

    def heard(self):
        """A daemon hears of everybody."""
        to = self.rng.choice(self.daemons)
        for other in self.daemons:
            to.agents.update(other.agents)

    def session(self):
        rng = self.rng
        opened = [s for s in self.sessions if s[3]]
        step = rng.random()
        if not opened or step < 0.4:
            agent = rng.choice(sorted(self.agents))
            session_id = self.new_id("ses")
            _, ns = self.emit(self.agents[agent], "agent.session.start", session_id=session_id, agent_id=agent)
            self.sessions.append([session_id, agent, ns, True])
            return
        session = rng.choice(opened)
        session_id, agent, start, _ = session
        daemon = self.agents[agent]
        if step < 0.6:
            self.emit(daemon, "agent.session.end", start, session_id=session_id, reason=rng.choice(("", "normal", "crash")))
            session[3] = self.chance(0.3)       # another daemon may end it once more
        elif step < 0.8 and not daemon.rough:       # the reference has no such event
            self.emit(daemon, "session.update", start, session_id=session_id, agent_id=agent, intent=self.text(),
                      **({"current_task": self.text()} if self.chance(0.5) else {}),
                      **({"scopes": self.pairs(), "refs": self.pairs()} if self.chance(0.5) else {}))
        elif step < 0.9 and not daemon.rough:
            own = [number for number, of in enumerate(self.subscriptions, 1) if of == session_id]
            if own and self.chance(0.4):
                self.emit(daemon, "subscription.remove", start, subscription_id=rng.choice(own), session_id=session_id)
            else:
                self.subscriptions.append(session_id)
                self.emit(daemon, "subscription.add", start, subscription_id=len(self.subscriptions), session_id=session_id,
                          agent_id=agent, scopes=self.pairs()[:1], mention=rng.choice(("", *ROLES)), all=self.chance(0.2),
                          topics=self.some(("agents", "claims"), 2))
        else:
            stamps = [thrum.stamp_of(self.now + self.rng.randrange(-DAY, DAY)) for _ in range(3)]
            self.emit(daemon, "agent.update", start, agent_id=agent, work_contexts=[{
                "session_id": session_id, "branch": rng.choice(("main", "lexer")), "git_updated_at": stamps[0],
                "uncommitted_files": self.some(("a.py", "b.py", "ü.py"), 3), "intent": self.text(),
                "intent_updated_at": stamps[1], "current_task": self.text(), "task_updated_at": stamps[2]}])

    def pairs(self):
        kinds = [(kind, value) for kind in ("module", "file") for value in ("core", "web", "a b")]
        return [{"type": kind, "value": value} for kind, value in self.some(kinds, 2)]

    def group(self):
        rng, daemon = self.rng, self.rng.choice(self.daemons)
        step = rng.random()
        if not self.groups or step < 0.25:
            name = f"team{rng.randrange(4)}"            # on two machines at once, the same name
            group_id = self.new_id("grp")
            _, ns = self.emit(daemon, "group.create", group_id=group_id, name=name, created_by="agent0", description=self.text())
            self.groups.append([group_id, name, ns])
            return
        group_id, name, created = rng.choice(self.groups)
        if step < 0.85:
            kind = rng.choice(("agent", "agent", "role", "group"))
            value = {"agent": rng.choice(sorted(self.agents)), "role": rng.choice((*ROLES, "*")),
                     "group": f"team{rng.randrange(4)}"}[kind]      # nested, now and then in a ring
            verb = "add" if self.chance(0.7) else "remove"
            self.emit(daemon, "group.member." + verb, created, group_id=group_id, member_type=kind, member_value=value,
                      **{"added_by" if verb == "add" else "removed_by": "agent0"})
        elif step < 0.95:
            fields = {"description": self.text()}
            if self.chance(0.5):
                fields = {"name": f"team{rng.randrange(4)}", **(fields if self.chance(0.5) else {})}
            self.emit(daemon, "group.update", created, group_id=group_id, fields=fields, updated_by="agent0")
        else:
            self.emit(daemon, "group.delete", created, group_id=group_id, deleted_by="agent0")

    def message(self):
        rng, author = self.rng, self.rng.choice(sorted(self.agents))
        daemon = self.agents[author]
        known = [agent for agent in sorted(daemon.agents) if agent != author]
        refs, scopes, listed, thread, after = [], self.pairs() if self.chance(0.3) else [], set(), "", 0
        kind = rng.choice(("direct", "direct", "group", "role", "broadcast", "reply", "thread"))
        if kind == "reply" and self.messages:
            parent = rng.choice(self.messages[-8:])
            refs.append({"type": "reply_to", "value": parent[0]})
            refs.append({"type": "mention", "value": parent[1]})
            listed, after = {parent[1]} & set(known), parent[2]
            # the parent's thread, that of a machine which knew of no other, or none at all
            thread = rng.choice((parent[4] or "thr_" + parent[0][4:], parent[4] or "thr_" + parent[0][4:], self.new_id("thr"), ""))
            parent[4] = parent[4] or thread
        elif kind == "thread" and self.messages:
            parent = rng.choice(self.messages[-8:])
            thread, after = parent[4] or "thr_" + parent[0][4:], parent[2]
            listed = set(self.some(known, 2))
            refs += [{"type": "mention", "value": agent} for agent in sorted(listed)]
        elif kind == "group":
            name = rng.choice(("everyone", *(f"team{n}" for n in range(4)), *ROLES))
            refs.append({"type": "group", "value": name})
            scopes.append({"type": "group", "value": name})
            listed = {agent for agent in known if name == "everyone" or daemon.agents[agent] == name or self.chance(0.3)}
        elif kind == "role":
            name = rng.choice(ROLES)
            refs.append({"type": "mention", "value": name})
            listed = {agent for agent in known if daemon.agents[agent] == name}
        elif kind == "direct" and known:
            listed = {rng.choice(known)}
            refs += [{"type": "mention", "value": agent[5:] if agent[:5] == "user:" else agent} for agent in sorted(listed)]
        else:
            listed = set(known)
        message_id = self.new_id("msg")
        body = {"format": rng.choice(("markdown", "plain")), "content": self.text()}
        if self.chance(0.1):
            body["structured"] = '{"ack":true}'
        _, ns = self.emit(daemon, "message.create", after, message_id=message_id, agent_id=author,
                          session_id=next((s[0] for s in self.sessions if s[1] == author), ""), body=body, thread_id=thread,
                          scopes=scopes, refs=refs, recipients=sorted(listed), send_key="k" if self.chance(0.05) else "")
        self.messages.append([message_id, author, ns, listed, thread])

    def about_message(self):
        rng = self.rng
        message_id, author, ns, listed, thread = rng.choice(self.messages)
        step = rng.random()
        if step < 0.7:
            reader = rng.choice(sorted(listed or self.agents)) if self.chance(0.9) else rng.choice(sorted(self.agents))
            self.emit(self.agents[reader], "message.receipt", ns, message_id=message_id, agent_id=reader,
                      receipt_type="read" if self.chance(0.8) else "seen")
            if self.chance(0.2) and not self.agents[reader].rough:      # the reference has no such event
                self.emit(self.agents[reader], "message.route", ns, message_ids=[message_id], agent_id=reader,
                          route=rng.choice(("wait", "inbox")))
        elif step < 0.85:
            self.emit(self.agents[author], "message.edit", ns, message_id=message_id, agent_id=author,
                      body={"format": "markdown", "content": self.text(), **({"structured": "[1]"} if self.chance(0.2) else {})})
        elif step < 0.95:
            self.emit(rng.choice(self.daemons), "message.delete", ns, message_id=message_id, reason=rng.choice(("", "obsolete")))
        else:
            self.emit(self.agents[author], "thread.create", ns, thread_id=thread or "thr_" + message_id[4:], title=self.text(),
                      created_by=author)

    def remove(self):
        rng, daemon = self.rng, self.rng.choice(self.daemons)
        if self.chance(0.3):
            chosen = self.rng.sample(self.messages, min(len(self.messages), self.rng.randrange(1, 5)))
            self.emit(daemon, "message.remove", message_ids=[message[0] for message in chosen], reason="archived")
        elif self.chance(0.6):
            self.emit(daemon, "agent.cleanup", agent_id=rng.choice(sorted(self.agents)), method="manual")
        else:
            cutoff = START + rng.randrange(max(1, self.now - START)) + rng.choice((0, 0, 30 * DAY))
            self.emit(daemon, "purge.executed", cutoff=thrum.stamp_of(cutoff))

    def claim(self):
        rng = self.rng
        step = rng.random()
        if not self.claims or step < 0.5:
            agent = rng.choice(sorted(self.agents))
            session = next((s for s in reversed(self.sessions) if s[1] == agent), ["", agent, 0])
            claim_id = self.new_id("clm")
            event, ns = self.emit(self.agents[agent], "claim.take", session[2], claim_id=claim_id, agent_id=agent, session_id=session[0],
                                  path=rng.choice(("src", "src/a.py", "src/*.py", "**/b.py", ".", "docs")), shared=self.chance(0.3),
                                  ttl_s=rng.randrange(1, 86_400), note=self.text() if self.chance(0.5) else "")
            self.claims.append([claim_id, agent, ns, [event["event_id"]]])
            return
        claim_id, agent, ns, renewals = rng.choice(self.claims)
        if step < 0.7:
            event, _ = self.emit(self.agents[agent], "claim.renew", ns, claim_id=claim_id, agent_id=agent, ttl_s=rng.randrange(1, 86_400),
                                 note=self.text())
            renewals.append(event["event_id"])
        elif step < 0.85:
            self.emit(rng.choice(self.daemons), "claim.lapse", ns, claim_id=claim_id, renewal=rng.choice(renewals))
        else:
            self.emit(self.agents[agent], "claim.release", ns, claim_id=claim_id, reason=rng.choice(("released", "expired", "lost")))

    def unknown(self):
        event, _ = self.emit(self.rng.choice(self.daemons), "thread.create", thread_id="thr_x", title="x")
        event["type"] = "lock.granted"
        event["paths"] = ["src/**"]


def history(seed, events=60, rough=None, removals=True, renames=True):
    """Events in the order in which they happened.  `rough` puts daemons among them whose clocks tick coarsely and who
    stamp answers before questions (by default every fourth seed); without `removals` nothing is cleaned up or purged.
    """
    made = History(seed, seed % 4 == 3 if rough is None else rough)
    for daemon in made.daemons:
        made.everyone(daemon)
    for _ in range(3):
        made.register()
    steps = ([made.register] * 2 + [made.heard] + [made.session] * 3 + [made.group] * 4 + [made.message] * 8
             + [made.about_message] * 7 + [made.unknown] + [made.claim] * 4)
    while len(made.events) < events:
        step = made.remove if removals and made.chance(0.02) else made.rng.choice(steps)
        if step != made.about_message or made.messages:
            step()
    if not renames:
        made.events = [event for event in made.events if "name" not in event.get("fields", ())]
    return made.events


# ---- large journals

def places_in(path, files=True):
    """Places below a directory without git; with `files`, also the folders of the branch."""
    path = str(path)
    places = thrum.Places(path, path + "/.thrum", path + "/.git")
    os.makedirs(places.var, mode=0o700, exist_ok=True)
    if files:
        os.makedirs(places.sync + "/messages", exist_ok=True)
    return places


def large_log(messages, agents=50, seed=0, unread=0.08, daemon="d_generated000"):
    """The canonical lines of a log of that many messages, in order, as text: everybody registered and at work, then
    60 % direct messages, 20 % to groups of five, 10 % to everybody, 10 % replies; a share `unread` of the deliveries
    has no receipt.
    """
    rng = random.Random(seed)
    draw = rng.random
    names = [f"agent{n:03}" for n in range(agents)]
    teams = [sorted(rng.sample(names, min(5, agents))) for _ in range(max(1, agents // 5))]
    others = {name: [other for other in names if other != name] for name in names}
    quoted = {name: ",".join(f'"{other}"' for other in others[name]) for name in names}
    counter, ns, tail = 0, thrum.ns_of("2025-01-01T00:00:00Z") + 1, ""

    def tick(step=1_000_000):
        """The id of the next event, a step later; `tail` is what its line says of its place."""
        nonlocal counter, ns, tail
        counter += 1
        ns += step
        tail = f'"sequence":{counter},'
        return f"{thrum.crockford(ns // 1_000_000, 10)}{counter:016d}"

    sessions = {}
    for number, name in enumerate(names):
        role = ROLES[number % 3]
        ident = tick()
        yield (f'{{"agent_id":"{name}","event_id":"evt_{ident}","hostname":"host","kind":"agent","module":"core","name":"{name}",'
               f'"origin_daemon":"{daemon}","role":"{role}",{tail}"timestamp":"{thrum.stamp_of(ns)}","type":"agent.register","v":1}}')
        ident = tick()
        sessions[name] = "ses_" + ident
        yield (f'{{"agent_id":"{name}","event_id":"evt_{ident}","origin_daemon":"{daemon}",{tail}"session_id":"ses_{ident}",'
               f'"timestamp":"{thrum.stamp_of(ns)}","type":"agent.session.start","v":1}}')
    for number, team in enumerate(teams):
        ident = tick()
        yield (f'{{"created_by":"{names[0]}","event_id":"evt_{ident}","group_id":"grp_team{number}","name":"team{number}",'
               f'"origin_daemon":"{daemon}",{tail}"timestamp":"{thrum.stamp_of(ns)}","type":"group.create","v":1}}')
        for name in team:
            ident = tick()
            yield (f'{{"added_by":"{names[0]}","event_id":"evt_{ident}","group_id":"grp_team{number}","member_type":"agent",'
                   f'"member_value":"{name}","origin_daemon":"{daemon}",{tail}"timestamp":"{thrum.stamp_of(ns)}",'
                   '"type":"group.member.add","v":1}')
    recent = []
    for number in range(messages):
        author = names[int(draw() * agents)]
        kind = draw()
        thread = scopes = refs = ""
        if kind < 0.1 and recent:
            parent, to, root = recent[int(draw() * len(recent))]
            to = to if to != author else others[author][0]
            thread, reading = f'"thread_id":"thr_{root}",', (to,)
            refs = f'"refs":[{{"type":"mention","value":"{to}"}},{{"type":"reply_to","value":"msg_{parent}"}}],'
        elif kind < 0.2:
            root, reading = "", others[author]
        elif kind < 0.4:
            team = int(draw() * len(teams))
            root, reading = "", [name for name in teams[team] if name != author]
            scopes = f'"scopes":[{{"type":"group","value":"team{team}"}}],'
            refs = f'"refs":[{{"type":"group","value":"team{team}"}}],'
        else:
            reading = (others[author][int(draw() * (agents - 1))],) if agents > 1 else ()
            root = ""
            refs = f'"refs":[{{"type":"mention","value":"{reading[0]}"}}],' if reading else ""
        ident = tick(thrum.NS)
        listed = quoted[author] if reading is others[author] else ",".join([f'"{name}"' for name in reading])
        recipients = f'"recipients":[{listed}],' if listed else ""
        yield (f'{{"agent_id":"{author}","body":{{"content":"Message {number} of {author}: the parser is green and the lexer waits '
               f'for review","format":"markdown"}},"event_id":"evt_{ident}","message_id":"msg_{ident}","origin_daemon":"{daemon}",'
               f'{recipients}{refs}{scopes}{tail}"session_id":"{sessions[author]}",{thread}"timestamp":"{thrum.stamp_of(ns)}",'
               '"type":"message.create","v":1}')
        recent.append((ident, author, root or ident))
        if len(recent) > 64:
            del recent[:32]
        for name in reading:
            if draw() >= unread:
                ident2 = tick(10_000)
                yield (f'{{"agent_id":"{name}","event_id":"evt_{ident2}","message_id":"msg_{ident}","origin_daemon":"{daemon}",'
                       f'"receipt_type":"read",{tail}"session_id":"{sessions[name]}","timestamp":"{thrum.stamp_of(ns)}",'
                       '"type":"message.receipt","v":1}')


def fill(journal, messages, agents=50, seed=0, unread=0.08):
    """Write a journal of so many messages; how many events it holds.

    `journal` is its directory, or Places, whose daemon then gets the id that all events carry.  With `unread` 1 there
    are no receipts, which otherwise are six of seven lines.
    """
    daemon = "d_generated000"
    if isinstance(journal, thrum.Places):
        os.makedirs(journal.var, mode=0o700, exist_ok=True)
        with open(journal.var + "/daemon.json", "w") as file:
            file.write(f'{{"daemon_id":"{daemon}"}}\n')
        journal = journal.journal
    journal = str(journal)
    os.makedirs(journal, mode=0o700, exist_ok=True)
    assert not os.listdir(journal), "fill makes a journal, it does not go on with one"
    epoch, first, file, size = f"{seed:016x}", 1, None, thrum.JOURNAL_FILE_MAX + 1
    number = 0
    for line in large_log(messages, agents, seed, unread, daemon):
        if size > thrum.JOURNAL_FILE_MAX:
            if file:
                file.close()
            first = number + 1
            header = f'{{"epoch":"{epoch}","first":{first},"v":1}}\n'
            file = open(f"{journal}/{first}.jsonl", "w", encoding="ascii", newline="\n")
            file.write(header)
            size = len(header)
        number += 1
        size += len(line) + 1
        file.write(line)
        file.write("\n")
    if file:
        file.close()
    return number


# ---- what a store answers

def _clean(store, row, *without):
    """A row without the numbers of this database."""
    row = {key: value for key, value in row.items() if key not in ("seq", "agent", "wide", "last_seen_at", *without)}
    if "delivered" in row:
        row["delivered"] = store.agent_ids(thrum._keys(row["delivered"]))
    return row


def answers(store, events):
    """All that a store says of the agents, sessions, groups, threads and messages in `events`, comparable between stores.

    Lists that may hold equal times are put in the order of (time, id).
    """
    def in_order(messages):
        assert [m["at"] for m in messages] == sorted((m["at"] for m in messages), reverse=True), "not newest first"
        return sorted((m["at"], m["message_id"], m["is_read"]) if "is_read" in m else (m["at"], m["message_id"]) for m in messages)

    agents = sorted({event["agent_id"] for event in events if "agent_id" in event} | {"nobody"})
    found = {"agents": [_clean(store, row, "inbox_total", "inbox_unread", "removed_at") for row in store.agents()],
             "roles": sorted(store.roles()), "groups": {}, "messages": {}, "threads": {}, "cutoff": store.meta("purge_cutoff", 0)}
    found["agents"].sort(key=lambda row: row["agent_id"])
    # When a claim expires is this machine's affair.
    found["claims"] = [_clean(store, row, "expires_at") for row in store.claims()]
    found["claim rows"] = {event["claim_id"]: row and _clean(store, row, "expires_at") for event in events if event["type"] == "claim.take"
                           for row in [store.claim(event["claim_id"])]}
    for agent in agents:
        inbox = store.page(receiver=agent, limit=10_000)
        unread = store.page(receiver=agent, unread=True, limit=10_000)
        sent = store.outbox(agent, limit=10_000)
        found[agent] = {
            "inbox": in_order(inbox["messages"]), "total": inbox["total"], "unread": inbox["unread"],
            "unread list": in_order(unread["messages"]), "unread total": (unread["total"], unread["unread"]),
            "sent": in_order(sent["messages"]), "sent total": sent["total"],
            "sent unread": in_order(store.outbox(agent, unread=True, limit=10_000)["messages"]),
            "sessions": sorted((_clean(store, row) for row in store.sessions(agent)), key=lambda row: row["session_id"]),
            "open": (store.open_session(agent) or {}).get("started_at"),
            "newest intent": (store.newest_intent(agent) or {}).get("intent"),
            "mention": store.agent_ids(store.expand("mention", agent))}
    for group in sorted({e["name"] for e in events if e["type"] == "group.create"} | set(ROLES)):
        row = store.group(group)
        found["groups"][group] = {
            "row": row and _clean(store, row), "members": [_clean(store, member) for member in store.group_members(group)],
            "behind": store.agent_ids(store.expand("group", group))}
    found["groups"]["all"] = [_clean(store, row) for row in store.groups()]
    for event in events:
        if event["type"] == "message.create":
            row = store.message(event["message_id"])
            if row:
                found["messages"][event["message_id"]] = {
                    **_clean(store, row), "edits": store.edits(row["seq"]), "recipients": store.recipients(row)}
        elif event["type"] == "agent.session.start":
            row, pairs = store.work_context(event["session_id"]), store.session_pairs(event["session_id"])
            found[event["session_id"]] = (row and _clean(store, row), tuple(map(sorted, pairs)))
    for thread in {event["thread_id"] for event in events if event.get("thread_id")}:
        row = store.row("select * from threads where thread_id = ?", thread)
        page = store.page(thread_id=thread, limit=10_000)
        found["threads"][thread] = (store.thread(thread), in_order(page["messages"]), store.newest_in(store.thread(thread)), row)
    return found


def difference(one, two, path=""):
    """Where two answers differ, in a line or two; "" when they agree."""
    if isinstance(one, dict) and isinstance(two, dict):
        for key in sorted({*one, *two}, key=str):
            if key not in one or key not in two:
                return f"{path}/{key}: only in the {'second' if key in two else 'first'}: {one.get(key, two.get(key))!r}"[:600]
            if one[key] != two[key]:
                return difference(one[key], two[key], f"{path}/{key}")
    return "" if one == two else f"{path}: {one!r}\n   against {two!r}"[:1200]
