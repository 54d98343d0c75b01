// Draws the page of `tessera compare`.
"use strict";

const rows = report.rows;
const methods = unique(rows.map((row) => row.method));
const look = looksOf(methods);

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
    return dataset(method, look.get(method), points);
  });
  if (front) datasets.push(frontOf(all, sign));
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
      datasets: methods.map((method) => dataset(method, look.get(method),
        all.flatMap((length) => settings(data, length, method)
          .filter((setting) => String(setting.target) === target && setting.error > 1e-9)
          .map((setting) => ({ x: length, y: setting.error }))))),
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
  ["Kinetics ms", (row) => row.kinetics_ms], ["measured / Kinetics", (row) => row.kernel_ms / row.kinetics_ms],
  ["simulated density", (row) => row.simulated?.executed_density],
  ["simulated - executed, %", (row) => row.simulated ? 100 * row.simulated.deviation : null],
  ["dense ms", (row) => row.dense_ms], ["speed-up", (row) => row.speed_up],
];

element("summary").textContent = `${rows.length} measurements, ${report.isa}, ${report.threads} threads, ` +
  `${report.dtype}; peak ${short(report.peak_gflops)} GFLOP/s, ${short(report.peak_gbps)} GB/s`;
element("partial").hidden = report.complete;
fillChoice("data-choice", unique(rows.map((row) => row.data)), drawAll);
fillChoice("length-choice", unique(rows.map((row) => row.len)).sort((a, b) => b - a), drawAll);
fillChoice("density-choice", unique(rows.map((row) => row.target_density)).sort((a, b) => (b ?? 2) - (a ?? 2)),
           drawAll, (value) => value === null ? "its own setting" : `density ${value}`);
makeTable("rows", columns, rows);
drawAll();
for (const skip of report.skipped) {
  const line = document.createElement("p");
  line.className = "note";
  line.textContent = `Left out: ${skip.method} on ${skip.data}: ${skip.reason}`;
  element("skipped").append(line);
}
document.body.dataset.ready = "true";
