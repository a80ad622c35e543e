// The page of thrum: who is here, and what they say to each other, live.
//
// One WebSocket.  After each connect the page signs in, subscribes, and only then asks for what it lacks, so that nothing
// falls between; a push says that something has come, and the same question brings it.  `cursor` is the number in
// the daemon's journal up to which the page knows all messages; `epoch` names the journal that numbers come from.
// What others wrote becomes text nodes and nothing else.

const PAGE = 50;                    // messages at first, and for each "older"
const CATCH_UP = 100;               // messages in one answer: the daemon's own limit
const SHOWN_MAX = 500;              // messages kept in the document while nobody scrolls back; a gap larger than that begins anew
const RETRY_MS = 1000, RETRY_MAX_MS = 30000;
const HERE_MS = 5 * 60 * 1000;      // somebody heard of within that time is here
const TEAM_MS = 1000;               // at most one look at the team in that time: it asks git
const TEXT_LONG = 1500, LINES_LONG = 18;

const byId = (id) => document.getElementById(id);

/** An element with a class and children; texts become text nodes. */
function make(tag, name = "", ...children) {
  const element = document.createElement(tag);
  if (name) element.className = name;
  element.append(...children.filter((child) => child !== null && child !== ""));
  return element;
}

const shortName = (id) => id.replace(/^user:/, "");

/** The square with an initial by which one tells people apart; colour is never the only sign. */
function face(id) {
  let hash = 0;
  for (const letter of id) hash = (hash * 31 + letter.codePointAt(0)) >>> 0;
  const element = make("span", `face hue${hash % 12}`, [...shortName(id)][0] ?? "?");
  element.ariaHidden = "true";
  return element;
}

function ago(ms) {
  const minutes = Math.floor(ms / 60000);
  return minutes < 1 ? "now" : minutes < 60 ? `${minutes} min` : minutes < 1440 ? `${Math.floor(minutes / 60)} h` : `${Math.floor(minutes / 1440)} d`;
}

const CLOCK = new Intl.DateTimeFormat(undefined, {hour: "2-digit", minute: "2-digit"});
const DAY = new Intl.DateTimeFormat(undefined, {day: "numeric", month: "short", hour: "2-digit", minute: "2-digit"});
const WHOLE = new Intl.DateTimeFormat(undefined, {dateStyle: "full", timeStyle: "medium"});

function timeOf(stamp) {
  const date = new Date(stamp);
  const element = make("time", "", (date.toDateString() === new Date().toDateString() ? CLOCK : DAY).format(date));
  element.dateTime = stamp;
  element.title = WHOLE.format(date);
  return element;
}


// ---- the connection

class CallError extends Error {}    // the daemon said no
class LostError extends Error {}    // it could not be asked

const line = {socket: null, next: 1, pending: new Map(), tries: 0, timer: 0, due: 0};

function setState(state) {
  const element = byId("state");
  if (element.dataset.state !== state) {
    element.dataset.state = state;
    element.textContent = state;
  }
}

/** One line below the header; empty texts take it away. */
function notice(...parts) {
  byId("notice").replaceChildren(...parts);
  byId("notice").hidden = !parts.length;
}

function call(method, params = {}) {
  return new Promise((resolve, reject) => {
    if (line.socket?.readyState !== WebSocket.OPEN) return reject(new LostError("not connected"));
    line.pending.set(line.next, {resolve, reject});
    line.socket.send(JSON.stringify({jsonrpc: "2.0", id: line.next++, method, params}));
  });
}

function received(data) {
  const message = JSON.parse(data);
  if (message.method) return notified(message.method.replace(/^notification\./, ""), message.params);
  const waiting = line.pending.get(message.id);
  line.pending.delete(message.id);
  if (message.error) waiting?.reject(new CallError(message.error.message));
  else waiting?.resolve(message.result);
}

function connect() {
  clearTimeout(line.timer);
  line.timer = 0;
  setState("CONNECTING");
  const socket = line.socket = new WebSocket(`ws://${location.host}/ws`);
  let opened = false, problem = "";
  socket.onmessage = (event) => received(event.data);
  socket.onopen = async () => {
    opened = true;
    try {
      await begin();
      line.tries = 0;
      setState("CONNECTED");
    } catch (error) {
      problem = error instanceof LostError ? "" : error.message;
      socket.close();
    }
  };
  socket.onclose = async () => {
    for (const {reject} of line.pending.values()) reject(new LostError("connection lost"));
    line.pending.clear();
    setState("DISCONNECTED");
    const wait = Math.min(RETRY_MS * 2 ** line.tries++, RETRY_MAX_MS) * (1 + Math.random() / 4);
    line.timer = setTimeout(connect, wait);     // for ever: a page may stay open longer than its daemon
    line.due = Date.now() + wait;
    if (!opened && await refused()) problem = "token";
    sayWaiting(problem);
  };
}

/** Whether the daemon is there and wants a token: a page is not told why its WebSocket failed. */
async function refused() {
  try {
    return (await fetch("/health", {cache: "no-store"})).status === 401;
  } catch {
    return false;
  }
}

function sayWaiting(problem) {
  if (!line.timer) return;
  const again = make("button", "", "Try now"), left = make("span");
  const count = () => { left.textContent = `Next try in ${Math.max(1, Math.ceil((line.due - Date.now()) / 1000))} s.`; };
  again.type = "button";
  again.onclick = connect;
  left.ariaHidden = "true";         // a number that changes each second is not to be read aloud
  if (problem === "token") notice(make("span", "", "This daemon wants a token: run ", make("code", "", "thrum daemon status"), " for a link."));
  else notice(make("span", "", problem || "The daemon does not answer."), left, again);
  count();
  const ticking = setInterval(() => (line.timer && left.isConnected ? count() : clearInterval(ticking)), 1000);
}

/** Sign in, subscribe, and fetch what was missed. */
async function begin() {
  const hint = await signIn();
  await feed.resume();
  await team.refresh();             // last, for the daemon answers in turn and has to ask git
  notice(...hint);
}

async function signIn() {
  let who = {username: "guest", display: "Guest"}, me, hint = [];
  try {
    who = await call("user.identify");
  } catch (error) {
    if (error instanceof LostError) throw error;
    hint = [make("span", "", "You are here as “guest”: git knows no name. Run ", make("code", "", 'git config user.name "Your Name"'), ", then reload.")];
  }
  try {
    me = await call("user.register", {username: who.username, display: who.display});
  } catch (error) {
    if (error instanceof LostError || who.username === "guest") throw error;
    hint = [make("span", "", `You are here as “guest”: ${error.message}.`)];
    me = await call("user.register", {username: "guest", display: "Guest"});
  }
  byId("me").textContent = me.display_name || me.username;
  // A session is shared by all tabs of a person, and starting one ends the one before: so one tab at a time, and only where there is none.
  const share = () => subscribe(me.user_id);
  await (navigator.locks ? navigator.locks.request("thrum-sign-in", share) : share());
  return hint;
}

async function subscribe(userId) {
  for (let started = false; ;) {
    try {
      return await call("subscribe", {all: true, topics: ["*"]});
    } catch (error) {
      if (/already exists/.test(error.message)) return null;
      if (started || !/no active session/.test(error.message)) throw error;
      await call("session.start", {agent_id: userId});
      started = true;
    }
  }
}

/** A push.  Those of messages only wake the feed, which asks by number: so a burst is one question, and an order of arrival is none. */
function notified(what, params) {
  if (what === "message") feed.came(params);
  else if (what === "message.delete" || what === "message.remove") {
    feed.again(() => {
      feed.remove(params.message_ids ?? [params.message_id]);
      return feed.recount();
    }).catch(report);
  } else if (what === "purge.executed" || what === "agent.cleanup") feed.again(() => feed.reload()).catch(report);
  else if (what === "presence") team.heardOf(params.agent_id, params.last_seen_at);
  if (/^(agent|session|claim)\.|^work$/.test(what)) team.changed();
}


// ---- the messages

const feed = {
  shown: new Map(),                 // message id -> {message, node}
  epoch: "", cursor: 0,
  horizon: "",                      // from this time on nothing is missing; what is older was pushed, or loaded, alone
  work: Promise.resolve(),          // one question at a time, so that a cursor never goes back
  waiting: false,

  /** Do one thing after the other; a lost connection ends it, and the next one asks anew. */
  again(task) {
    const done = this.work.then(task);
    this.work = done.catch(() => {});
    return done;
  },

  came(params) {
    if (params.edited) return void this.again(() => this.update(params.message_id)).catch(report);
    if (this.waiting) return;
    this.waiting = true;
    this.again(() => {
      this.waiting = false;
      return this.catchUp(this.cursor, true);
    }).catch(report);
  },

  resume() {
    const seqs = [...this.shown.values()].map(({message}) => message.seq);
    return this.again(() => (this.epoch ? this.catchUp(Math.min(this.cursor, ...seqs.map((seq) => seq - 1)), true, true) : this.reload()));
  },

  /** The newest messages, in place of all that is shown. */
  async reload() {
    const found = await call("message.list", {page_size: PAGE});
    const messages = await whole(found.messages);
    this.shown.clear();
    byId("messages").replaceChildren();
    this.epoch = found.epoch;
    this.cursor = found.last_seq;
    this.horizon = found.messages.at(-1)?.created_at ?? "";
    this.show(messages);
    this.count(found.total);
  },

  /** All messages after a number; with `prune`, what is shown and was not among them has been deleted meanwhile. */
  async catchUp(after, announce = false, prune = false) {
    const met = new Set();
    let remaining = true;
    while (remaining) {
      const found = await call("message.list", {after_seq: after, sort_order: "asc", page_size: CATCH_UP});
      if (found.epoch !== this.epoch || found.total > SHOWN_MAX + CATCH_UP) return this.reload();
      this.show(await whole(prune ? found.messages : found.messages.filter(({message_id}) => !this.shown.has(message_id))), announce);
      for (const {message_id} of found.messages) met.add(message_id);
      remaining = found.total > found.messages.length;
      after = remaining ? found.messages.at(-1).seq : found.last_seq;
      this.cursor = Math.max(this.cursor, after);
    }
    if (prune) this.remove([...this.shown.keys()].filter((id) => !met.has(id)));
    this.trim();
    await this.recount();
  },

  async update(id) {
    if (this.shown.has(id)) this.show(await whole([{message_id: id}]));
  },

  async older() {
    let before = this.shown.size, found;
    do {
      const known = [...this.shown.values()].filter(({message}) => message.created_at >= this.horizon).length;
      found = await call("message.list", {page_size: PAGE, page: Math.floor(known / PAGE) + 1});
      this.show(await whole(found.messages.filter(({message_id}) => !this.shown.has(message_id))));
      this.horizon = found.messages.at(-1)?.created_at ?? "";
    } while (this.shown.size === before && found.page < found.total_pages);
    this.count(found.total);
  },

  show(messages, announce = false) {
    const list = byId("messages"), fresh = [];
    for (const message of messages) {
      const known = this.shown.get(message.message_id), node = card(message);
      if (message.deleted) {
        this.remove([message.message_id]);
        continue;
      }
      this.shown.set(message.message_id, {message, node});
      node.message = message;
      if (known) {
        known.node.replaceWith(node);
        continue;
      }
      let next = list.firstElementChild;
      if (list.lastElementChild && isLater(list.lastElementChild.message, message)) next = null;
      while (next && isLater(next.message, message)) next = next.nextElementSibling;
      list.insertBefore(node, next);
      if (announce) {
        node.classList.add("fresh");
        fresh.push(message);
      }
    }
    if (fresh.length) tellNews(fresh);
  },

  remove(ids) {
    for (const id of ids) {
      this.shown.get(id)?.node.remove();
      this.shown.delete(id);
    }
  },

  /** Forget the oldest when there are many, unless somebody is reading there. */
  trim() {
    if (this.shown.size <= SHOWN_MAX + PAGE || scrollY > innerHeight) return;
    const list = byId("messages");
    while (this.shown.size > SHOWN_MAX) {
      this.shown.delete(list.lastElementChild.message.message_id);
      list.lastElementChild.remove();
    }
    this.horizon = [this.horizon, list.lastElementChild.message.created_at].sort()[1];
  },

  async recount() {
    this.count((await call("message.list", {page_size: 1})).total);
  },

  count(total) {
    byId("feed-count").textContent = total ? total.toLocaleString() : "";
    byId("older").hidden = this.shown.size >= total;
    byId("empty").hidden = this.shown.size > 0;
    byId("empty").replaceChildren("Nothing has been said yet. ", make("code", "", 'thrum send "hello"'), " is a beginning.");
  },
};

const isLater = (a, b) => (a.created_at === b.created_at ? a.seq > b.seq : a.created_at > b.created_at);

/** Messages with their audience; one that is gone meanwhile is left out. */
async function whole(rows) {
  const found = await Promise.allSettled(rows.map(({message_id}) => call("message.get", {message_id})));
  const lost = found.find(({reason}) => reason instanceof LostError);
  if (lost) throw lost.reason;
  return found.filter(({status}) => status === "fulfilled").map(({value}) => value.message);
}

function audienceOf(message) {
  const named = (message.audiences ?? []).map(({type, value}) => (type === "broadcast" ? "everyone" : `@${shortName(value)}`));
  return named.length > 4 ? `${named.slice(0, 3).join(", ")} and ${named.length - 3} more` : named.join(", ");
}

function card(message) {
  const author = message.author.agent_id, content = message.body.content ?? "";
  const text = make("p", "text", content);
  text.dir = "auto";
  const head = make("div", "head", make("span", "name", shortName(author)),
    make("span", "to", `→ ${audienceOf(message)}`), timeOf(message.created_at));
  const marks = [message.reply_to ? "reply" : "", message.updated_at ? "edited" : "", message.authored_by ? `written by ${shortName(message.authored_by)}` : "",
    ...(message.scopes ?? []).filter(({type}) => type !== "group").map(({type, value}) => `${type}: ${value}`)].filter(Boolean);
  const body = make("div", "", head, text);
  if (content.length > TEXT_LONG || content.split("\n").length > LINES_LONG) {
    const button = make("button", "", "Show all");
    button.type = "button";
    button.ariaExpanded = "false";
    text.classList.add("long");
    button.onclick = () => {
      const cut = text.classList.toggle("long");
      button.textContent = cut ? "Show all" : "Show less";
      button.ariaExpanded = String(!cut);
    };
    body.append(button);
  }
  if (marks.length) body.append(make("p", "marks", ...marks.map((mark) => make("span", "mark", mark))));
  return make("li", "message", face(author), body);
}

let unseen = 0;

/** Say aloud, and in the title of a hidden page, that mail has come. */
function tellNews(messages) {
  const last = messages.at(-1);
  byId("news").textContent = messages.length > 1 ? `${messages.length} new messages`
    : `New message from ${shortName(last.author.agent_id)}: ${last.body.content.slice(0, 100)}`;
  if (document.hidden) unseen += messages.length;
  sayTitle();
}

function sayTitle() {
  document.title = unseen ? `(${unseen}) thrum` : "thrum";
}


// ---- the team

const team = {
  members: [], timer: 0, looked: 0,

  async refresh() {
    this.looked = Date.now();
    this.members = (await call("team.list", {include_offline: true})).members;
    this.render();
  },

  /** Look again, once for all that happens within TEAM_MS. */
  changed() {
    this.timer ||= setTimeout(() => {
      this.timer = 0;
      this.refresh().catch(report);
    }, Math.max(50, this.looked + TEAM_MS - Date.now()));
  },

  heardOf(id, stamp) {
    const member = this.members.find(({agent_id}) => agent_id === id);
    if (!member) return this.changed();
    member.last_seen = stamp;
    this.render();
  },

  render() {
    const active = this.members.filter(({status}) => status === "active"), offline = this.members.filter(({status}) => status !== "active");
    const order = (a, b) => (a.agent_id < b.agent_id ? -1 : 1);
    byId("active").replaceChildren(...active.sort(order).map(memberCard));
    byId("offline").replaceChildren(...offline.sort(order).map(memberCard));
    byId("team-count").textContent = active.length ? active.length : "nobody is here";
    byId("away").hidden = !offline.length;
    byId("away-title").textContent = `${offline.length} offline`;
  },
};

function memberCard(member) {
  const seen = member.last_seen ? Date.now() - Date.parse(member.last_seen) : Infinity;
  const here = member.status === "active" && seen < HERE_MS;
  const presence = make("span", here ? "presence here" : "presence", here ? "here" : seen === Infinity ? "never seen" : `${ago(seen)} ago`);
  const card = make("li", "member", face(member.agent_id),
    make("span", "name", shortName(member.agent_id), make("span", "role", member.kind === "user" ? "person" : member.role)), presence);
  const doing = member.status === "active" ? member.intent || member.current_task : "";
  if (doing) card.append(make("p", "intent", doing));
  const many = (items, word) => (items?.length ? make("span", "", `${items.length} ${word}${items.length > 1 ? "s" : ""}`) : null);
  const facts = member.status === "active" ? [
    member.branch ? make("span", "branch", member.branch) : null, many(member.file_changes, "file"), many(member.claims, "claim"),
    ...(member.conflicts ?? []).map((pair) => make("span", "clash", `clashes with ${shortName(String(pair.with))}`))].filter(Boolean) : [];
  if (facts.length) card.append(make("p", "facts", ...facts));
  return card;
}


// ---- from here on it runs

function report(error) {
  if (!(error instanceof LostError)) notice(make("span", "", error.message));
}

function look() {
  if (document.hidden) return;
  unseen = 0;
  sayTitle();
  if (line.timer) connect();                // somebody looks: no need to wait
}

byId("older").onclick = () => feed.again(() => feed.older()).catch(report);
document.addEventListener("visibilitychange", look);
addEventListener("online", look);
setInterval(() => document.hidden || team.render(), 60000);     // "3 min ago" becomes 4; nobody is asked
connect();
