// Pages of latents: a list that is sorted and searched, and one latent beside it.

const about = data("about");
const latents = data("latents"); // one array a property, all of the same length
const vocabulary = data("vocabulary");
const total = latents.number.length;
const placeOf = new Map(latents.number.map((number, i) => [number, i]));

const ORDERS = {
  number: ["number", false], frequency: ["frequency", true], score: ["score", true], threshold: ["threshold", true],
  maximum: ["strongest activation", true], decoder: ["decoder norm", true], encoder: ["encoder norm", true],
}; // name → [label, falling at first]
const ROW = 52; // pixels, as in the style
const list = byId("list"), rows = byId("rows"), search = byId("search"), sort = byId("sort"), direction = byId("direction");

const state = {order: "number", falling: false, query: "", shown: [], active: 0, open: null};

// ---- the list -------------------------------------------------------------------------------------------------

/** Put the latents that match the query in the order chosen, those without a value last; the list then begins at its top. */
function arrange() {
  const values = latents[state.order], sign = state.falling ? -1 : 1;
  const known = (i) => values[i] !== null;
  state.shown = [...Array(total).keys()].filter(matching(state.query)).sort((a, b) =>
    known(b) - known(a) || (known(a) ? sign * (values[a] - values[b]) : 0) || a - b);
  state.active = Math.max(0, state.shown.indexOf(state.open));
  const waiting = fires ? "" : "; reading tokens …";
  byId("found").textContent = state.query ? `${state.shown.length} of ${total} latents${waiting}` : `${total} latents`;
  direction.textContent = state.falling ? "↓" : "↑";
  direction.setAttribute("aria-label", state.falling ? "Falling; press for rising" : "Rising; press for falling");
  direction.title = direction.getAttribute("aria-label");
  rows.style.height = `${state.shown.length * ROW}px`;
  list.scrollTop = 0;
  draw();
}

/** Which places match: every word is in the explanation, in a token that the latent fires on, or is its number. */
function matching(query) {
  const words = query.toLowerCase().split(/\s+/).filter(Boolean);
  const tests = words.map((word) => {
    const firing = firingOn(word);
    return (i) => latents.explanation[i].toLowerCase().includes(word) || String(latents.number[i]) === word.replace("#", "") ||
      (firing !== null && firing[i]);
  });
  return (i) => tests.every((test) => test(i));
}

let fires = null; // for each place, the tokens of its contexts with an activation above 0
let reading = false;
/** For each place 1 if the latent fires on a token that holds `word`; null until the blocks have been read. */
function firingOn(word) {
  if (fires === null) {
    readFires();
    return null;
  }
  const hit = new Uint8Array(vocabulary.length);
  vocabulary.forEach((text, id) => { if (text.toLowerCase().includes(word)) hit[id] = 1; });
  return fires.map((tokens) => tokens.some((id) => hit[id]));
}

async function readFires() {
  if (reading) return;
  reading = true;
  const found = [];
  try {
    for (let number = 0; number * about.block < total; number++) {
      const {tokens, acts} = await blockOf(number);
      const size = about.slots * about.window;
      for (let start = 0; start < tokens.length; start += size) {
        found.push(tokens.subarray(start, start + size).filter((_, k) => acts[start + k] > 0));
      }
    }
    fires = found;
    arrange();
  } catch (error) {
    byId("found").textContent = error.message;
  }
}

/** Draw the rows that can be seen, and some around them. */
function draw() {
  const first = Math.max(0, Math.floor(list.scrollTop / ROW) - 4);
  const last = Math.min(state.shown.length, Math.ceil((list.scrollTop + list.clientHeight) / ROW) + 4);
  const drawn = [];
  for (let at = first; at < last; at++) {
    const i = state.shown[at];
    const row = make("div", {class: "row", role: "option", id: `row-${at}`, "aria-setsize": state.shown.length,
                             "aria-posinset": at + 1, "aria-selected": at === state.active});
    row.append(make("b", {}, `#${latents.number[i]}`), summary(i), make("span", {class: "note"}, noteOf(i)));
    row.style.top = `${at * ROW}px`;
    row.addEventListener("click", () => { state.active = at; go(i); });
    drawn.push(row);
  }
  rows.replaceChildren(...drawn);
  list.setAttribute("aria-activedescendant", `row-${state.active}`);
}

/** The explanation of a latent, or else the tokens at which it is strongest. */
function summary(i) {
  if (latents.explanation[i]) return make("span", {class: "words"}, visible(latents.explanation[i]));
  const tokens = latents.peak[i].map((id) => make("code", {}, label(vocabulary[id])));
  return make("span", {class: "peaks"}, ...(tokens.length ? tokens : ["never fires here"]));
}

function noteOf(i) {
  const parts = [`fires on ${percent(latents.frequency[i])}`];
  if (latents.score[i] !== null) parts.push(`score ${brief(latents.score[i], 2)}`);
  if (!["number", "frequency", "score"].includes(state.order)) {
    parts.push(`${ORDERS[state.order][0]} ${brief(latents[state.order][i])}`);
  }
  return parts.join(" · ");
}

const percent = (share) => `${brief(100 * share)} %`;

/** Scroll so that the active row is seen, and draw. */
function reveal() {
  const top = state.active * ROW;
  if (top < list.scrollTop) list.scrollTop = top;
  else if (top + ROW > list.scrollTop + list.clientHeight) list.scrollTop = top + ROW - list.clientHeight;
  draw();
}

function move(steps) {
  if (!state.shown.length) return;
  state.active = Math.min(state.shown.length - 1, Math.max(0, state.active + steps));
  reveal();
  if (state.open !== null) go(state.shown[state.active], true);
}

// ---- one latent -----------------------------------------------------------------------------------------------

const hashOf = (i) => `#latent=${latents.number[i]}`;

/** Open a latent: the address changes, and what it says is shown. */
function go(i, instead = false) {
  if (location.hash === hashOf(i)) return;
  if (instead) { // passing from one to the next leaves one step in the history
    history.replaceState(null, "", hashOf(i));
    follow();
  } else location.hash = hashOf(i);
}

/** Show what the address names. */
async function follow() {
  const named = /^#latent=(\d+)$/.exec(location.hash);
  const i = named ? placeOf.get(Number(named[1])) : undefined;
  state.open = i ?? null;
  document.body.classList.toggle("open", named !== null);
  byId("detail").hidden = named === null;
  byId("empty").hidden = named !== null;
  document.title = named ? `${named[1]} · ${about.title}` : about.title;
  if (named === null) return reveal(); // on a phone the list was away
  byId("heading").textContent = `Latent ${named[1]}`;
  byId("permalink").href = location.hash;
  for (const id of ["explanation", "facts", "parts"]) byId(id).replaceChildren();
  byId("detail").scrollTop = 0;
  if (i === undefined) {
    byId("explanation").textContent = "This page does not have it.";
    return draw();
  }
  const at = state.shown.indexOf(i);
  if (at >= 0) state.active = at;
  reveal();
  byId("previous").disabled = at === 0;
  byId("next").disabled = at === state.shown.length - 1;
  byId("explanation").textContent = visible(latents.explanation[i]);
  byId("facts").replaceChildren(...factsOf(i));
  try {
    const shown = await contentOf(i);
    if (state.open === i) byId("parts").replaceChildren(...partsOf(i, shown));
  } catch (error) {
    byId("parts").replaceChildren(make("p", {class: "warning"}, error.message));
  }
}

function factsOf(i) {
  const facts = {"fires on": percent(latents.frequency[i]), "threshold": brief(latents.threshold[i]),
                 "strongest": brief(latents.maximum[i]), "score": brief(latents.score[i], 2),
                 "decoder norm": brief(latents.decoder[i]), "encoder norm": brief(latents.encoder[i])};
  if (latents.score[i] === null) delete facts.score;
  return Object.entries(facts).map(([name, value]) => make("div", {}, make("dt", {}, name), make("dd", {}, value)));
}

/** The arrays of a block, of which the last ones are remembered. */
const blocks = new Map(); // number → promise
function blockOf(number) {
  const count = Math.min(about.block, total - number * about.block);
  if (!blocks.has(number)) blocks.set(number, whole.then(() => unpack(`block-${number}`, about.layout, count)));
  if (blocks.size > 16) blocks.delete(blocks.keys().next().value);
  return blocks.get(number);
}

/** The arrays of latent i: name → its part. */
async function contentOf(i) {
  const number = Math.floor(i / about.block), arrays = await blockOf(number), at = i - number * about.block;
  return Object.fromEntries(about.layout.map(([name, , shape]) => {
    const size = shape.reduce((a, b) => a * b, 1);
    return [name, arrays[name].subarray(at * size, (at + 1) * size)];
  }));
}

function partsOf(i, shown) {
  const effects = (ids, values) => [...ids].map((id, k) =>
    make("li", {}, make("code", {}, label(vocabulary[id])), make("span", {}, values[k].toFixed(2))));
  const near = [...shown.near].map((number, k) => {
    const place = placeOf.get(number);
    return make("li", {}, make("a", {href: `#latent=${number}`}, `#${number}`), place === undefined ? "" : summary(place),
      make("span", {}, shown.cosine[k].toFixed(2)));
  });
  const column = (title, list) => make("section", {}, make("h3", {}, title), make("ol", {class: "effects"}, ...list));
  return [
    make("div", {class: "columns"},
      make("section", {}, make("h3", {}, "Activations above 0 (counts, logarithmic)"), histogram(i, shown.histogram)),
      column("Nearest latents by decoder cosine", near)),
    make("div", {class: "columns"}, column("Promotes", effects(shown.top, shown.topValue)),
      column("Suppresses", effects(shown.bottom, shown.bottomValue))),
    make("p", {class: "note"}, "Tokens by atom · final norm's weight · unembedding, mean-centred: " +
      "later blocks and the norm's division are left out."),
    make("h2", {}, "Contexts"), ...groupsOf(i, shown),
  ];
}

/** Bars of log(1 + count), with the threshold and the ends of the axis. */
function histogram(i, counts) {
  const [width, height, base] = [320, 110, 92], most = Math.log1p(Math.max(1, ...counts)), step = width / counts.length;
  const top = latents.maximum[i];
  const bars = [...counts].map((count, k) => {
    const tall = (base - 12) * Math.log1p(count) / most;
    const ends = `${brief(top * k / counts.length)} to ${brief(top * (k + 1) / counts.length)}`;
    return make("rect", {x: k * step + .5, width: step - 1, y: base - tall, height: tall}, make("title", {}, `${ends}: ${count}`));
  });
  const svg = make("svg", {class: "histogram", viewBox: `0 0 ${width} ${height}`, role: "img",
                           "aria-label": `Histogram of activations from 0 to ${brief(top)}, most in a bin: ${Math.max(...counts)}`},
    ...bars, make("line", {x1: 0, x2: width, y1: base, y2: base}));
  if (latents.threshold[i] > 0 && latents.threshold[i] < top) {
    const x = width * latents.threshold[i] / top;
    svg.append(make("line", {class: "threshold", x1: x, x2: x, y1: 4, y2: base}, make("title", {}, "threshold")));
  }
  svg.append(make("text", {x: 0, y: height - 5}, "0"), make("text", {x: width, y: height - 5, "text-anchor": "end"}, brief(top)),
    make("text", {x: width, y: 9, "text-anchor": "end"}, `highest bar ${Math.max(...counts)}`));
  return svg;
}

/** Contexts below their titles: the top ones, then from each quantile, then silent ones. */
function groupsOf(i, shown) {
  const bins = Math.max(0, ...shown.quantile);
  const titles = new Map([[0, "Strongest"]]);
  for (let q = 1; q <= bins; q++) {
    titles.set(q, `Quantile ${q} of ${bins}` + (q === 1 ? " (strongest)" : q === bins ? " (weakest)" : ""));
  }
  titles.set(-1, "Silent: the latent does not fire");
  return [...titles].map(([kind, title]) => {
    const box = make("div", {class: "box"});
    for (let slot = 0; slot < about.slots; slot++) if (shown.quantile[slot] === kind) box.append(contextOf(i, shown, slot));
    return box.childElementCount ? make("section", {class: "group"}, make("h3", {}, title), box) : null;
  }).filter(Boolean);
}

function contextOf(i, shown, slot) {
  const [from, to] = [slot * about.window, (slot + 1) * about.window];
  const inside = [...Array(about.window).keys()].filter((k) => shown.tokens[from + k] > 0);
  const acts = inside.map((k) => shown.acts[from + k]);
  const value = (act) => `about ${brief(latents.maximum[i] * act / 255)}`;
  const [document, row, position] = shown.where.subarray(slot * 3, slot * 3 + 3);
  const strongest = Math.max(0, ...shown.acts.subarray(from, to));
  const note = `document ${document}, row ${row}, position ${position}` + (strongest ? `, activation ${value(strongest)}` : "");
  return make("div", {class: "context"}, contextTokens(inside.map((k) => vocabulary[shown.tokens[from + k]]), acts, value),
    make("p", {class: "note"}, note));
}

// ---- keys and start -------------------------------------------------------------------------------------------

function close() {
  history.pushState(null, "", location.pathname + location.search);
  follow();
  list.focus();
}

function onKey(event) {
  if (event.ctrlKey || event.metaKey || event.altKey || event.isComposing) return;
  const page = Math.max(1, Math.floor(list.clientHeight / ROW) - 1);
  const moves = {ArrowDown: 1, j: 1, ArrowUp: -1, k: -1, PageDown: page, PageUp: -page, Home: -total, End: total};
  const scrolls = byId("detail").contains(event.target) && event.key.length > 1; // arrows scroll what is being read
  if (event.target === search && ["Enter", "ArrowDown"].includes(event.key) && state.shown.length) {
    list.focus();
    if (event.key === "Enter") go(state.shown[state.active]);
  } else if (event.key === "Escape" && (event.target === search || (state.query && !location.hash))) {
    search.value = state.query = "";
    arrange();
    list.focus();
  } else if (typing(event)) return;
  else if (event.key === "/") {
    if (document.body.classList.contains("open") && !byId("finder").offsetParent) close(); // narrow: the list is hidden
    search.focus();
    search.select();
  } else if (event.key === "Escape" && location.hash) close();
  else if (event.key === "Enter" && event.target === list && state.shown.length) go(state.shown[state.active]);
  else if (event.key in moves && !scrolls) move(moves[event.key]);
  else return;
  event.preventDefault();
}

/** Resolves when the whole file has been read. */
const whole = new Promise((done) => {
  if (document.readyState !== "loading") done();
  else document.addEventListener("DOMContentLoaded", done);
});

for (const [name, [text]] of Object.entries(ORDERS)) {
  if (name === "number" || latents[name].some((value) => value !== null)) sort.append(make("option", {value: name}, `by ${text}`));
}
byId("title").textContent = about.title;
byId("summary").textContent = about.all ? `all latents, L0 ${brief(about.l0)}` : `${total} of ${about.d_sae} latents`;
useTheme(byId("theme"));
byId("controls").addEventListener("submit", (event) => event.preventDefault());
sort.addEventListener("change", () => {
  [state.order, state.falling] = [sort.value, ORDERS[sort.value][1]];
  arrange();
});
direction.addEventListener("click", () => { state.falling = !state.falling; arrange(); });
search.addEventListener("input", () => { state.query = search.value; arrange(); });
list.addEventListener("scroll", draw, {passive: true});
addEventListener("resize", draw);
addEventListener("hashchange", follow);
addEventListener("popstate", follow);
document.addEventListener("keydown", onKey);
byId("back").addEventListener("click", close);
byId("previous").addEventListener("click", () => move(-1));
byId("next").addEventListener("click", () => move(1));
arrange();
follow();
requestAnimationFrame(() => performance.mark("list shown"));
