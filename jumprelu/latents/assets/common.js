"use strict";
// What both pages share: elements, data blocks, tokens, the theme. Text always goes through textContent.

const byId = (id) => document.getElementById(id);
const data = (id) => JSON.parse(byId(id).textContent);

/** An element: make("p", {class: "note", "aria-label": "…"}, "text", child, …). */
function make(tag, attributes = {}, ...children) {
  const svg = ["svg", "rect", "line", "text", "title", "g"].includes(tag);
  const element = svg ? document.createElementNS("http://www.w3.org/2000/svg", tag) : document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (value !== null && value !== undefined) element.setAttribute(name, value);
  }
  element.append(...children);
  return element;
}

/** The arrays that webpage.pack wrote to block `id`, by name; `count` is the length of the first axis. */
async function unpack(id, layout, count) {
  if (typeof DecompressionStream === "undefined") {
    throw new Error("This browser is too old to open the compressed contexts: it lacks DecompressionStream.");
  }
  const text = atob(byId(id).textContent), bytes = new Uint8Array(text.length);
  for (let k = 0; k < text.length; k++) bytes[k] = text.charCodeAt(k);
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("deflate"));
  const buffer = await new Response(stream).arrayBuffer();
  const types = {uint8: Uint8Array, int8: Int8Array, uint16: Uint16Array, int32: Int32Array, uint32: Uint32Array,
                 float32: Float32Array};
  const arrays = {};
  let offset = 0;
  for (const [name, type, shape] of layout) {
    const length = count * shape.reduce((a, b) => a * b, 1);
    const size = length * types[type].BYTES_PER_ELEMENT;
    arrays[name] = new types[type](buffer.slice(offset, offset + size));
    offset += size;
  }
  return arrays;
}

/** Text in which nothing hides: line ends and tabs get a mark, other control and direction characters their number. */
function visible(text) {
  return text.replace(/[\p{Cc}\p{Cf}\p{Co}\p{Cn}\u2028\u2029]/gu, (c) => {
    if (c === "\n") return "↵";
    if (c === "\t") return "→";
    return "⟨" + c.codePointAt(0).toString(16).toUpperCase().padStart(4, "0") + "⟩";
  });
}

/** A token for a list of tokens, where spaces must show, too: each of up to 3, else their number. */
const spaces = (run) => (run.length < 4 ? "␣".repeat(run.length) : `␣×${run.length}`);
const label = (text) => visible(text).replace(/^ +| +$| {4,}/g, spaces) || "(empty)";

/** A context: texts and their activations as bytes (255: the latent's maximum); `describe` gives a token's tooltip. */
function contextTokens(texts, acts, describe = () => null) {
  const line = make("p", {class: "tokens"});
  const most = Math.max(...acts);
  texts.forEach((text, i) => {
    const span = make("span", {title: acts[i] > 0 ? describe(acts[i]) : null}, visible(text));
    if (acts[i] > 0) {
      span.classList.add("on");
      span.classList.toggle("peak", acts[i] === most);
      span.style.setProperty("--share", `${Math.round(12 + (88 * acts[i]) / 255)}%`);
    }
    line.append(span);
  });
  return line;
}

/** A number in few characters. */
function brief(value, digits = 3) {
  if (value === null || value === undefined || Number.isNaN(value)) return "–";
  if (value === 0) return "0";
  const size = Math.abs(value);
  return size >= 1e-3 && size < 1e5 ? String(Number(value.toPrecision(digits))) : value.toExponential(digits - 1);
}

/** What localStorage does, or nothing where the browser refuses it. Returns whether it could be done. */
const storage = {
  read(key) { try { return localStorage.getItem(key); } catch { return null; } },
  write(key, value) { try { localStorage.setItem(key, value); return true; } catch { return false; } },
  remove(key) { try { localStorage.removeItem(key); return true; } catch { return false; } },
};

/** Theme: that of the system until the button is pressed. */
function useTheme(button) {
  const system = matchMedia("(prefers-color-scheme: dark)");
  const show = () => {
    const theme = storage.read("jumprelu-theme") || chosen || (system.matches ? "dark" : "light");
    document.documentElement.dataset.theme = theme;
    button.textContent = theme === "dark" ? "☀" : "☾";
    button.setAttribute("aria-label", theme === "dark" ? "Light theme" : "Dark theme");
    button.title = button.getAttribute("aria-label");
  };
  let chosen = null;
  button.addEventListener("click", () => {
    chosen = document.documentElement.dataset.theme === "dark" ? "light" : "dark";
    storage.write("jumprelu-theme", chosen);
    show();
  });
  system.addEventListener("change", show);
  show();
}

/** Whether a key press belongs to a text field. */
const typing = (event) => event.target.matches("input, textarea, select");
