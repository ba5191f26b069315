// @ts-check
/**
 * The live card of a job or a queue. It mirrors markup.py: same elements, same classes, same words (words.py).
 *
 * Elements are made once and then only changed, so that nothing jumps, and what is open or has the focus stays so. Names
 * and errors come from users and from the code they run: they are set as text (textContent) and never as markup.
 *
 * @typedef {{queued: number, running: number, succeeded: number, failed: number, cancelled: number, lost: number,
 *   total: number | null}} Counts
 * @typedef {{name: string, id: string, state: string, ended: boolean, counts: Counts, rate: number,
 *   eta: number | null, elapsed: number, retryable: number, errors_seen: number, note: string}} Shown
 * @typedef {{name: string, ended: boolean, more_jobs: number, note: string, time: number}} ShownQueue
 * @typedef {{live: number, lost: number, slots: number, busy: number, cpu: number, memory: number}} FleetSum
 * @typedef {[id: string, host: string, slots: number, status: string]} RosterRow
 * @typedef {[busy: number, age: number, done: number, cpu: number, memory: number]} BeatRow
 * @typedef {{rows: BeatRow[], more: {count: number, slots: number, busy: number} | null, fleet: FleetSum}} Beats
 * @typedef {{index: number, seconds: number, worker: string}} RunningRow
 * @typedef {{key: string, type: string, place: string, message: string, first: number, count: number}} ErrorRow
 * @typedef {{id: string, name: string, state: string, ended: boolean, counts: Counts, age: number,
 *   elapsed: number}} JobRow
 * @typedef {{number: number, text: string}} Answer
 * @typedef {{get(name: string): any, on(name: string, heard: () => void): void,
 *   off(name: string, heard: () => void): void, send(content: object): void}} Model
 * @typedef {keyof Omit<Counts, "total">} Kind
 */

/** @type {Kind[]} */
const SEGMENTS = ["succeeded", "failed", "cancelled", "lost", "running", "queued"];
/** Seconds without news from the kernel after which the card says so; one message comes each second. */
const SILENCE = 5;
/** Seconds for which a button that asks for a second press waits for it. */
const ARMED = 5;
/** Seconds without an answer after which the kernel is taken to be busy. */
const BUSY = 1.5;
/** Seconds without an answer after which a button may be pressed again: the message may be lost with a connection. */
const AGAIN = 10;
/** Seconds between two signs that the card is on a page. */
const SEEN_EVERY = 60;
const TRAITS = ["snapshot", "roster", "beats", "running", "errors", "tracebacks", "jobs", "answer"];

/**
 * @param {Element} parent
 * @param {string} tag
 * @param {string} names
 * @returns {HTMLElement}
 */
function make(parent, tag, names, text = "") {
  const made = document.createElement(tag);
  setClass(made, names);
  if (text) made.textContent = text;
  parent.append(made);
  return made;
}

/**
 * Touch an element only when it has to change: a screen reader speaks what is touched.
 * @param {Element} element
 * @param {string} text
 */
function setText(element, text) {
  if (element.textContent !== text) element.textContent = text;
}

/**
 * A name with a space in it makes classes that no rule is for, and no more.
 * @param {Element} element
 * @param {string} names
 */
function setClass(element, names) {
  const wanted = names.split(" ").map((name) => `yadtq-${name}`).join(" ");
  if (element.className !== wanted) element.className = wanted;
}

/**
 * @param {HTMLElement} element
 * @param {boolean} on
 */
function setShown(element, on) {
  element.style.display = on ? "" : "none";
}

// Words, as in words.py.

/** @param {number} number */
const grouped = (number) => number.toLocaleString("en-US");
/** @param {number} count @param {string} noun */
const plural = (count, noun) => (count === 1 ? `1 ${noun}` : `${grouped(count)} ${noun}s`);

/** @param {number} seconds */
function duration(seconds) {
  if (seconds < 10) return `${seconds.toFixed(1)} s`;
  const whole = Math.round(seconds);
  /** @type {[number, string, number, string][]} */
  const units = [[86400, "d", 3600, "h"], [3600, "h", 60, "min"], [60, "min", 1, "s"]];
  for (const [unit, name, smaller, smallName] of units) {
    if (whole >= unit) {
      const rest = String(Math.floor((whole % unit) / smaller)).padStart(2, "0");
      return `${Math.floor(whole / unit)} ${name} ${rest} ${smallName}`;
    }
  }
  return `${whole} s`;
}

/** @param {number} perSecond */
function rate(perSecond) {
  if (perSecond >= 100) return `${grouped(Math.round(perSecond))}/s`;
  return `${perSecond.toFixed(perSecond >= 1 ? 1 : 2)}/s`;
}

/** @param {number} seconds */
const age = (seconds) => (seconds >= 60 ? duration(seconds) : `${Math.floor(seconds)} s`);
/** @param {number} number */
const tenths = (number) => number.toLocaleString("en-US", { minimumFractionDigits: 1, maximumFractionDigits: 1 });
/** @param {number} megabytes */
const memory = (megabytes) => (megabytes < 1000 ? `${megabytes} MB` : `${tenths(megabytes / 1000)} GB`);
/** @param {number} busy @param {number} of */
const slots = (busy, of) => `${busy} of ${of} slots busy`;
/** @param {Counts} counts */
const finished = (counts) => counts.succeeded + counts.failed + counts.cancelled;

/** @param {Counts} counts */
function headline(counts) {
  const done = grouped(finished(counts));
  return counts.total === null ? `${done} so far` : `${done} of ${grouped(counts.total)}`;
}

/**
 * @param {Shown} shown
 * @param {number} passed seconds since the snapshot came
 */
function timing(shown, passed) {
  const running = !shown.ended;
  const parts = [rate(shown.rate), `${duration(shown.elapsed + (running ? passed : 0))} elapsed`];
  if (running && shown.eta !== null) parts.push(`${duration(Math.max(0, shown.eta - passed))} to go`);
  return parts.join(" · ");
}

/** @param {FleetSum} sum */
function fleet(sum) {
  const parts = [plural(sum.live, "worker")];
  if (sum.live) parts.push(slots(sum.busy, sum.slots), `CPU ${grouped(sum.cpu)} %`, memory(sum.memory));
  if (sum.lost) parts.push(`${grouped(sum.lost)} lost`);
  return parts.join(" · ");
}

/** @param {BeatRow} beat @param {string} status */
function load([, , done, cpu, used], status) {
  return status === "lost" ? `${grouped(done)} done` : `${grouped(done)} done · CPU ${cpu} % · ${memory(used)}`;
}

/** @param {string} status @param {number} seconds @param {boolean} ended */
function heartbeat(status, seconds, ended) {
  if (status === "live") return ended ? "" : `heartbeat ${age(seconds)} ago`;
  return ended ? status : `${status}, ${age(seconds)} ago`;
}

/** @param {RunningRow} row @param {number} passed */
const running = (row, passed) => `task ${grouped(row.index)} · ${age(row.seconds + passed)}`;

/** @param {ErrorRow} row */
function errorHead(row) {
  return `${grouped(row.count)} × ${row.type}${row.place ? ` (${row.place})` : ""}`;
}

/** @param {ErrorRow[]} rows @param {number} seen @param {number} failed */
function errorsSeen(rows, seen, failed) {
  const counted = rows.reduce((sum, row) => sum + row.count, 0);
  return counted >= failed || !rows.length ? "" : `counted over the first ${grouped(seen)} of ${grouped(failed)} failures`;
}

/** @param {JobRow} row @param {number} passed */
function jobAge(row, passed) {
  return row.ended ? `took ${duration(row.elapsed)}, ${age(row.age + passed)} ago` : `for ${age(row.age + passed)}`;
}

/**
 * A number that tells how long ago it came.
 */
class Clock {
  constructor() {
    this.at = performance.now();
  }
  reset() {
    this.at = performance.now();
  }
  passed() {
    return (performance.now() - this.at) / 1000;
  }
}

/**
 * Rows by key, made once each, in the order of the data.
 * @template {{line: HTMLElement}} T
 */
class Rows {
  /**
   * @param {HTMLElement} box
   * @param {() => T} makeRow
   */
  constructor(box, makeRow) {
    this.box = box;
    this.makeRow = makeRow;
    /** @type {Map<string, T>} */
    this.rows = new Map();
  }

  /**
   * Return a row for each key; those whose keys are gone are removed.
   * @param {string[]} keys
   * @returns {T[]}
   */
  take(keys) {
    const gone = new Set(this.rows.keys());
    const found = keys.map((key) => {
      gone.delete(key);
      const row = this.rows.get(key) ?? this.makeRow();
      this.rows.set(key, row);
      return row;
    });
    for (const key of gone) {
      this.rows.get(key)?.line.remove();
      this.rows.delete(key);
    }
    // Those that stand right are not touched: moving one would lose its focus.
    found.forEach((row, place) => {
      if (this.box.children[place] !== row.line) this.box.insertBefore(row.line, this.box.children[place] ?? null);
    });
    return found;
  }
}

/** @param {Element} root @param {string} title @param {boolean} open */
function makePanel(root, title, open) {
  const panel = /** @type {HTMLDetailsElement} */ (make(root, "details", "panel"));
  panel.open = open;
  return { panel, title: make(panel, "summary", "title", title) };
}

/** @param {HTMLElement} box @param {string} label */
function makeList(box, label) {
  box.setAttribute("role", "list");
  box.setAttribute("aria-label", label);
  box.tabIndex = 0; // it scrolls, also by keyboard
  return box;
}

/** @param {HTMLElement} bar @param {string} segment */
function makeSegments(bar, segment) {
  return SEGMENTS.map((kind) => make(bar, bar.tagName === "SPAN" ? "span" : "div", `${segment} fill-${kind}`));
}

/** @param {HTMLElement[]} fills @param {Counts} counts */
function showSegments(fills, counts) {
  const tasks = SEGMENTS.reduce((sum, kind) => sum + counts[kind], 0);
  SEGMENTS.forEach((kind, place) => {
    setShown(fills[place], counts[kind] > 0);
    fills[place].style.width = tasks ? `${(100 * counts[kind]) / tasks}%` : "0";
  });
}

/** The panel of workers. */
class WorkersView {
  /** @param {Element} root */
  constructor(root) {
    const { panel, title } = makePanel(root, "workers", true);
    this.panel = panel;
    this.title = title;
    this.box = makeList(make(panel, "div", "workers"), "workers");
    this.rows = new Rows(this.box, () => this.makeRow());
    this.more = this.makeRow();
    this.none = make(this.box, "div", "worker", "no worker serves this queue now");
    this.clock = new Clock();
    /** @type {RosterRow[]} */
    this.roster = [];
    /** @type {Beats | null} */
    this.beats = null;
    /** @type {ReturnType<WorkersView["makeRow"]>[]} */
    this.shown = [];
  }

  makeRow() {
    const line = make(this.box, "div", "worker");
    line.setAttribute("role", "listitem");
    const who = make(line, "span", "who");
    const dot = make(who, "span", "dot");
    const host = make(who, "span", "host");
    const id = make(who, "span", "id");
    const gauge = make(line, "span", "gauge");
    const busy = make(gauge, "span", "busy fill-running");
    const slots = make(line, "span", "slots");
    const load = make(line, "span", "load");
    return { line, dot, host, id, gauge, busy, slots, load, beat: make(line, "span", "beat") };
  }

  /** @param {RosterRow[]} roster @param {Beats} beats */
  show(roster, beats) {
    if (beats !== this.beats) this.clock.reset();
    this.roster = roster;
    this.beats = beats;
    setText(this.title, fleet(beats.fleet));
    this.shown = this.rows.take(roster.map(([id]) => id));
    roster.forEach(([id, host, count, status], place) => {
      const row = this.shown[place];
      const beat = beats.rows[place] ?? [0, 0, 0, 0, 0];
      setClass(row.dot, `dot fill-${status}`);
      setText(row.host, host);
      setText(row.id, id.startsWith(`${host}-`) ? id.slice(host.length + 1) : id);
      setText(row.load, load(beat, status));
      row.beat.classList.toggle("is-lost", status === "lost");
      this.showSlots(row, beat[0], count);
    });
    setShown(this.more.line, beats.more !== null);
    if (beats.more) {
      setText(this.more.host, `and ${grouped(beats.more.count)} more`);
      this.showSlots(this.more, beats.more.busy, beats.more.slots);
    }
    setShown(this.none, roster.length === 0);
  }

  /** @param {{busy: HTMLElement, slots: HTMLElement}} row @param {number} busy @param {number} count */
  showSlots(row, busy, count) {
    setText(row.slots, slots(busy, count));
    row.busy.style.width = `${(100 * busy) / Math.max(count, 1)}%`;
  }

  /** @param {boolean} ended */
  tick(ended) {
    const passed = this.clock.passed();
    this.roster.forEach(([, , , status], place) => {
      const seconds = (this.beats?.rows[place]?.[1] ?? 0) + passed;
      setText(this.shown[place].beat, heartbeat(status, seconds, ended));
    });
  }
}

/** A button whose press is answered by the kernel. */
class Action {
  /**
   * @param {Element} root
   * @param {string} name
   * @param {string} label
   * @param {string} sure what it says when it wants to be pressed again, or ""
   * @param {(name: string) => number} send returns the number of the message
   */
  constructor(root, name, label, sure, send) {
    this.button = /** @type {HTMLButtonElement} */ (make(root, "button", `button ${name}`, label));
    this.button.type = "button";
    this.name = name;
    this.label = label;
    this.sure = sure;
    this.send = send;
    this.number = 0;
    this.armed = new Clock();
    this.sent = new Clock();
    this.isArmed = false;
    this.button.addEventListener("click", () => this.press());
    this.button.addEventListener("blur", () => this.arm(false));
  }

  press() {
    if (this.sure && !this.isArmed) {
      this.arm(true);
      return;
    }
    this.arm(false);
    this.number = this.send(this.name);
    this.sent.reset();
    this.button.disabled = true;
  }

  /** @param {boolean} on */
  arm(on) {
    this.isArmed = on;
    this.armed.reset();
    this.button.classList.toggle("is-armed", on);
    setText(this.button, on ? this.sure : this.label);
  }

  /** @param {number} answered */
  answer(answered) {
    if (this.number && answered >= this.number) {
      this.number = 0;
      this.button.disabled = false;
    }
  }

  tick() {
    if (this.isArmed && this.armed.passed() > ARMED) this.arm(false);
    if (this.number && this.sent.passed() > AGAIN) this.button.disabled = false;
  }
}

/** What the cards of jobs and queues have in common: a frame, and a line that says what is wrong. */
class CardView {
  /** @param {Element} root @param {Model} model */
  constructor(root, model) {
    this.model = model;
    this.live = document.createElement("div");
    setClass(this.live, "live");
    root.append(this.live);
    this.card = make(this.live, "div", "card");
    this.card.setAttribute("role", "group");
    this.head = make(this.card, "div", "head");
    this.name = make(this.head, "span", "name");
    this.news = new Clock();
  }

  addNote() {
    this.note = make(this.card, "div", "note");
    this.note.setAttribute("role", "status");
  }

  /** @param {string} first @param {boolean} ended */
  showNote(first, ended) {
    const silent = this.news.passed();
    // In steps, since a screen reader speaks each change.
    const quiet = !ended && silent >= SILENCE ? `no news from the kernel for ${age(Math.floor(silent / 5) * 5)}` : "";
    if (this.note) setText(this.note, first || quiet);
  }
}

class JobView extends CardView {
  /** @param {Element} root @param {Model} model */
  constructor(root, model) {
    super(root, model);
    /** @type {Shown | null} */
    this.shown = null;
    this.stateDot = make(this.head, "span", "dot");
    this.state = make(this.head, "span", "state");
    this.state.setAttribute("role", "status");
    this.progress = make(this.head, "span", "progress");
    const actions = make(this.head, "span", "actions");
    this.bar = make(this.card, "div", "bar");
    this.bar.setAttribute("role", "progressbar");
    this.bar.setAttribute("aria-valuemin", "0");
    this.bar.setAttribute("aria-label", "tasks finished");
    this.fills = makeSegments(this.bar, "segment");
    const counts = make(this.card, "div", "counts");
    this.numbers = SEGMENTS.map((kind) => {
      const item = make(counts, "span", "count");
      make(item, "span", `dot fill-${kind}`);
      return { item, number: make(item, "span", "number") };
    });
    this.timing = make(counts, "span", "timing");
    this.workers = new WorkersView(this.card);
    const slowest = makePanel(this.card, "slowest now", false);
    this.slowest = slowest.panel;
    this.slowestTitle = slowest.title;
    this.slowestBox = make(slowest.panel, "div", "slowest");
    this.slowestClock = new Clock();
    this.slowestRows = new Rows(this.slowestBox, () => ({ line: make(this.slowestBox, "div", "line") }));
    /** @type {RunningRow[]} */
    this.running = [];
    this.errors = make(this.card, "div", "errors");
    this.errorBox = make(this.errors, "div", "groups");
    this.errorRows = new Rows(this.errorBox, () => this.makeError());
    this.errorNote = make(this.errors, "div", "line");
    this.addNote();
    this.sent = 0;
    this.asked = new Clock();
    const send = (/** @type {string} */ name) => this.ask(name);
    this.retry = new Action(actions, "retry", "Retry failed", "", send);
    this.cancel = new Action(actions, "cancel", "Cancel", "Really cancel?", send);
  }

  makeError() {
    const line = make(this.errorBox, "details", "error");
    const title = make(line, "summary", "title");
    const type = make(title, "span", "type");
    const message = make(title, "span", "message");
    const first = make(line, "div", "line");
    const traceback = make(line, "div", "traceback");
    traceback.tabIndex = 0;
    return { line, type, message, first, traceback };
  }

  /** @param {string} name */
  ask(name) {
    this.asked.reset();
    this.sent += 1;
    // Another view of the same card, or an earlier one, has counted, too.
    const number = Math.max(this.sent, this.model.get("answer").number + 1);
    this.sent = number;
    this.model.send({ do: name, number });
    return number;
  }

  update() {
    /** @type {Shown} */
    const shown = this.model.get("snapshot");
    if (shown !== this.shown) this.news.reset();
    this.shown = shown;
    setText(this.name, shown.name);
    this.name.title = `job ${shown.id}`;
    this.card.setAttribute("aria-label", `job ${shown.name}`);
    setText(this.state, shown.state);
    setClass(this.stateDot, `dot fill-${shown.state}`);
    setText(this.progress, headline(shown.counts));
    this.showBar(shown.counts);
    this.workers.show(this.model.get("roster"), this.model.get("beats"));
    setShown(this.workers.panel, !shown.ended);
    this.showRunning(this.model.get("running"));
    this.showErrors(shown, this.model.get("errors"), this.model.get("tracebacks"));
    this.showActions(shown, this.model.get("answer"));
    this.tick();
  }

  /** @param {Counts} counts */
  showBar(counts) {
    showSegments(this.fills, counts);
    SEGMENTS.forEach((kind, place) => {
      setShown(this.numbers[place].item, counts[kind] > 0);
      setText(this.numbers[place].number, `${grouped(counts[kind])} ${kind}`);
    });
    if (counts.total === null) {
      this.bar.removeAttribute("aria-valuenow");
    } else {
      this.bar.setAttribute("aria-valuemax", String(counts.total));
      this.bar.setAttribute("aria-valuenow", String(finished(counts)));
    }
    this.bar.setAttribute("aria-valuetext", headline(counts));
  }

  /** @param {RunningRow[]} rows */
  showRunning(rows) {
    if (rows !== this.running) this.slowestClock.reset();
    this.running = rows;
    this.slowestLines = this.slowestRows.take(rows.map((row) => String(row.index)));
  }

  /** @param {Shown} shown @param {ErrorRow[]} rows @param {Record<string, string>} tracebacks */
  showErrors(shown, rows, tracebacks) {
    setShown(this.errors, rows.length > 0);
    this.errorRows.take(rows.map((row) => row.key)).forEach((view, place) => {
      const row = rows[place];
      setText(view.type, errorHead(row));
      setText(view.message, row.message);
      setText(view.first, `first in task ${grouped(row.first)}`);
      setText(view.traceback, tracebacks[row.key] || row.message);
    });
    // Counts come less often than failures: what is a little behind is not worth a word.
    const behind = shown.errors_seen < 0.8 * shown.counts.failed;
    setText(this.errorNote, behind ? errorsSeen(rows, shown.errors_seen, shown.counts.failed) : "");
  }

  /** @param {Shown} shown @param {Answer} answer */
  showActions(shown, answer) {
    this.cancel.answer(answer.number);
    this.retry.answer(answer.number);
    setShown(this.cancel.button, !shown.ended);
    setShown(this.retry.button, !shown.ended && shown.retryable > 0);
  }

  /** Show what changes by the mere passing of time. */
  tick() {
    if (!this.shown) return;
    const { ended } = this.shown;
    setText(this.timing, timing(this.shown, this.news.passed()));
    this.workers.tick(ended);
    this.tickSlowest(ended);
    this.cancel.tick();
    this.retry.tick();
    this.showNote(this.shown.note || this.saying(), ended);
  }

  /** @param {boolean} ended */
  tickSlowest(ended) {
    const passed = this.slowestClock.passed();
    setShown(this.slowest, !ended);
    const first = this.running[0];
    setText(this.slowestTitle, `slowest now: ${first ? running(first, passed) : "none that takes long"}`);
    this.running.forEach((row, place) => {
      const line = this.slowestLines?.[place].line;
      if (line) setText(line, `${running(row, passed)} · ${row.worker}`);
    });
  }

  saying() {
    if (this.cancel.number || this.retry.number) {
      return this.asked.passed() > BUSY ? "asked for; no answer yet: a cell that runs may hold it up" : "asked for …";
    }
    /** @type {Answer} */
    const answer = this.model.get("answer");
    return this.sent && answer.number >= this.sent ? answer.text : "";
  }
}

class QueueView extends CardView {
  /** @param {Element} root @param {Model} model */
  constructor(root, model) {
    super(root, model);
    /** @type {ShownQueue | null} */
    this.shown = null;
    make(this.head, "span", "state", "queue");
    this.workers = new WorkersView(this.card);
    const { panel, title } = makePanel(this.card, "jobs", true);
    this.title = title;
    this.box = makeList(make(panel, "div", "jobs"), "jobs");
    this.rows = new Rows(this.box, () => this.makeRow());
    this.more = make(this.box, "div", "job");
    this.clock = new Clock();
    /** @type {JobRow[]} */
    this.jobs = [];
    this.addNote();
  }

  makeRow() {
    const line = make(this.box, "div", "job");
    line.setAttribute("role", "listitem");
    const who = make(line, "span", "who");
    const dot = make(who, "span", "dot");
    const name = make(who, "span", "host");
    const bar = make(line, "span", "small-bar");
    bar.setAttribute("role", "img");
    const fills = makeSegments(bar, "small-segment");
    const done = make(line, "span", "done");
    const state = make(line, "span", "job-state");
    return { line, dot, name, bar, fills, done, state, times: make(line, "span", "times") };
  }

  update() {
    /** @type {ShownQueue} */
    const shown = this.model.get("snapshot");
    if (shown !== this.shown) this.news.reset();
    this.shown = shown;
    setText(this.name, shown.name);
    this.card.setAttribute("aria-label", `queue ${shown.name}`);
    this.workers.show(this.model.get("roster"), this.model.get("beats"));
    this.showJobs(this.model.get("jobs"), shown.more_jobs);
    this.tick();
  }

  /** @param {JobRow[]} jobs @param {number} more */
  showJobs(jobs, more) {
    if (jobs !== this.jobs) this.clock.reset();
    this.jobs = jobs;
    setText(this.title, `${plural(jobs.length + more, "job")} in the last day`);
    this.lines = this.rows.take(jobs.map((job) => job.id));
    jobs.forEach((job, place) => {
      const row = /** @type {ReturnType<QueueView["makeRow"]>} */ (this.lines?.[place]);
      setClass(row.dot, `dot fill-${job.state}`);
      setText(row.name, job.name);
      row.name.title = `job ${job.id}`;
      showSegments(row.fills, job.counts);
      row.bar.setAttribute("aria-label", headline(job.counts));
      setText(row.done, headline(job.counts));
      setText(row.state, job.state);
    });
    setShown(this.more, more > 0);
    setText(this.more, `and ${grouped(more)} more`);
  }

  tick() {
    if (!this.shown) return;
    this.workers.tick(this.shown.ended);
    const passed = this.clock.passed();
    this.jobs.forEach((job, place) => {
      const times = this.lines?.[place].times;
      if (times) setText(times, jobAge(job, passed));
    });
    this.showNote(this.shown.note, this.shown.ended);
  }
}

/** @param {{model: Model, el: Element}} given */
function render({ model, el }) {
  const view = model.get("kind") === "queue" ? new QueueView(el, model) : new JobView(el, model);
  let due = false;
  // One message may change several traits: the card is drawn once for all of them.
  const changed = () => {
    if (due) return;
    due = true;
    queueMicrotask(() => {
      due = false;
      view.update();
    });
  };
  for (const trait of TRAITS) model.on(`change:${trait}`, changed);
  view.update();
  model.send({ do: "seen", first: true });
  let ticks = 0;
  const timer = setInterval(() => {
    view.tick();
    ticks += 1;
    if (ticks % SEEN_EVERY === 0 && !document.hidden) model.send({ do: "seen" });
  }, 1000);
  return () => {
    clearInterval(timer);
    for (const trait of TRAITS) model.off(`change:${trait}`, changed);
  };
}

const words = {
  duration, rate, age, memory, slots, headline, timing, fleet, load, heartbeat, running, errorHead, errorsSeen, jobAge,
};

export { words };
export default { render };
