/**
 * The live card of a job. It mirrors markup.py: same elements, same classes, same words (words.py).
 *
 * Elements are made once and then only changed, so that nothing jumps. Names and errors come from users and from the
 * code they run: they are set as text (textContent) and never as markup.
 */

const SEGMENTS = ["succeeded", "failed", "cancelled", "running", "queued"];
/** Seconds without news from the kernel after which the card says so; one message comes each second. */
const SILENCE = 5;

function make(parent, tag, names) {
  const made = document.createElement(tag);
  made.className = names.split(" ").map((name) => `yadtq-${name}`).join(" ");
  parent.append(made);
  return made;
}

/** Touch an element only when it has to change: a screen reader speaks what is touched. */
function setText(element, text) {
  if (element.textContent !== text) element.textContent = text;
}

/** A name with a space in it makes classes that no rule is for, and no more. */
function setClass(element, names) {
  const wanted = names.split(" ").map((name) => `yadtq-${name}`).join(" ");
  if (element.className !== wanted) element.className = wanted;
}

const grouped = (number) => number.toLocaleString("en-US");

function duration(seconds) {
  if (seconds < 10) return `${seconds.toFixed(1)} s`;
  const whole = Math.round(seconds);
  for (const [unit, name, smaller, smallName] of [[86400, "d", 3600, "h"], [3600, "h", 60, "min"], [60, "min", 1, "s"]]) {
    if (whole >= unit) {
      const rest = String(Math.floor((whole % unit) / smaller)).padStart(2, "0");
      return `${Math.floor(whole / unit)} ${name} ${rest} ${smallName}`;
    }
  }
  return `${whole} s`;
}

function rate(perSecond) {
  if (perSecond >= 100) return `${grouped(Math.round(perSecond))}/s`;
  return `${perSecond.toFixed(perSecond >= 1 ? 1 : 2)}/s`;
}

const age = (seconds) => (seconds >= 60 ? duration(seconds) : `${Math.floor(seconds)} s`);
const slots = (row) => `${row.busy} of ${row.slots} slots busy`;
const finished = (counts) => counts.succeeded + counts.failed + counts.cancelled;

function headline(counts) {
  const done = grouped(finished(counts));
  return counts.total === null ? `${done} so far` : `${done} of ${grouped(counts.total)}`;
}

/** `passed`: seconds since the snapshot came. */
function timing(shown, passed) {
  const running = !shown.ended;
  const parts = [rate(shown.rate), `${duration(shown.elapsed + (running ? passed : 0))} elapsed`];
  if (running && shown.eta !== null) parts.push(`${duration(Math.max(0, shown.eta - passed))} to go`);
  return parts.join(" · ");
}

function heartbeat(row, passed, ended) {
  const status = row.status === "live" ? "" : row.status;
  const beat = ended ? "" : `heartbeat ${age(row.age + passed)} ago`;
  return [status, beat].filter(Boolean).join(", ");
}

class CardView {
  constructor(root) {
    const card = make(root, "div", "card");
    card.setAttribute("role", "group");
    this.card = card;
    const head = make(card, "div", "head");
    this.name = make(head, "span", "name");
    this.stateDot = make(head, "span", "dot");
    this.state = make(head, "span", "state");
    this.state.setAttribute("role", "status");
    this.progress = make(head, "span", "progress");
    this.bar = make(card, "div", "bar");
    this.bar.setAttribute("role", "progressbar");
    this.bar.setAttribute("aria-valuemin", "0");
    const counts = make(card, "div", "counts");
    this.segments = {};
    for (const kind of SEGMENTS) this.segments[kind] = this.makeSegment(counts, kind);
    this.timing = make(counts, "span", "timing");
    this.workers = make(card, "div", "workers");
    this.workers.setAttribute("role", "list");
    this.workers.setAttribute("aria-label", "workers");
    this.workers.tabIndex = 0;
    this.rows = new Map();
    this.more = this.makeRow();
    this.none = make(this.workers, "div", "worker");
    this.none.textContent = "no worker serves this queue now";
    this.errors = make(card, "div", "errors");
    this.note = make(card, "div", "note");
    this.note.setAttribute("role", "status");
  }

  makeSegment(counts, kind) {
    const item = make(counts, "span", "count");
    make(item, "span", `dot fill-${kind}`);
    return { item, number: make(item, "span", "number"), fill: make(this.bar, "div", `segment fill-${kind}`) };
  }

  makeRow() {
    const line = make(this.workers, "div", "worker");
    line.setAttribute("role", "listitem");
    const dot = make(line, "span", "dot");
    const who = make(line, "span", "who");
    const host = document.createElement("span");
    who.append(host);
    const id = make(who, "span", "id");
    const gauge = make(line, "span", "gauge");
    const busy = make(gauge, "span", "busy fill-running");
    return { line, dot, host, id, busy, slots: make(line, "span", "slots"), beat: make(line, "span", "beat") };
  }

  showJob(shown) {
    this.shown = shown;
    this.shownAt = performance.now();
    setText(this.name, shown.name);
    this.name.title = `job ${shown.id}`;
    this.card.setAttribute("aria-label", `job ${shown.name}`);
    setText(this.state, shown.state);
    setClass(this.stateDot, `dot fill-${shown.state}`);
    setText(this.progress, headline(shown.counts));
    this.showBar(shown.counts);
    setText(this.errors, "");
    for (const line of shown.errors) make(this.errors, "div", "error").textContent = line;
    this.tick();
  }

  showBar(counts) {
    const tasks = SEGMENTS.reduce((sum, kind) => sum + counts[kind], 0);
    for (const kind of SEGMENTS) {
      const { item, number, fill } = this.segments[kind];
      item.style.display = counts[kind] ? "" : "none";
      setText(number, `${grouped(counts[kind])} ${kind}`);
      fill.style.width = tasks ? `${(100 * counts[kind]) / tasks}%` : "0";
    }
    if (counts.total === null) {
      this.bar.removeAttribute("aria-valuenow");
    } else {
      this.bar.setAttribute("aria-valuemax", String(counts.total));
      this.bar.setAttribute("aria-valuenow", String(finished(counts)));
    }
    this.bar.setAttribute("aria-valuetext", headline(counts));
    this.bar.setAttribute("aria-label", "tasks finished");
  }

  showWorkers({ workers, more_workers: more }) {
    this.workerRows = workers;
    this.workersAt = performance.now();
    const gone = new Set(this.rows.keys());
    for (const row of workers) {
      gone.delete(row.id);
      if (!this.rows.has(row.id)) this.rows.set(row.id, this.makeRow());
      this.showRow(this.rows.get(row.id), row);
    }
    for (const id of gone) {
      this.rows.get(id).line.remove();
      this.rows.delete(id);
    }
    this.placeRows(workers);
    this.more.line.style.display = more ? "" : "none";
    if (more) {
      setText(this.more.host, `and ${grouped(more.count)} more`);
      this.showSlots(this.more, more);
    }
    this.tick();
  }

  showRow(view, row) {
    setClass(view.dot, `dot fill-${row.status}`);
    setText(view.host, `${row.host} `);
    setText(view.id, row.id);
    this.showSlots(view, row);
  }

  showSlots(view, row) {
    setText(view.slots, slots(row));
    view.busy.style.width = `${(100 * row.busy) / Math.max(row.slots, 1)}%`;
  }

  /** Put the rows in the order of the snapshot; those that stand right are not touched. */
  placeRows(workers) {
    workers.forEach((row, place) => {
      const line = this.rows.get(row.id).line;
      if (this.workers.children[place] !== line) this.workers.insertBefore(line, this.workers.children[place]);
    });
  }

  /** Show what changes by the mere passing of time. */
  tick() {
    if (!this.shown || !this.workerRows) return;
    const now = performance.now();
    const { ended } = this.shown;
    const silent = (now - this.shownAt) / 1000;
    setText(this.timing, timing(this.shown, silent));
    const passed = (now - this.workersAt) / 1000;
    for (const row of this.workerRows) setText(this.rows.get(row.id).beat, heartbeat(row, passed, ended));
    this.none.style.display = ended || this.workerRows.length ? "none" : "";
    const quiet = !ended && silent >= SILENCE ? `no news from the kernel for ${age(silent)}` : "";
    setText(this.note, this.shown.note || quiet);
  }
}

function render({ model, el }) {
  const view = new CardView(el);
  const showJob = () => view.showJob(model.get("snapshot"));
  const showWorkers = () => view.showWorkers(model.get("workers"));
  model.on("change:snapshot", showJob);
  model.on("change:workers", showWorkers);
  showJob();
  showWorkers();
  const timer = setInterval(() => view.tick(), 1000);
  return () => {
    clearInterval(timer);
    model.off("change:snapshot", showJob);
    model.off("change:workers", showWorkers);
  };
}

export default { render };
