// The quantization page: asks the server how it is, shows that, and sends what a person asks for.
//
// `status` is asked for every second while something runs and every few seconds otherwise; a part of the page
// is made anew only when what it shows has changed, so that nobody loses a place or a focus. All text goes in
// as text. The token lives in one variable.
"use strict";

const BUSY_MS = 1000, IDLE_MS = 4000;

const OPTION_WORDS = {
  bits: ["Bits", "auto: each layer's own"],
  fidelity: ["Fidelity to keep", "auto: as one grey level"],
  policy: ["Policy", "paper: for comparison"],
  calibration: ["Calibration", "gaussian: plain noise"],
  iterations: ["Iterations", "of synthesis"],
  images: ["Images", "1 to 256"],
  seed: ["Seed", "0 or more"],
  checkpoint: ["Checkpoint", "in the server's model folder"],
};
const LEAST = { seed: 0 };  // other numbers begin at 1
const STAGES = {
  synthesis: "Synthesis", calibration: "Calibration", compensation: "Compensation", precision: "Precision",
  search: "Search", labels: "Labels", learning: "Fine-tuning", fidelity: "Fidelity", writing: "Writing",
};
const OF_QUANTIZATION = ["synthesis", "fidelity", "calibration", "compensation", "writing"];
const TO_A_FIDELITY = ["synthesis", "fidelity", "precision", "search", "writing"];
const OF_FINE_TUNING = ["labels", "learning", "fidelity", "writing"];
const TITLES = { dfqsam: "Quantizing", dfqsam_qat: "Fine-tuning" };
const OUTCOMES = {
  published: "The new model answers", rejected: "The model was made, but does not answer",
  failed: "It failed", stopped: "It was stopped",
};
const CALIBRATION_WORDS = {
  synthetic: "Images synthesized out of the model's own weights. They show no patient: no image was read.",
  gaussian: "Plain noise, the baseline that synthesis has to be better than.",
  none: "Drawn pictures: phantoms, scattered shapes and clouds. They show no patient: no image was read.",
  folder: "Images of a folder, which are not shown, since they may show a patient.",
};

const at = (id) => document.getElementById(id);
let token = "", running = null, asking = 0, timer = 0;  // running: the run that is watched, or null
const shown = {};  // what each part of the page was last made from, as JSON

// Asking the server

class Answer extends Error {
  constructor(status, sentence) { super(sentence); this.status = status; }
}

async function call(path, method = "GET", body = undefined) {
  const headers = token ? { Authorization: `Bearer ${token}` } : {};
  if (body !== undefined) headers["Content-Type"] = "application/json";
  let response;
  try {
    response = await fetch(path, { method, headers, body: body && JSON.stringify(body), cache: "no-store", credentials: "omit" });
  } catch {
    throw new Answer(0, "The server does not answer. This page goes on trying.");
  }
  if (!response.ok) throw new Answer(response.status, await sentence(response));
  return response;
}

async function sentence(response) {
  let detail = null;
  try { detail = (await response.json()).detail; } catch { /* not one of the server's own answers */ }
  if (Array.isArray(detail)) detail = detail.map((part) => part.msg).join("; ");
  if (typeof detail !== "string" || !detail) return `The server answered ${response.status}.`;
  return detail.charAt(0).toUpperCase() + detail.slice(1) + (/[.!?]$/.test(detail) ? "" : ".");
}

async function refresh() {
  clearTimeout(timer);
  const turn = ++asking;  // an answer that was overtaken by a later question is not shown
  try {
    const status = await (await call("status")).json();
    if (turn !== asking) return;
    say("connection", "");
    at("login").hidden = true;
    at("board").hidden = false;
    render(status);
  } catch (error) {
    if (turn !== asking) return;
    if (error.status === 401 || (error.status === 403 && at("board").hidden)) askForToken(error);
    else say("connection", error.message);
  }
  const locked = !at("login").hidden;
  if (!document.hidden && !locked) timer = setTimeout(refresh, running ? BUSY_MS : IDLE_MS);
}

function askForToken(error) {
  const message = at("login-form").querySelector(".message");
  message.textContent = !token ? "" : error.status === 403 ? error.message : "This token is not valid, or no longer.";
  message.classList.add("bad");
  token = "";
  at("board").hidden = true;
  at("login").hidden = false;
  at("token").focus();
}

// Showing

function make(tag, properties = {}, ...children) {
  const element = Object.assign(document.createElement(tag), properties);
  element.append(...children);
  return element;
}

function say(id, text, bad = false) {
  const element = at(id);
  if (element.textContent !== text) element.textContent = text;
  element.classList.toggle("bad", bad);
}

function part(name, values, draw) {
  const text = JSON.stringify(values);
  if (shown[name] === text) return;
  shown[name] = text;
  draw(values);
}

function render(status) {
  const ended = running && status.running?.id !== running.id && status.runs.find((run) => run.id === running.id);
  running = status.running;
  const artifact = status.artifacts.find((one) => one.key === status.model.key) || null;
  part("model", { model: status.model, artifact, checkpoint: status.checkpoint, threshold: status.threshold }, showModel);
  part("pictures", artifact && artifact.key, () => showPictures(artifact));
  part("fields", status.options, showFields);
  part("models", { artifacts: status.artifacts, now: status.model.key, own: status.own_key, checkpoint: status.checkpoint.name }, showKept);
  part("history", { runs: status.runs, own: status.checkpoint.name }, showHistory);
  at("progress").hidden = !running;
  at("start-form").hidden = running !== null;
  at("work-title").textContent = running ? TITLES[running.trainer] : "Quantize again";
  if (running) {
    say("outcome", "");
    part("run", { run: running, lines: status.lines }, showRun);
  } else if (ended) {
    const reason = ended.error && ended.state !== "stopped" ? `: ${ended.error}` : "";
    say("outcome", `${OUTCOMES[ended.state]}, after ${seconds(ended.seconds)}${reason}.`, ["rejected", "failed"].includes(ended.state));
  }
}

function showModel({ model, artifact, checkpoint, threshold }) {
  say("problem", model.problem && `Not served: ${model.problem}.`, true);
  at("model").textContent = model.name === "loading" ? "Loading…" : model.key ? model.name : "Full precision";
  at("model-words").textContent = artifact ? described(artifact, checkpoint.name) :
    model.name === "loading" ? "The server reads its first model." : `${checkpoint.name}, not quantized, by ${model.engine}`;
  const near = model.fidelity, itself = near && near.grey_level;
  at("fidelity").textContent = near ? near.mean_iou.toFixed(3) : "–";
  at("fidelity-words").textContent = !near ? "full precision is what quantized models are compared with" :
    `mean overlap (IoU) with full precision's masks, median ${near.median_iou.toFixed(3)}. Full precision overlaps itself by ` +
    `${itself.mean_iou.toFixed(3)}, median ${itself.median_iou.toFixed(3)}, when every pixel moves by one grey level of 256; ` +
    `${threshold} of that is asked for`;
  bar("fidelity-bar", near && near.mean_iou, near && threshold * itself.mean_iou);
  const bytes = artifact ? artifact.bytes : checkpoint.bytes;
  at("size").textContent = inBytes(bytes);
  at("size").title = `${bytes.toLocaleString()} bytes`;
  at("size-words").textContent = artifact ?
    `${(artifact.checkpoint_bytes / bytes).toFixed(1)} times smaller than the checkpoint's ${inBytes(artifact.checkpoint_bytes)} in 32-bit float` :
    "the checkpoint's file";
  bar("size-bar", artifact && bytes / artifact.checkpoint_bytes);
  showSpeed("embed", model.speed.embed, "when somebody first clicks in it");
  showSpeed("click", model.speed.click, "once it is embedded, with reading and writing");
}

function showSpeed(id, measured, when) {
  at(id).textContent = measured ? seconds(measured.seconds) : "–";
  at(`${id}-words`).textContent = measured ?
    `${when}; ${measured.count === 1 ? "measured once" : `median of the last ${measured.count}`}` : "not measured: nobody has done it with this model yet";
}

function bar(id, value, limit = null) {
  at(id).replaceChildren();
  if (value === null || value === undefined) return;
  const filled = make("div", { className: "value" });
  filled.style.width = `${100 * Math.min(1, Math.max(0, value))}%`;
  at(id).append(filled);
  if (limit !== null) {
    const mark = make("div", { className: "limit" });
    mark.style.left = `${100 * limit}%`;
    at(id).append(mark);
  }
}

async function showPictures(artifact) {
  at("pictures").hidden = artifact === null;
  at("images").replaceChildren();
  at("evolution").replaceChildren();
  at("report").hidden = at("evolution-words").hidden = true;
  if (artifact === null) return;
  at("pictures-words").textContent = artifact.learned ? learnedWords(artifact.learned) : CALIBRATION_WORDS[artifact.options.calibration] || "";
  say("pictures-message", "");
  if (artifact.learned) return;
  try {
    const { images, evolution } = await (await call(`pictures/${artifact.key}`)).json();
    if (shown.pictures !== JSON.stringify(artifact.key)) return;
    at("shown").classList.toggle("abreast", images.length === 1 && evolution.length === 1);
    at("images").replaceChildren(...images.map(picture));
    at("evolution").replaceChildren(...evolution.flatMap((steps, index) => [
      make("h3", {}, `How its labels evolved${evolution.length > 1 ? `, image ${index + 1}` : ""}`),
      make("div", { className: "strip" }, ...steps.map(picture)),
    ]));
    at("evolution-words").hidden = evolution.length === 0;
    at("report").href = `report/${artifact.key}`;
    at("report").hidden = false;
  } catch (error) {
    say("pictures-message", error.message);
  }
}

function picture({ src, caption }) {
  return make("figure", {}, make("img", { src, alt: caption }), make("figcaption", {}, caption));
}

function showFields(options) {
  at("fields").replaceChildren(...Object.entries(options).map(([name, value]) => {
    const [title, hint] = OPTION_WORDS[name] || [name, ""];
    const id = `option-${name}`;
    const input = Array.isArray(value) ?
      make("select", { id, name }, ...value.map((choice) => make("option", { value: choice }, choice))) :
      make("input", { id, name, value, required: true, ...(typeof value === "number" && { type: "number", min: LEAST[name] ?? 1, step: 1 }) });
    const label = make("label", { htmlFor: id }, title, make("span", { className: "hint" }, hint));
    return make("div", { className: name === "checkpoint" ? "field wide" : "field" }, label, input);
  }));
}

function showRun({ run, lines: printed }) {
  at("asked").textContent = described(run);
  const names = run.trainer !== "dfqsam" ? OF_FINE_TUNING :
    (run.options.bits === "auto" ? TO_A_FIDELITY : OF_QUANTIZATION).filter((name) => name !== "synthesis" || run.options.calibration === "synthetic");
  const now = names.indexOf(run.stage);
  at("stages").replaceChildren(...names.map((name, index) => {
    const item = make("li", { className: index < now ? "done" : "" }, STAGES[name]);
    if (index === now) item.setAttribute("aria-current", "step");
    return item;
  }));
  const begun = run.stage !== "" && run.stage !== "starting";
  at("step").textContent = begun ? `${STAGES[run.stage] || run.stage}, ${run.step} of ${run.steps} · ${seconds(run.seconds)} so far` :
    run.state === "queued" ? "It waits for its turn …" : "Its process is starting …";
  if (begun) { at("step-bar").max = run.steps; at("step-bar").value = run.step; } else at("step-bar").removeAttribute("value");
  const lines = at("lines"), followed = lines.scrollTop + lines.clientHeight >= lines.scrollHeight - 4;
  lines.textContent = printed.join("\n");
  if (followed) lines.scrollTop = lines.scrollHeight;
}

function showKept({ artifacts, now, own, checkpoint }) {
  at("no-models").hidden = artifacts.length > 0;
  at("models").closest("table").hidden = artifacts.length === 0;
  at("models").replaceChildren(...artifacts.map((artifact) => {
    const name = make("div", {}, `${artifact.name} `);
    if (artifact.key === own) name.append(make("span", { className: "tag own", title: "What this server's own settings make" }, "this server's default"));
    return make("tr", {},
      cell("Model", name, make("small", {}, artifact.options ? described(artifact, checkpoint) : artifact.key)),
      cell("Fidelity", ...faithful(artifact.fidelity), "number"),
      cell("Size", artifact.bytes === null ? "–" : inBytes(artifact.bytes), "number"),
      cell("Made", when(artifact.made)),
      cell("", choice(artifact, now), "action"));
  }));
}

function choice(artifact, now) {
  if (artifact.key === now) return make("span", { className: "tag now" }, "answers now");
  if (artifact.refusal) return make("small", {}, `Cannot answer: ${artifact.refusal}.`);
  const button = make("button", { type: "button", className: "plain" }, "Serve this one");
  button.dataset.key = artifact.key;
  button.setAttribute("aria-label", `Serve ${artifact.name}, ${described(artifact)}`);
  button.addEventListener("click", () => choose(artifact, button));
  return button;
}

function showHistory({ runs, own }) {
  at("no-history").hidden = runs.length > 0;
  at("history").closest("table").hidden = runs.length === 0;
  at("history").replaceChildren(...runs.map((run) => {
    const ended = make("div", {}, make("span", { className: `tag ${run.state}` }, run.state));
    if (run.error) ended.append(make("small", {}, run.error));
    return make("tr", {},
      cell("Asked", when(run.created)),
      cell("For", make("div", {}, described(run, own))),
      cell("Ended", ended),
      cell("Fidelity", ...faithful(run.fidelity), "number"),
      cell("Took", seconds(run.seconds), "number"));
  }));
}

function faithful(fidelity) {
  if (!fidelity) return ["–"];
  const words = ({ mean_iou, median_iou }) => `${mean_iou.toFixed(3)}, median ${median_iou.toFixed(3)}`;
  return [words(fidelity), make("small", {}, `one grey level: ${words(fidelity.grey_level)}`)];
}

function cell(label, ...content) {
  const className = typeof content.at(-1) === "string" && ["number", "action"].includes(content.at(-1)) ? content.pop() : "";
  const element = make("td", { className }, make("div", {}, ...content));
  element.dataset.label = label;
  return element;
}

// Words for values

function described({ trainer, options }, own = null) {
  const { bits, policy, calibration, iterations, images, seed, checkpoint, sampling, labels } = options;
  const tuned = trainer !== "dfqsam", precision = bits === "auto" ? "each layer's own bits" : `${bits} bit`;
  const words = tuned ? [precision, "fine-tuned on labels", sampling] : [precision, policy, calibration];
  if (labels) words.push(labels === 1 ? "1 image" : `${labels} images`);
  if (!tuned && calibration === "synthetic") words.push(`${iterations} iterations`, images === 1 ? "1 image" : `${images} images`);
  words.push(`seed ${seed}`);
  if (checkpoint && checkpoint !== own) words.push(checkpoint);
  return words.map((word) => word.replaceAll(" ", "\u00a0")).join("\u00a0· ");
}

function learnedWords({ labels, before, after }) {
  const images = labels === 1 ? "1 image" : `${labels} images`;
  return "Images synthesized out of the model's own weights at first. Then it was fine-tuned on what people labelled: " +
    `${images} of this server's datastore were read. On those of them that were kept to judge by, its masks overlap the ` +
    `labels by ${after.toFixed(3)} (mean IoU of boxes and clicks, each modality counting the same); before, by ${before.toFixed(3)}.`;
}

function when(iso) {
  const date = new Date(iso);
  if (Number.isNaN(date.getTime())) return "–";
  return make("time", { dateTime: iso, title: iso }, date.toLocaleString([], { dateStyle: "medium", timeStyle: "short" }));
}

function seconds(value) {
  if (value < 1) return `${Number((1000 * value).toPrecision(2))}\u00a0ms`;
  if (value < 60) return `${value.toFixed(1)}\u00a0s`;
  return `${Math.floor(value / 60)}\u00a0min ${Math.floor(value % 60)}\u00a0s`;
}

function inBytes(count) {
  for (const unit of ["B", "kB", "MB"]) {
    if (count < 1000) return `${count >= 100 || unit === "B" ? count.toFixed(0) : count.toPrecision(3)}\u00a0${unit}`;
    count /= 1000;
  }
  return `${count.toPrecision(3)}\u00a0GB`;
}

// What a person asks for

async function act(button, message, work) {
  button.disabled = true;
  say(message, "");
  try {
    say(message, (await work()) || "");
  } catch (error) {
    say(message, error.message, true);
  }
  button.disabled = false;
  await refresh();
}

function choose(artifact, button) {
  act(button, "choice", async () => {
    button.textContent = "Loading…";
    try {
      await call(`choose/${artifact.key}`, "POST");
    } finally {
      button.textContent = "Serve this one";
    }
    return `${artifact.name}, seed ${artifact.options.seed}, answers from now on.`;
  });
}

at("start-form").addEventListener("submit", (event) => {
  event.preventDefault();
  const options = {};
  for (const input of at("fields").querySelectorAll("input, select")) {
    options[input.name] = input.type === "number" ? Number(input.value) : input.value;
  }
  act(at("start"), "outcome", async () => {
    running = (await (await call("../train/dfqsam", "POST", options)).json()).run;
  });
});

at("stop").addEventListener("click", () => act(at("stop"), "outcome", () => call("../train/", "DELETE").then(() => "")));

at("login-form").addEventListener("submit", (event) => {
  event.preventDefault();
  token = at("token").value.trim();
  at("token").value = "";
  refresh();
});

// A new tab sends no token, so that with a login the report is fetched here and saved.
at("report").addEventListener("click", async (event) => {
  if (!token) return;
  event.preventDefault();
  const path = at("report").getAttribute("href");
  try {
    const url = URL.createObjectURL(await (await call(path)).blob());
    make("a", { href: url, download: `${path.replace("/", "-")}.html` }).click();
    setTimeout(() => URL.revokeObjectURL(url), BUSY_MS);
  } catch (error) {
    say("pictures-message", error.message, true);
  }
});

document.addEventListener("visibilitychange", () => { if (!document.hidden && at("login").hidden) refresh(); });
refresh();
