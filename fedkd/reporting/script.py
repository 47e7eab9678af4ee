"""The script of every page: values under the pointer, a legend that switches, tables that sort.

It sends and fetches nothing, and the page is complete without it. A browser runs this text alone:
the page's policy names its hash.
"""

import base64
import hashlib

SCRIPT = r"""
"use strict";
const make = (tag, look, text) => Object.assign(document.createElement(tag),
  { className: look || "", textContent: text || "" });
const tip = make("div", "tip");
tip.setAttribute("role", "status");
tip.hidden = true;
document.body.append(tip);
const show = (text, x, y) => {
  tip.textContent = text;
  tip.hidden = false;
  const room = document.documentElement.clientWidth - tip.offsetWidth - 8;
  tip.style.left = Math.max(8, Math.min(x + 14, room)) + scrollX + "px";
  tip.style.top = Math.max(4, y - tip.offsetHeight - 12) + scrollY + "px";
};

const switches = new Map(); // a series' name -> what shows it or not, in all figures
for (const box of document.querySelectorAll(".figure[data-values]")) {
  const svg = box.querySelector("svg"), values = JSON.parse(box.dataset.values);
  const ring = document.createElementNS(svg.namespaceURI, "circle");
  ring.setAttribute("r", 5);
  ring.setAttribute("class", "ring");
  const off = new Set();
  const points = values.series.flatMap((s) => s.p.map((place, i) =>
    ({ k: s.k, x: place[0], y: place[1], text: [s.n, s.t[i]].filter(Boolean).join(": ") })));
  let at = -1;
  const mark = (point) => {
    const m = svg.getScreenCTM();
    ring.setAttribute("cx", point.x);
    ring.setAttribute("cy", point.y);
    svg.append(ring);
    show(point.text, point.x * m.a + m.e, point.y * m.d + m.f);
  };
  const leave = () => { ring.remove(); tip.hidden = true; at = -1; };
  svg.addEventListener("pointermove", (event) => {
    const m = svg.getScreenCTM();
    const x = (event.clientX - m.e) / m.a, y = (event.clientY - m.f) / m.d;
    let best = null, least = 22 * 22;
    for (const point of points) {
      if (off.has(point.k)) continue;
      const d = (point.x - x) ** 2 + (point.y - y) ** 2;
      if (d < least) { least = d; best = point; }
    }
    if (best) { at = points.indexOf(best); mark(best); return; }
    for (const g of values.grids) {
      const [left, top, right, bottom] = g.box, rows = g.rows.length, columns = g.columns.length;
      if (x < left || x > right || y < top || y > bottom) continue;
      const r = Math.min(rows - 1, Math.floor((y - top) / (bottom - top) * rows));
      const c = Math.min(columns - 1, Math.floor((x - left) / (right - left) * columns));
      ring.remove();
      show(`${g.rows[r]} · ${g.columns[c]}: ${g.t[r][c]}`, event.clientX, event.clientY);
      return;
    }
    leave();
  });
  svg.addEventListener("pointerleave", leave);
  box.addEventListener("blur", leave);
  box.addEventListener("keydown", (event) => {
    const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    if (event.key === "Escape") leave();
    if (!step || event.target !== box) return;
    const there = points.filter((point) => !off.has(point.k));
    if (!there.length) return;
    event.preventDefault();
    at = (Math.max(-1, there.indexOf(points[at])) + step + there.length) % there.length;
    mark(there[at]);
    at = points.indexOf(there[at]);
  });
  const parts = new Map();
  for (const part of svg.querySelectorAll("[data-k]")) {
    const key = +part.dataset.k;
    if (!parts.has(key)) parts.set(key, { drawn: [], entries: [] });
    parts.get(key)["legend" in part.dataset ? "entries" : "drawn"].push(part);
  }
  for (const [key, { drawn, entries }] of parts) {
    if (!drawn.length) continue;
    const flip = () => {
      off.has(key) ? off.delete(key) : off.add(key);
      drawn.forEach((part) => { part.style.display = off.has(key) ? "none" : ""; });
      entries.forEach((part) => {
        part.style.opacity = off.has(key) ? 0.3 : 1;
        if (part.hasAttribute("role")) part.setAttribute("aria-pressed", !off.has(key));
      });
      leave();
    };
    const name = values.series.find((series) => series.k === key)?.n;
    const turn = (on) => { if (on === off.has(key)) flip(); };
    switches.set(name, [...(switches.get(name) || []), turn]);
    if (box.dataset.first && [...parts.keys()].indexOf(key) >= +box.dataset.first) flip();
    for (const part of entries) {
      part.classList.add("switch");
      part.addEventListener("click", flip);
      if (!part.querySelector("text")) continue;
      part.setAttribute("role", "button");
      part.setAttribute("tabindex", 0);
      part.setAttribute("aria-pressed", !off.has(key));
      part.addEventListener("keydown", (event) => {
        if (event.key === "Enter" || event.key === " ") { event.preventDefault(); flip(); }
      });
    }
  }
}

for (const row of document.querySelectorAll("tr[data-series]")) {
  const turns = switches.get(row.dataset.series), first = document.querySelector("[data-first]");
  if (!turns) continue;
  const tick = make("input");
  tick.type = "checkbox";
  tick.checked = [...switches.keys()].indexOf(row.dataset.series) < +first.dataset.first;
  tick.setAttribute("aria-label", "show the curves of " + row.dataset.series);
  tick.addEventListener("change", () => turns.forEach((turn) => turn(tick.checked)));
  row.cells[0].prepend(tick);
}

for (const box of document.querySelectorAll("[data-configs]")) {
  const configs = JSON.parse(box.dataset.configs), names = Object.keys(configs);
  const bar = make("div", "choose"), table = make("table"), scroll = make("div", "scroll");
  const line = (tag, texts) => {
    const row = make("tr");
    texts.forEach((text) => row.append(make(tag, "", text)));
    return row;
  };
  const plain = (value) => value === undefined ? "\u2013" : String(value);
  const fill = () => {
    const [a, b] = chosen.map((list) => configs[list.value]);
    const keys = [...new Set([...Object.keys(a), ...Object.keys(b)])].sort()
      .filter((key) => String(a[key]) !== String(b[key]));
    table.replaceChildren(line("th", ["key", ...chosen.map((list) => list.value)]),
      ...keys.map((key) => line("td", [key, plain(a[key]), plain(b[key])])));
    if (!keys.length) table.append(line("td", ["no difference"]));
  };
  const chosen = [0, 1].map((place) => {
    const list = make("select");
    list.setAttribute("aria-label", place ? "second config" : "first config");
    names.forEach((name) => list.append(make("option", "", name)));
    list.selectedIndex = Math.min(place, names.length - 1);
    list.addEventListener("change", fill);
    bar.append(list);
    return list;
  });
  scroll.append(table);
  box.append(bar, scroll);
  if (names.length) fill();
}

const units = { kB: 1e3, MB: 1e6, GB: 1e9, k: 1e3, M: 1e6, G: 1e9, T: 1e12, min: 60, h: 3600 };
const number = (text) => {
  const clean = text.replaceAll("\u2212", "-").replaceAll(",", "");
  const found = clean.match(/^[±+]?\s*(-?\d+(?:\.\d+)?(?:e[-+]?\d+)?)\s*([A-Za-z]*)/);
  return found ? +found[1] * (units[found[2]] || 1) : NaN;
};
const text = (cell) => [...(cell?.childNodes || [])].filter((n) => n.nodeName !== "SMALL")
  .map((n) => n.textContent).join("").replace(/\s+/g, " ").trim();
// A cell's numbers as they are: in full precision, a mean and its deviation each for itself.
const exact = (cell) => (cell?.dataset.exact || "").split(" ").filter(Boolean);
const quoted = (value) => {
  let plain = value.replaceAll("\u2212", "-");
  if (/^[=+@\t\r-]/.test(plain) && isNaN(number(plain))) plain = "'" + plain;
  return /[",\n]/.test(plain) ? `"${plain.replaceAll('"', '""')}"` : plain;
};
for (const table of document.querySelectorAll("main table:has(tbody)")) {
  const body = table.tBodies[0], box = table.closest(".scroll"), rows = [...body.rows];
  const heads = table.tHead ? [...table.tHead.rows[0].cells] : [];
  const bar = make("div", "tools");
  if (rows.length > 12) {
    const field = make("input");
    Object.assign(field, { type: "search", placeholder: "filter rows" });
    field.setAttribute("aria-label", "filter rows");
    field.addEventListener("input", () => {
      const wanted = field.value.toLowerCase().split(/\s+/);
      for (const row of rows) {
        const shown = row.textContent.toLowerCase();
        row.hidden = !wanted.every((word) => shown.includes(word));
      }
    });
    bar.append(field);
  }
  if (heads.length) {
    const save = make("button", "", "CSV");
    save.setAttribute("aria-label", "save this table as CSV");
    save.addEventListener("click", () => {
      const columns = heads.map((head, place) => {
        const cells = rows.map((row) => row.cells[place]), name = text(head);
        const unit = cells.find((cell) => cell?.dataset.unit)?.dataset.unit;
        const title = unit && !name.includes(unit) ? `${name}, ${unit}` : name;
        const parts = Math.max(1, ...cells.map((cell) => exact(cell).length));
        return { place, parts, titles: parts > 1 ? [title, `${title} \u00b1`] : [title] };
      }).filter(({ place }) => !rows[0]?.cells[place]?.classList.contains("bar"));
      const lines = [...body.rows].filter((row) => !row.hidden)
        .map((row) => columns.flatMap(({ place, parts }) => {
          const cell = row.cells[place], numbers = exact(cell);
          const found = numbers.length ? numbers : [text(cell)];
          return [...found, ...Array(parts - found.length).fill("")];
        }));
      const csv = [columns.flatMap((column) => column.titles), ...lines];
      const whole = csv.map((line) => line.map(quoted).join() + "\n").join("");
      const link = make("a");
      link.href = URL.createObjectURL(new Blob([whole], { type: "text/csv" }));
      link.download = (box.getAttribute("aria-label") || "table").replace(/[^\w]+/g, "-") + ".csv";
      link.click();
    });
    bar.append(save);
    box.before(bar);
  }
  if (rows.length < 3) continue;
  heads.forEach((head, place) => {
    if (!head.textContent.trim()) return;
    const button = make("button", "sort", head.textContent.trim());
    head.replaceChildren(button);
    button.addEventListener("click", () => {
      const up = head.getAttribute("aria-sort") === "descending";
      heads.forEach((other) => other.removeAttribute("aria-sort"));
      head.setAttribute("aria-sort", up ? "ascending" : "descending");
      const key = (row) => exact(row.cells[place])[0] || text(row.cells[place]);
      const compare = (a, b) => {
        const [x, y] = [number(key(a)), number(key(b))];
        if (isNaN(x) !== isNaN(y)) return isNaN(x) ? 1 : -1;
        return (up ? 1 : -1) * (isNaN(x) ? key(a).localeCompare(key(b)) : x - y);
      };
      const ordered = [...body.rows].filter((row) => !row.classList.contains("total"));
      ordered.sort(compare);
      body.prepend(...ordered);
    });
  });
}
const hints = () => {
  for (const box of document.querySelectorAll(".scroll, .figure"))
    box.classList.toggle("cut", box.scrollWidth > box.clientWidth + 4);
};
addEventListener("resize", hints);
for (const fold of document.querySelectorAll("details")) fold.addEventListener("toggle", hints);
hints();
"""

DIGEST = base64.b64encode(hashlib.sha256(SCRIPT.encode()).digest()).decode()
"""What the page's policy says of it."""
