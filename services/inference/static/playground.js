"use strict";
// Choose a tenant and a version, give it a picture, see the answer, beside the other version's. Texts are set as text, never as markup.
const $ = (id) => document.getElementById(id);
const element = (tag, text, className) => {
  const made = document.createElement(tag);
  if (text !== undefined) made.textContent = text;
  if (className) made.className = className;
  return made;
};
const TOP = 10;
const REFRESH_MS = 5000;
let served = [];
let refused = [];
let picture = null;
let asked = 0; // number of the newest question: older answers are not shown any more
let stream = null;

const percent = (value) => `${(value * 100).toFixed(1)} %`;
const address = (model) => (model.alias === "champion" ? model.tenant : `${model.tenant}@${model.alias}`);
const current = () => served.find((model) => model.tenant === $("tenant").value && model.alias === $("version").value);
const other = () => served.find((model) => model.tenant === $("tenant").value && model.alias !== $("version").value);

function ask(path, options = {}) {
  const key = sessionStorage.getItem("key");
  return fetch(path, { ...options, headers: key ? { authorization: `Bearer ${key}` } : {} });
}

function fill(select, options) {
  const shown = [...select.options].map((option) => `${option.value}\n${option.text}`);
  if (shown.join("\n") === options.map((pair) => pair.join("\n")).join("\n")) return;
  const before = select.value;
  select.replaceChildren(...options.map(([value, text]) => new Option(text, value)));
  if (options.some(([value]) => value === before)) select.value = before;
}

async function refresh() {
  const before = current();
  try {
    const response = await ask("v1/tenants");
    const told = await response.json();
    if (!response.ok) {
      served = [];
      showKey(true, told.error);
      $("card").replaceChildren(element("dt", "State"), element("dd", told.error, "error"));
      return;
    }
    ({ served, refused } = told);
  } catch {
    $("card").replaceChildren(element("dt", "State"), element("dd", "the service does not answer", "error"));
    return;
  }
  fill($("tenant"), [...new Set(served.map((model) => model.tenant))].map((name) => [name, name]));
  choose();
  const now = current();
  if (picture && before && now && before.version !== now.version) classify(); // promoted meanwhile: the answer follows
}

function choose() {
  const own = served.filter((model) => model.tenant === $("tenant").value);
  own.sort((a, b) => (b.alias === "champion") - (a.alias === "champion")); // what serves comes first
  fill($("version"), own.map((model) => [model.alias, `${model.alias} (${model.version})`]));
  const beside = other();
  $("compare-label").hidden = !beside;
  if (beside) $("compare-text").textContent = `beside the ${beside.alias}`;
  showCard();
}

function showCard() {
  const model = current();
  const rows = [];
  if (!model) {
    rows.push(["State", "Nothing is served yet. Promote a version in MLflow: give it the alias champion."]);
  } else if (!model.in_memory) {
    rows.push(["Version", `${model.version} (${model.alias})`], ["State", "not in memory: the first picture loads it"]);
  } else {
    const lineage = model.lineage;
    rows.push(["Version", `${model.version} (${model.alias}), in service since ${new Date(model.since * 1000).toLocaleString()}`]);
    if (model.metrics.accuracy !== undefined) rows.push(["Accuracy", `${percent(model.metrics.accuracy)} on its test pictures`]);
    rows.push(["Classes", `${model.classes.length}: ${model.classes.slice(0, 40).join(", ")}${model.classes.length > 40 ? " …" : ""}`]);
    if (model.threshold !== null) rows.push(["Unknown below", percent(model.threshold)]);
    rows.push(["Network", `${lineage.arch}, ${model.resolution} × ${model.resolution} pixels, ${(model.size_bytes / 2 ** 20).toFixed(1)} MiB`]);
    rows.push(["Golden check", `passed, off by ${model.golden_difference.toExponential(1)}`, "good"]);
    rows.push(["Pictures (DVC)", String(lineage.dvc_md5), "code"]);
    rows.push(["Code (git)", String(lineage.git_commit).slice(0, 12), "code"]);
    rows.push(["Run (MLflow)", String(lineage.run_id), "code"]);
    rows.push(["SHA-256", model.sha256, "code"]);
  }
  for (const item of refused) {
    rows.push([`Refused: ${item.tenant}`, `version ${item.version} (${item.alias}): ${item.reason}`, "error"]);
  }
  $("card").replaceChildren(...rows.flatMap(([name, value, style]) => [element("dt", name), element("dd", value, style)]));
}

async function question(model) {
  const explain = $("why").ariaPressed === "true" ? "&explain=overlay" : "";
  const began = performance.now();
  try {
    const response = await ask(`v1/${encodeURIComponent(address(model))}/classify?top=${TOP}${explain}`, { method: "POST", body: picture });
    const told = await response.json();
    const timing = response.headers.get("server-timing") || "";
    return { model, told, ok: response.ok, status: response.status, timing, took: performance.now() - began };
  } catch {
    return { model, told: { error: "the service does not answer" }, ok: false };
  }
}

async function classify() {
  const model = current();
  if (!picture || !model) return;
  const number = ++asked;
  $("answer").setAttribute("aria-busy", "true");
  const models = !$("compare-label").hidden && $("compare").checked ? [model, other()] : [model];
  const answers = await Promise.all(models.map(question)); // both get the same bytes
  if (number !== asked) return;
  const names = answers.map((answer) => answer.ok && best(answer.told));
  const differ = names.length > 1 && names[0] !== names[1];
  $("answer").replaceChildren(...answers.map((answer, i) => panel(answer, differ && i > 0)));
  $("answer").removeAttribute("aria-busy");
  $("why").disabled = false;
  showOverlay(answers[0]);
  if (answers.some((answer) => answer.status === 401)) showKey(true, answers[0].told.error);
}

const best = (told) => (told.unknown ? "unknown" : told.predictions[0].class);

function panel({ model, told, ok, timing, took }, differs) {
  const made = element("div");
  made.append(element("p", `${model.alias} · version ${told.version || model.version}`, "who"));
  if (!ok) {
    made.append(element("p", told.error, "error"));
    return made;
  }
  made.append(element("p", best(told), differs ? "best differs" : "best"));
  for (const one of told.predictions) {
    const row = element("div", undefined, "row");
    const bar = element("div", undefined, "bar");
    const filled = element("div");
    filled.style.width = `${one.probability * 100}%`;
    bar.append(filled);
    const name = element("span", one.class);
    name.title = one.class;
    row.append(name, bar, element("span", percent(one.probability)));
    made.append(row);
  }
  const stages = [...timing.matchAll(/(\w+);dur=([\d.]+)/g)].map(([, name, ms]) => `${name} ${Number(ms).toFixed(1)} ms`);
  made.append(element("p", [`${took.toFixed(0)} ms in all`, ...stages].join(" · "), "facts"));
  return made;
}

function showOverlay({ model, told, ok }) {
  const overlay = ok && told.explanation && told.explanation.overlay;
  const image = $("preview");
  if (picture) image.src = overlay || image.dataset.picture;
  $("why-note").hidden = !overlay;
  if (overlay) $("why-note").textContent = `What the ${model.alias} saw as “${told.explanation.class}”: the brighter, the more it counted.`;
}

function take(file) {
  if (!file) return;
  picture = file;
  const image = $("preview");
  URL.revokeObjectURL(image.dataset.picture);
  image.dataset.picture = image.src = URL.createObjectURL(file);
  image.onload = () => image.classList.toggle("tiny", image.naturalWidth < 100);
  image.onerror = () => { image.hidden = true; $("hint").hidden = false; }; // the service says what it is
  image.alt = file.name ? `your picture: ${file.name}` : "your picture";
  image.hidden = false;
  $("hint").hidden = true;
  classify();
}

function showKey(open, note = "") {
  $("key-form").hidden = !open;
  $("key-open").setAttribute("aria-expanded", String(open));
  $("key-note").textContent = note;
}

async function openCamera() {
  if (!navigator.mediaDevices) return $("capture").click(); // plain http on a phone: its own camera application
  try {
    stream = await navigator.mediaDevices.getUserMedia({ video: { facingMode: "environment" } });
  } catch {
    return $("capture").click();
  }
  $("video").srcObject = stream;
  $("camera-dialog").showModal();
}

function shoot() {
  const video = $("video");
  const canvas = element("canvas");
  [canvas.width, canvas.height] = [video.videoWidth, video.videoHeight];
  canvas.getContext("2d").drawImage(video, 0, 0);
  canvas.toBlob((blob) => { $("camera-dialog").close(); take(blob); }, "image/jpeg", 0.92);
}

$("file").addEventListener("change", (event) => take(event.target.files[0]));
$("capture").addEventListener("change", (event) => take(event.target.files[0]));
$("file").addEventListener("keydown", (event) => { if (event.key === "Enter") { event.preventDefault(); event.target.click(); } });
$("tenant").addEventListener("change", () => { choose(); classify(); });
$("version").addEventListener("change", () => { choose(); classify(); });
$("compare").addEventListener("change", classify);
$("why").addEventListener("click", () => {
  $("why").ariaPressed = String($("why").ariaPressed !== "true");
  classify();
});
$("key-open").addEventListener("click", () => { showKey($("key-form").hidden); if (!$("key-form").hidden) $("key").focus(); });
$("key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  sessionStorage.setItem("key", $("key").value.trim());
  showKey(false);
  refresh().then(classify);
});
$("camera").addEventListener("click", openCamera);
$("video").addEventListener("loadeddata", () => { $("shoot").disabled = false; });
$("shoot").addEventListener("click", shoot);
$("camera-close").addEventListener("click", () => $("camera-dialog").close());
$("camera-dialog").addEventListener("close", () => {
  $("shoot").disabled = true;
  stream.getTracks().forEach((track) => track.stop());
});
document.addEventListener("paste", (event) => take([...event.clipboardData.files][0]));
document.addEventListener("dragover", (event) => { event.preventDefault(); $("drop").classList.add("over"); });
document.addEventListener("dragleave", () => $("drop").classList.remove("over"));
document.addEventListener("drop", (event) => {
  event.preventDefault();
  $("drop").classList.remove("over");
  take(event.dataTransfer.files[0]);
});
refresh();
setInterval(refresh, REFRESH_MS);
