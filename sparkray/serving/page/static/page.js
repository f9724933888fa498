"use strict";

const byId = (id) => document.getElementById(id);
const view = new SearchView(document);
let running = null;

/* ---- dark and light ---- */
function setTheme(theme) {
  document.documentElement.dataset.theme = theme;
  byId("theme").setAttribute("aria-pressed", String(theme === "dark"));
  byId("theme").textContent = theme === "dark" ? "Light" : "Dark";
  view.repaint();
}
function rememberedTheme() {
  try { return localStorage.getItem("sparkray-theme"); } catch { return null; }
}
setTheme(rememberedTheme() ?? (matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light"));
byId("theme").addEventListener("click", () => {
  const theme = document.documentElement.dataset.theme === "dark" ? "light" : "dark";
  try { localStorage.setItem("sparkray-theme", theme); } catch { /* a page without storage forgets it */ }
  setTheme(theme);
});
addEventListener("resize", () => view.repaint());

/* ---- the form ---- */
byId("policy").addEventListener("change", () => { byId("alpha-field").hidden = byId("policy").value !== "certified"; });
byId("question").addEventListener("keydown", (pressed) => {
  if (pressed.key === "Enter" && !pressed.shiftKey) { pressed.preventDefault(); byId("ask").requestSubmit(); }
});
addEventListener("keydown", (pressed) => { if (pressed.key === "Escape" && running) running.abort(); });
byId("stop").addEventListener("click", () => running?.abort());

byId("ask").addEventListener("submit", (sent) => {
  sent.preventDefault();
  const certified = byId("policy").value === "certified";
  const body = {
    question: byId("question").value, policy: byId("policy").value, stream: true,
    num_paths: Number(byId("paths").value), max_tokens: Number(byId("tokens").value),
  };
  if (byId("task").value) body.task = byId("task").value;
  if (certified) Object.assign(body, { profile: "packaged", alpha: Number(byId("alpha").value) });
  follow("Searching", body.num_paths, (signal) => searchEvents(body, signal));
});

byId("replay").addEventListener("click", async () => {
  const answer = await fetch("/page/example.json");
  replay(await answer.json());
});
byId("file").addEventListener("change", async () => {
  const [file] = byId("file").files;
  if (!file) return;
  try {
    const data = JSON.parse(await file.text());
    if (data.format !== "sparkray-search-events") throw new Error("it is not a recorded search");
    replay(data);
  } catch (failure) { fail(`${file.name} cannot be replayed: ${failure.message}.`); }
  byId("file").value = "";
});

function replay(data) {
  byId("question").value = data.question;
  const last = data.events[data.events.length - 1];
  follow("Replaying", last.report.max_paths, (signal) => recordedEvents(data.events, signal));
}

/* ---- one search at a time ---- */
async function follow(doing, maxPaths, start) {
  running?.abort();
  const control = new AbortController();
  running = control;
  view.report = null;
  view.reset(maxPaths);
  byId("failure").hidden = true;
  byId("status").textContent = `${doing} …`;
  byId("go").disabled = true;
  byId("stop").disabled = false;
  try {
    for await (const event of start(control.signal)) {
      if (control.signal.aborted) break;
      view.take(event);
      if (event.kind === "vote") byId("status").textContent = `${doing}: ${event.votes[0]?.[0] ?? "no answer"} leads`;
    }
    const report = view.report;
    byId("status").textContent = control.signal.aborted ? "Stopped." : report ? `Done: ${report.answer ?? "no answer"}.` : "The server ended the search without a report.";
  } catch (failure) {
    if (control.signal.aborted) byId("status").textContent = "Stopped.";
    else fail(failure.message);
  } finally {
    if (running === control) {
      running = null;
      byId("go").disabled = false;
      byId("stop").disabled = true;
    }
  }
}

function fail(message) {
  byId("failure").textContent = message;
  byId("failure").hidden = false;
  byId("status").textContent = "";
}

async function* searchEvents(body, signal) {
  const answer = await fetch("/v1/search", {
    method: "POST", headers: { "content-type": "application/json" }, body: JSON.stringify(body), signal,
  });
  if (!answer.ok) {
    const said = await answer.json().catch(() => null);
    throw new Error(said?.error?.message ?? `the server answered ${answer.status}`);
  }
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const frames = (rest + value).split("\n\n");
    rest = frames.pop();
    for (const frame of frames) {
      const data = frame.replace(/^data: /, "");
      if (data === "[DONE]") return;
      const event = JSON.parse(data);
      if (event.error) throw new Error(event.error.message);
      yield event;
    }
  }
}

async function* recordedEvents(events, signal) {
  for (const event of events) {
    if (signal.aborted) return;
    yield event;
    if (event.kind !== "tokens" || Math.random() < 0.25) {
      await new Promise((resume) => setTimeout(resume, 120 / Number(byId("speed").value)));
    }
  }
}
