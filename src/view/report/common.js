// What the pages share: the report that lies in them, the look of methods, charts, fronts and tables.
"use strict";

const report = JSON.parse(document.getElementById("report").textContent);
const element = (id) => document.getElementById(id);
const unique = (values) => [...new Set(values)];
// The palette of Okabe and Ito, which colour-blind eyes tell apart; point shapes repeat the distinction.
const colours = ["#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000", "#8a8a00"];
const shapes = ["circle", "triangle", "rect", "rectRot", "star", "cross", "crossRot", "dash"];
const looksOf = (methods) => new Map(methods.map((method, i) => [method, {
  colour: colours[i % colours.length],
  shape: shapes[(i + Math.floor(i / colours.length)) % shapes.length],
}]));
const mean = (values) => values.reduce((sum, x) => sum + x, 0) / values.length;
const geometric = (values) => Math.exp(mean(values.map((x) => Math.log(Math.max(x, 1e-12)))));

/// Points that no other point beats in both directions. The signs say whether small (1) or large (-1) values are good.
function paretoFront(points, signX, signY = 1) {
  const sorted = [...points].sort((a, b) => signX * (a.x - b.x) || signY * (a.y - b.y));
  const front = [];
  for (const point of sorted) {
    if (front.length === 0 || signY * point.y < signY * front[front.length - 1].y) front.push(point);
  }
  return front;
}

const charts = new Map();
function draw(id, configuration) {
  charts.get(id)?.destroy();
  configuration.options = { animation: false, maintainAspectRatio: false, ...configuration.options };
  charts.set(id, new Chart(element(id), configuration));
}

const axis = (text, type, extra) => ({ type, title: { display: true, text }, ...extra });
const short = (value) => Math.abs(value) >= 1000 ? Math.round(value).toLocaleString("en")
  : Number(value).toPrecision(3).replace(/(\.[0-9]*?)0+$/, "$1").replace(/\.$/, "");

/// One dataset of points in the look of a method.
const dataset = (method, look, data, extra) => ({
  label: method, data, showLine: true, borderWidth: 1.5, borderColor: look.colour, backgroundColor: look.colour,
  pointStyle: look.shape, pointRadius: 5, ...extra,
});
const frontOf = (points, signX, signY) => ({
  label: "Pareto front", data: paretoFront(points, signX, signY), showLine: true, borderColor: "#777",
  borderDash: [5, 4], borderWidth: 1, pointRadius: 0,
});

/// Fills a table: columns are [name, value of a row]; a click on a head sorts by it, a second one the other way.
/// `whenChosen` is called with the row of a line that is clicked.
function makeTable(id, columns, rows, whenChosen) {
  const fill = (sorted) => element(id).tBodies[0].replaceChildren(...sorted.map((row) => {
    const line = document.createElement("tr");
    for (const [, value] of columns) {
      const cell = document.createElement("td");
      const content = value(row);
      const text = typeof content === "string";
      cell.textContent = content === undefined || content === null ? "" : text ? content
        : Number.isInteger(content) ? String(content) : short(content);
      if (text) cell.className = "text";
      line.append(cell);
    }
    if (whenChosen) line.addEventListener("click", () => whenChosen(row));
    return line;
  }));
  const head = document.createElement("tr");
  columns.forEach(([name, value]) => {
    const cell = document.createElement("th");
    cell.textContent = name;
    if (rows.length > 0 && typeof value(rows[0]) === "string") cell.className = "text";
    cell.addEventListener("click", () => {
      const descending = cell.getAttribute("aria-sort") === "ascending";
      for (const other of head.cells) other.removeAttribute("aria-sort");
      cell.setAttribute("aria-sort", descending ? "descending" : "ascending");
      const order = (a, b) => {
        const x = value(a);
        const y = value(b);
        if (x === undefined || x === null) return 1;  // missing values stay at the end
        if (y === undefined || y === null) return -1;
        return (descending ? -1 : 1) * (x < y ? -1 : x > y ? 1 : 0);
      };
      fill([...rows].sort(order));
    });
    head.append(cell);
  });
  element(id).tHead.append(head);
  fill(rows);
}

function fillChoice(id, values, whenChanged, text = String) {
  element(id).replaceChildren(...values.map((value) => new Option(text(value), String(value))));
  element(id).addEventListener("change", whenChanged);
}

element("command").textContent = report.command;
