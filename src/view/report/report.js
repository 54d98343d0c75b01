// Draws the page from the report that lies in it.
"use strict";

const report = JSON.parse(document.getElementById("report").textContent);
const rows = report.rows;
const element = (id) => document.getElementById(id);
const unique = (values) => [...new Set(values)];
const methods = unique(rows.map((row) => row.method));
// The palette of Okabe and Ito, which colour-blind eyes tell apart; point shapes repeat the distinction.
const colours = ["#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000", "#8a8a00"];
const shapes = ["circle", "triangle", "rect", "rectRot", "star", "cross", "crossRot", "dash"];
const look = new Map(methods.map((method, i) => [method, {
  colour: colours[i % colours.length],
  shape: shapes[(i + Math.floor(i / colours.length)) % shapes.length],
}]));
const mean = (values) => values.reduce((sum, x) => sum + x, 0) / values.length;
const geometric = (values) => Math.exp(mean(values.map((x) => Math.log(Math.max(x, 1e-12)))));

/// Draws of one setting as one point: keyed by target density, seeds averaged.
function settings(data, length, method) {
  const chosen = rows.filter((row) => row.data === data && row.len === length && row.method === method);
  const groups = new Map();
  for (const row of chosen) {
    const key = String(row.target_density);
    if (!groups.has(key)) groups.set(key, []);
    groups.get(key).push(row);
  }
  return [...groups.values()].map((group) => ({
    spec: unique(group.map((row) => row.spec)).join(" / "),
    target: group[0].target_density,
    density: mean(group.map((row) => row.executed_density)),
    flops: mean(group.map((row) => row.flops / row.dense_flops)),
    error: geometric(group.map((row) => row.error.rel_l2)),
    mass: mean(group.map((row) => row.error.softmax_mass)),
    speed: geometric(group.map((row) => row.speed_up)),
    quality: group.every((row) => row.quality) ? group.map((row) => row.quality) : null,
  }));
}

/// Points that no other point beats in both directions. `sign` says whether small (1) or large (-1) x is good.
function paretoFront(points, sign) {
  const sorted = [...points].sort((a, b) => sign * (a.x - b.x) || a.y - b.y);
  const front = [];
  for (const point of sorted) {
    if (front.length === 0 || point.y < front[front.length - 1].y) front.push(point);
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
const short = (value) => Number(value).toPrecision(3).replace(/\.?0+$/, "");

function curves(id, { x, y, xTitle, yTitle, xType = "logarithmic", yType = "logarithmic", sign = 1, front = true }) {
  const data = element("data-choice").value;
  const length = Number(element("length-choice").value);
  const all = [];
  const datasets = methods.map((method) => {
    const points = settings(data, length, method)
      .map((setting) => ({ x: setting[x], y: setting[y], setting }))
      .filter((point) => point.y > 1e-9 || yType === "linear")
      .sort((a, b) => a.x - b.x);
    all.push(...points);
    return {
      label: method, data: points, showLine: true, borderWidth: 1.5, borderColor: look.get(method).colour,
      backgroundColor: look.get(method).colour, pointStyle: look.get(method).shape, pointRadius: 5,
    };
  });
  if (front) {
    datasets.push({
      label: "Pareto front", data: paretoFront(all, sign), showLine: true, borderColor: "#777", borderDash: [5, 4],
      borderWidth: 1, pointRadius: 0,
    });
  }
  draw(id, {
    type: "scatter",
    data: { datasets },
    options: {
      scales: { x: axis(xTitle, xType), y: axis(yTitle, yType) },
      plugins: {
        legend: { position: "bottom", labels: { usePointStyle: true } },
        tooltip: {
          callbacks: {
            label: ({ raw }) => raw.setting &&
              `${raw.setting.spec}: density ${short(raw.setting.density)}, error ${short(raw.setting.error)}, ` +
              `mass ${short(raw.setting.mass)}, ${short(raw.setting.speed)}x`,
          },
        },
      },
    },
  });
}

function ledger() {
  const data = element("data-choice").value;
  const length = Number(element("length-choice").value);
  const target = element("density-choice").value;
  const chosen = methods
    .map((method) => [method, settings(data, length, method).find((setting) => String(setting.target) === target)])
    .filter(([, setting]) => setting?.quality);
  const bars = [["budget_loss", "budget", "#56b4e9"], ["granularity_loss", "granularity", "#e69f00"],
                ["estimator_loss", "estimator", "#d55e00"]];
  draw("ledger", {
    type: "bar",
    data: {
      labels: chosen.map(([method]) => method),
      datasets: bars.map(([key, label, colour]) => ({
        label, backgroundColor: colour, data: chosen.map(([, setting]) => mean(setting.quality.map((q) => q[key]))),
      })),
    },
    options: {
      indexAxis: "y",
      scales: { x: { stacked: true, title: { display: true, text: "softmax mass lost" } }, y: { stacked: true } },
      plugins: { legend: { position: "bottom" } },
    },
  });
}

function lengths() {
  const data = element("data-choice").value;
  const target = element("density-choice").value;
  const all = unique(rows.map((row) => row.len)).sort((a, b) => a - b);
  draw("length-error", {
    type: "scatter",
    data: {
      datasets: methods.map((method) => ({
        label: method, showLine: true, borderColor: look.get(method).colour, backgroundColor: look.get(method).colour,
        borderWidth: 1.5, pointStyle: look.get(method).shape, pointRadius: 5,
        data: all.flatMap((length) => settings(data, length, method)
          .filter((setting) => String(setting.target) === target && setting.error > 1e-9)
          .map((setting) => ({ x: length, y: setting.error }))),
      })),
    },
    options: {
      scales: { x: axis("tokens", "logarithmic"), y: axis("relative L2 error", "logarithmic") },
      plugins: { legend: { position: "bottom", labels: { usePointStyle: true } } },
    },
  });
}

function drawAll() {
  const error = { y: "error", yTitle: "relative L2 error" };
  curves("error-density", { ...error, x: "density", xTitle: "density, executed" });
  curves("error-speed", { ...error, x: "speed", xTitle: "speed-up over dense", sign: -1 });
  curves("error-flops", { ...error, x: "flops", xTitle: "arithmetic, share of dense" });
  curves("mass-density", { x: "density", y: "mass", xTitle: "density, executed", yTitle: "recovered mass",
                           yType: "linear", front: false });
  ledger();
  lengths();
}

const columns = [
  ["data", (row) => row.data], ["tokens", (row) => row.len], ["seed", (row) => row.seed], ["method", (row) => row.spec],
  ["density", (row) => row.executed_density], ["rel. L2", (row) => row.error.rel_l2],
  ["rel. L1", (row) => row.error.rel_l1], ["cosine", (row) => row.error.cosine],
  ["mass", (row) => row.error.softmax_mass], ["tile recall", (row) => row.quality?.tile_recall],
  ["above chance", (row) => row.quality?.chance_corrected],
  ["selection / dense", (row) => row.selection_share], ["kernel ms", (row) => row.kernel_ms],
  ["predicted ms", (row) => row.predicted_ms], ["measured / predicted", (row) => row.kernel_ms / row.predicted_ms],
  ["dense ms", (row) => row.dense_ms], ["speed-up", (row) => row.speed_up],
];

function fillTable(sorted) {
  const body = element("rows").tBodies[0];
  body.replaceChildren(...sorted.map((row) => {
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
    return line;
  }));
}

function makeTable() {
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
      fillTable([...rows].sort(order));
    });
    head.append(cell);
  });
  element("rows").tHead.append(head);
  fillTable(rows);
}

function fillChoice(id, values, text = String) {
  element(id).replaceChildren(...values.map((value) => new Option(text(value), String(value))));
  element(id).addEventListener("change", drawAll);
}

element("summary").textContent = `${rows.length} measurements, ${report.isa}, ${report.threads} threads, ` +
  `${report.dtype}; peak ${short(report.peak_gflops)} GFLOP/s, ${short(report.peak_gbps)} GB/s`;
element("command").textContent = report.command;
element("partial").hidden = report.complete;
fillChoice("data-choice", unique(rows.map((row) => row.data)));
fillChoice("length-choice", unique(rows.map((row) => row.len)).sort((a, b) => b - a));
fillChoice("density-choice", unique(rows.map((row) => row.target_density)).sort((a, b) => (b ?? 2) - (a ?? 2)),
           (value) => value === null ? "its own setting" : `density ${value}`);
makeTable();
drawAll();
for (const skip of report.skipped) {
  const line = document.createElement("p");
  line.className = "note";
  line.textContent = `Left out: ${skip.method} on ${skip.data}: ${skip.reason}`;
  element("skipped").append(line);
}
document.body.dataset.ready = "true";
