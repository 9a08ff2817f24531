// Blind ratings of latents: one item at a time, kept in this browser, exported as CSV.

const about = data("about");
const vocabulary = data("vocabulary");
const items = about.items; // ids, in the order shown
const KEY = `jumprelu-study:${about.study}`;
const RATINGS = {y: "YES", m: "MAYBE", n: "NO"};
const COLUMNS = ["study", "item", "rating", "explanation", "rater", "time"];

let saved = {rater: "", at: 0, entries: {}}; // entries: item → {rating, explanation, time}
let unsaved = false; // the browser refused to keep something
let arrays = null;

// ---- what is kept ---------------------------------------------------------------------------------------------

/** Read what this browser has of the study. Whatever does not fit is left out. */
function load() {
  try {
    const found = JSON.parse(storage.read(KEY) ?? "null");
    if (!found) return;
    const entries = Object.entries(found.entries).filter(([item, entry]) => items.includes(item) &&
      ["", ...Object.values(RATINGS)].includes(entry.rating) && typeof entry.explanation === "string");
    const at = Number.isInteger(found.at) && items[found.at] ? found.at : 0;
    saved = {rater: String(found.rater), at, entries: Object.fromEntries(entries)};
  } catch {
    warn("What this browser had kept of the study could not be read: it starts anew.");
  }
}

function keep() {
  if (storage.write(KEY, JSON.stringify(saved))) {
    unsaved = false;
    return;
  }
  unsaved = true;
  warn("This browser does not keep what you enter here (its storage is full or switched off). Export before you close or " +
    "reload the page.");
}

function warn(text) {
  byId("warning").textContent = text;
  byId("warning").hidden = false;
}

/** The entry of an item, made if it is not there. */
const entryOf = (item) => (saved.entries[item] ??= {rating: "", explanation: "", time: ""});

const rated = () => items.filter((item) => saved.entries[item]?.rating);

// ---- the page -------------------------------------------------------------------------------------------------

function show() {
  const entry = saved.entries[items[saved.at]];
  byId("heading").textContent = `Item ${saved.at + 1} of ${items.length}`;
  byId("contexts").replaceChildren(...groups(saved.at));
  byId("explanation").value = entry?.explanation ?? "";
  byId("rater").value = saved.rater;
  byId("previous").disabled = saved.at === 0;
  byId("next").disabled = saved.at === items.length - 1;
  showState();
}

function showState() {
  const rating = saved.entries[items[saved.at]]?.rating ?? "", count = rated().length;
  for (const button of document.querySelectorAll(".rating")) {
    button.setAttribute("aria-pressed", String(button.dataset.rating === rating));
  }
  byId("progress").max = items.length;
  byId("progress").value = count;
  byId("state").textContent = `${rating ? `Rated ${rating}. ` : ""}${count} of ${items.length} rated` +
    (count === items.length ? ": finished, export the CSV." : ".");
  byId("export").disabled = count === 0;
}

function groups(at) {
  if (arrays === null) return [];
  const quantile = arrays.quantile.subarray(at * about.slots, (at + 1) * about.slots);
  const titles = {"Most active": (q) => q === 0, "Drawn from all levels of activity, falling": (q) => q > 0,
                  "Not active": (q) => q === -1};
  return Object.entries(titles).map(([title, belongs]) => {
    const box = make("div", {class: "box"});
    quantile.forEach((kind, slot) => { if (belongs(kind)) box.append(context(at * about.slots + slot)); });
    return box.childElementCount ? make("section", {class: "group"}, make("h3", {}, title), box) : null;
  }).filter(Boolean);
}

function context(place) {
  const tokens = arrays.tokens.subarray(place * about.window, (place + 1) * about.window);
  const acts = arrays.acts.subarray(place * about.window, (place + 1) * about.window);
  const inside = [...tokens.keys()].filter((k) => tokens[k] > 0);
  const describe = (act) => `${Math.round(act / 2.55)} % of the greatest activation`;
  const texts = inside.map((k) => vocabulary[tokens[k]]);
  return make("div", {class: "context"}, contextTokens(texts, inside.map((k) => acts[k]), describe));
}

function rate(rating) {
  const entry = entryOf(items[saved.at]);
  entry.rating = entry.rating === rating ? "" : rating;
  entry.time = new Date().toISOString();
  keep();
  showState();
}

function goTo(at) {
  if (at < 0 || at >= items.length) return;
  saved.at = at;
  keep();
  show();
  byId("item").scrollTop = 0;
}

/** On to the first unrated item behind this one, or else the first of all. */
function goToUnrated() {
  const open = items.map((_, k) => k).filter((k) => !saved.entries[items[k]]?.rating);
  const next = open.find((k) => k > saved.at) ?? open[0];
  if (next !== undefined) goTo(next);
  byId("item").focus({preventScroll: true});
}

// ---- export ---------------------------------------------------------------------------------------------------

/** CRC-32 of bytes, continued from `start`, as zlib has it. */
function crc32(bytes, start) {
  let crc = ~start;
  for (const byte of bytes) {
    crc ^= byte;
    for (let k = 0; k < 8; k++) crc = (crc >>> 1) ^ (crc & 1 ? 0xEDB88320 : 0);
  }
  return ~crc >>> 0;
}

/** A cell that a spreadsheet takes for text: what could begin a formula gets an apostrophe in front, as does an apostrophe. */
const guarded = (text) => (/^[=+\-@＝＋－＠'\t\r]/.test(text) ? "'" + text : text);

/** The ratings as CSV. A row's checksum goes on from that of the row before, so that a change shows. */
function asCsv() {
  const encoder = new TextEncoder(), cell = (text) => `"${guarded(text).replaceAll('"', '""')}"`;
  const plain = (text) => text.replace(/[\s\p{Cc}]+/gu, " ").trim(); // one line a row
  let crc = crc32(encoder.encode(about.study + about.digest), 0);
  const lines = rated().map((item) => {
    const {rating, explanation, time} = saved.entries[item];
    const fields = [about.study, item, rating, plain(explanation), plain(saved.rater), time];
    crc = crc32(encoder.encode(fields.join("\x1f")), crc);
    return [...fields, crc.toString(16).padStart(8, "0")].map(cell).join(",");
  });
  return "\ufeff" + [[...COLUMNS, "checksum"].join(","), ...lines, ""].join("\r\n"); // the mark tells spreadsheets that it is UTF-8
}

function exportCsv() {
  if (!saved.rater.trim()) {
    warn("Enter your name or initials first: the file is handed in under it.");
    byId("rater").focus();
    return;
  }
  byId("warning").hidden = !unsaved;
  const url = URL.createObjectURL(new Blob([asCsv()], {type: "text/csv;charset=utf-8"}));
  const name = saved.rater.trim().replace(/[^\p{L}\p{N}]+/gu, "-");
  make("a", {href: url, download: `ratings-${about.study}-${name}.csv`}).click();
  setTimeout(() => URL.revokeObjectURL(url), 10_000);
}

// ---- keys and start -------------------------------------------------------------------------------------------

function onKey(event) {
  if (event.isComposing) return;
  if (event.key === "Enter" && event.ctrlKey) goToUnrated();
  else if (event.ctrlKey || event.metaKey || event.altKey) return;
  else if (event.key === "Escape" && typing(event)) byId("item").focus({preventScroll: true});
  else if (typing(event)) return;
  else if (event.key.toLowerCase() in RATINGS) rate(RATINGS[event.key.toLowerCase()]);
  else if (event.key === "ArrowRight") goTo(saved.at + 1);
  else if (event.key === "ArrowLeft") goTo(saved.at - 1);
  else if (event.key === "e") byId("explanation").focus();
  else if (event.key === "Enter" && !event.target.closest("button, summary")) goToUnrated();
  else return;
  event.preventDefault();
}

async function start() {
  byId("title").textContent = about.title;
  useTheme(byId("theme"));
  load();
  byId("help").open = !rated().length;
  show();
  document.addEventListener("keydown", onKey);
  for (const button of document.querySelectorAll(".rating")) {
    button.addEventListener("click", () => rate(button.dataset.rating));
  }
  byId("previous").addEventListener("click", () => goTo(saved.at - 1));
  byId("next").addEventListener("click", () => goTo(saved.at + 1));
  byId("explanation").addEventListener("input", (event) => { entryOf(items[saved.at]).explanation = event.target.value; keep(); });
  byId("rater").addEventListener("input", (event) => { saved.rater = event.target.value; keep(); });
  byId("export").addEventListener("click", exportCsv);
  byId("clear").addEventListener("click", () => {
    if (!confirm("Forget all ratings of this study in this browser? Export them first.")) return;
    saved = {rater: "", at: 0, entries: {}};
    keep();
    show();
  });
  addEventListener("storage", (event) => { if (event.key === KEY) { load(); show(); } }); // another tab went on
  addEventListener("beforeunload", (event) => { if (unsaved && rated().length) event.preventDefault(); });
  keep(); // so that a browser that keeps nothing says so at once
  if (document.readyState === "loading") await new Promise((done) => document.addEventListener("DOMContentLoaded", done));
  try {
    arrays = await unpack("items", about.layout, items.length);
    show();
  } catch (error) {
    warn(error.message);
  }
}

start();
