"use strict";
// Choose a model, give it a picture, see the answer. Texts are set as text, never as markup.
const $ = (id) => document.getElementById(id);
const element = (tag, text, className) => {
  const made = document.createElement(tag);
  if (text !== undefined) made.textContent = text;
  if (className) made.className = className;
  return made;
};
let served = [];
let picture = null;
let asked = 0;

const address = (model) => (model.alias === "champion" ? model.tenant : `${model.tenant}@${model.alias}`);
const current = () => served.find((model) => address(model) === $("model").value);
const percent = (value) => `${(value * 100).toFixed(1)} %`;

async function refresh() {
  try {
    const told = await (await fetch("v1/tenants")).json();
    served = told.served;
    const before = $("model").value;
    const names = served.map(address);
    const shown = [...$("model").options].map((option) => option.value);
    if (names.join("\n") !== shown.join("\n")) {
      $("model").replaceChildren(...names.map((name) => new Option(name, name)));
      if (names.includes(before)) $("model").value = before;
    }
    showCard(told.refused);
  } catch (error) {
    $("card").replaceChildren(element("dt", "State"), element("dd", "the service does not answer", "error"));
  }
}

function showCard(refused) {
  const model = current();
  const rows = [];
  if (!model) {
    rows.push(["State", "Nothing is served yet. Promote a version in MLflow: give it the alias champion."]);
  } else {
    rows.push(["Version", `${model.version} (${model.alias}), in service since ${new Date(model.since * 1000).toLocaleString()}`]);
    if (model.metrics.accuracy !== undefined) rows.push(["Accuracy", `${percent(model.metrics.accuracy)} on its test pictures`]);
    rows.push(["Classes", `${model.classes.length}: ${model.classes.slice(0, 40).join(", ")}${model.classes.length > 40 ? " …" : ""}`]);
    rows.push(["Network", `${model.lineage.arch}, ${model.resolution} × ${model.resolution} pixels`]);
    rows.push(["Made from", `data ${model.lineage.dvc_md5}, commit ${String(model.lineage.git_commit).slice(0, 12)}, run ${model.lineage.run_id}`]);
    rows.push(["Golden check", `passed, off by ${model.golden_difference.toExponential(1)}`]);
    rows.push(["SHA-256", model.sha256]);
  }
  for (const item of refused) {
    rows.push([`Refused: ${item.tenant}`, `version ${item.version} (${item.alias}): ${item.reason}`]);
  }
  $("card").replaceChildren(...rows.flatMap(([name, value]) => [
    element("dt", name),
    element("dd", value, name.startsWith("Refused") ? "error" : ""),
  ]));
}

async function classify() {
  const model = current();
  if (!picture || !model) return;
  const number = ++asked;
  const began = performance.now();
  const response = await fetch(`v1/${address(model)}/classify?top=10`, { method: "POST", body: picture });
  const told = await response.json();
  const took = performance.now() - began;
  if (number !== asked) return; // a newer picture is on its way
  if (!response.ok) {
    $("answer").replaceChildren(element("p", told.error, "error"));
    return;
  }
  const best = element("p", told.unknown ? "unknown" : told.predictions[0].class, "best");
  const rows = told.predictions.map((one) => {
    const row = element("div", undefined, "row");
    const meter = element("meter");
    meter.value = one.probability;
    meter.setAttribute("aria-label", one.class);
    row.append(element("span", one.class), meter, element("span", percent(one.probability)));
    return row;
  });
  const timing = response.headers.get("server-timing") || "";
  const facts = `version ${told.version} · ${took.toFixed(0)} ms in all · ${timing.replaceAll(";dur=", " ").replaceAll(",", " ms,")} ms`;
  $("answer").replaceChildren(best, ...rows, element("p", facts, "facts"));
}

function take(file) {
  if (!file) return;
  picture = file;
  const image = $("preview");
  URL.revokeObjectURL(image.src);
  image.src = URL.createObjectURL(file);
  image.onload = () => image.classList.toggle("tiny", image.naturalWidth < 100);
  image.alt = file.name || "pasted picture";
  image.hidden = false;
  $("hint").hidden = true;
  classify();
}

$("file").addEventListener("change", (event) => take(event.target.files[0]));
$("model").addEventListener("change", () => refresh().then(classify));
document.addEventListener("paste", (event) => take([...event.clipboardData.files][0]));
document.addEventListener("dragover", (event) => { event.preventDefault(); $("drop").classList.add("over"); });
document.addEventListener("dragleave", () => $("drop").classList.remove("over"));
document.addEventListener("drop", (event) => {
  event.preventDefault();
  $("drop").classList.remove("over");
  take(event.dataTransfer.files[0]);
});
refresh();
setInterval(refresh, 5000);
