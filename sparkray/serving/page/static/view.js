"use strict";

/* The picture of one search. It takes the events of /v1/search, live or recorded, and knows nothing of where they come from. */
class SearchView {
  constructor(root) {
    this.find = (id) => root.getElementById(id);
    this.reset();
  }

  reset(maxPaths = 0) {
    this.lanes = new Map();
    this.numTokens = 0;
    this.numPruned = 0;
    this.maxPaths = maxPaths;
    this.longest = 24;
    this.find("lane-list").replaceChildren();
    this.find("vote-list").replaceChildren(note("No votes yet.", "li"));
    this.find("report").replaceChildren(note("The report comes when the search ends."));
    this.figures();
  }

  take(event) {
    if (event.kind === "wave") event.paths.forEach((path) => this.addLane(path));
    else if (event.kind === "tokens") this.grow(event);
    else if (event.kind === "prune") this.prune(event);
    else if (event.kind === "vote") this.vote(event);
    else if (event.kind === "done") this.done(event.report);
    this.figures();
  }

  addLane(path) {
    const row = document.createElement("li");
    row.className = "lane";
    row.tabIndex = 0;
    row.dataset.path = path;
    const canvas = document.createElement("canvas");
    const line = document.createElementNS("http://www.w3.org/2000/svg", "svg");
    const curve = document.createElementNS("http://www.w3.org/2000/svg", "polyline");
    line.setAttribute("preserveAspectRatio", "none");
    line.append(curve);
    const track = piece("div", "track");
    track.append(canvas, line);
    const parts = { len: piece("span", "len", "0"), state: piece("span", "state", "running"), answer: piece("span", "answer") };
    row.append(piece("span", "num", String(path)), track, parts.len, parts.state, parts.answer);
    const lane = { row, canvas, line, curve, ...parts, text: "", entropies: [], statistics: [] };
    row.addEventListener("click", () => this.toggleText(lane));
    row.addEventListener("keydown", (pressed) => {
      if (pressed.key === "Enter" || pressed.key === " ") { pressed.preventDefault(); this.toggleText(lane); }
      const beside = { ArrowDown: row.nextElementSibling, ArrowUp: row.previousElementSibling }[pressed.key];
      if (beside) { pressed.preventDefault(); beside.focus(); }
    });
    this.lanes.set(path, lane);
    this.find("lane-list").append(row);
    this.label(lane);
  }

  toggleText(lane) {
    const open = lane.row.querySelector(".lane-text");
    if (open) { open.remove(); lane.row.setAttribute("aria-expanded", "false"); return; }
    lane.row.append(piece("p", "lane-text", lane.text || "(nothing yet)"));
    lane.row.setAttribute("aria-expanded", "true");
  }

  grow(event) {
    const lane = this.lanes.get(event.path);
    lane.text += event.text;
    lane.entropies.push(...event.entropies);
    lane.statistics.push(...event.statistics);
    this.numTokens += event.entropies.length;
    lane.len.textContent = String(event.num_tokens);
    const open = lane.row.querySelector(".lane-text");
    if (open) open.textContent = lane.text;
    if (lane.entropies.length > this.longest) {
      this.longest = Math.ceil(lane.entropies.length * 1.4);
      this.lanes.forEach((other) => draw(other, this.longest));
    } else draw(lane, this.longest);
  }

  prune(event) {
    const lane = this.lanes.get(event.path);
    lane.row.classList.add("pruned");
    lane.state.textContent = "pruned";
    this.numPruned += 1;
    this.label(lane);
  }

  vote(event) {
    const lane = this.lanes.get(event.path);
    lane.answer.textContent = event.answer ?? "no answer";
    lane.answer.title = event.answer ?? "";
    lane.state.textContent = event.forced ? "asked" : "done";
    this.label(lane);
    this.bars(event.votes);
  }

  bars(votes) {
    const list = this.find("vote-list");
    if (!votes.length) { list.replaceChildren(note("No votes yet.", "li")); return; }
    const heaviest = Math.max(...votes.map(([, weight]) => weight), 1e-9);
    list.replaceChildren(...votes.slice(0, 8).map(([answer, weight]) => {
      const row = piece("li", "vote");
      const name = piece("span", "name", answer);
      name.title = answer;
      const hold = document.createElement("div");
      const bar = piece("div", "bar");
      bar.style.width = `${Math.max(1, (100 * weight) / heaviest)}%`;
      hold.append(bar);
      row.append(name, hold, piece("span", "weight", weight.toFixed(2)));
      return row;
    }));
    if (votes.length > 8) list.append(note(`and ${votes.length - 8} more answers`, "li"));
  }

  done(report) {
    this.bars(report.votes.map((entry) => [entry.answer, entry.weight]));
    const winners = new Set(report.votes.length ? report.votes[0].paths : []);
    for (const path of report.paths) {
      const lane = this.lanes.get(path.index);
      if (!lane) continue;
      if (path.finish_reason === "closed") { lane.row.classList.add("closed"); lane.state.textContent = "aborted"; }
      if (path.finish_reason === "length") lane.state.textContent = "cut";
      lane.row.classList.toggle("winner", winners.has(path.index));
      this.label(lane);
    }
    this.numTokens = report.num_tokens;
    this.maxPaths = report.max_paths;
    this.report = report;
    const facts = [
      ["share of the votes", `${Math.round(100 * report.share)} %`],
      ["paths", `${report.num_paths} of ${report.max_paths}`],
      ["pruned / aborted", `${report.num_pruned} / ${report.num_aborted}`],
      ["tokens", String(report.num_tokens)],
      ["ended by", report.closed_by ? report.closed_by.replaceAll("_", " ") : "the last path"],
      ["policy", report.policy.replaceAll("_", " ")],
      ["time", `${report.seconds.toFixed(1)} s`],
    ];
    const list = document.createElement("dl");
    facts.forEach(([name, value]) => list.append(piece("dt", "", name), piece("dd", "", value)));
    const parts = [piece("p", "final", report.answer ?? "no answer"), piece("pre", "best", report.best_response.trim() || "(no text)"), list];
    if (report.note) parts.push(piece("p", "note", report.note));
    this.find("report").replaceChildren(...parts);
  }

  /* All paths to their end would have cost about this: what ended paths cost on average, times all of them. */
  saved() {
    const ended = [...this.lanes.values()].filter((lane) => ["done", "cut"].includes(lane.state.textContent));
    if (!ended.length || !this.maxPaths) return 0;
    const mean = ended.reduce((sum, lane) => sum + lane.entropies.length, 0) / ended.length;
    return Math.max(0, 1 - this.numTokens / (mean * this.maxPaths));
  }

  figures() {
    this.find("n-paths").textContent = this.maxPaths ? `${this.lanes.size}/${this.maxPaths}` : String(this.lanes.size);
    this.find("n-pruned").textContent = String(this.numPruned);
    this.find("n-tokens").textContent = String(this.numTokens);
    this.find("n-saved").textContent = this.report || this.lanes.size ? `${Math.round(100 * this.saved())} %` : "0 %";
  }

  label(lane) {
    const said = lane.answer.textContent ? `, answer ${lane.answer.textContent}` : "";
    lane.row.setAttribute("aria-label", `Path ${lane.row.dataset.path}, ${lane.state.textContent}${said}`);
  }

  repaint() { this.lanes.forEach((lane) => draw(lane, this.longest)); }
}

function piece(tag, kind, text = "") {
  const made = document.createElement(tag);
  if (kind) made.className = kind;
  made.textContent = text;
  return made;
}

function note(text, tag = "p") { return piece(tag, "none", text); }

/* Each token is a column in the colour of its entropy; the CUSUM statistic is a line above them. */
function draw(lane, longest) {
  const { canvas, curve, line } = lane;
  const width = canvas.clientWidth || 400, height = canvas.clientHeight || 22, ratio = window.devicePixelRatio || 1;
  canvas.width = width * ratio;
  canvas.height = height * ratio;
  const brush = canvas.getContext("2d");
  brush.scale(ratio, ratio);
  const style = getComputedStyle(document.documentElement);
  const colours = [0, 1, 2, 3].map((level) => style.getPropertyValue(`--e${level}`).trim());
  const step = width / longest;
  lane.entropies.forEach((bits, at) => {
    brush.fillStyle = bits === null ? "gray" : colours[bits < 0.5 ? 0 : bits < 1.5 ? 1 : bits < 3 ? 2 : 3];
    brush.fillRect(at * step, 0, Math.max(1, step - (step > 3 ? 1 : 0)), height);
  });
  const top = Math.max(4, ...lane.statistics.map((value) => value ?? 0));
  line.setAttribute("viewBox", `0 0 ${width} ${height}`);
  curve.setAttribute("points", lane.statistics.map((value, at) =>
    `${((at + 0.5) * step).toFixed(1)},${(height - 2 - ((height - 4) * (value ?? 0)) / top).toFixed(1)}`).join(" "));
}
