// Draws the page of `tessera eval`.
"use strict";

const rows = report.results;
const methods = unique(rows.map((row) => row.method));
const tasks = unique(rows.map((row) => row.task));
const lengths = unique(rows.map((row) => row.len)).sort((a, b) => a - b);
const look = looksOf(methods);
const kPerplexity = "perplexity";
const kEveryTask = "mean of all tasks";
const time = (row) => row.prefill_ms + row.decode_ms;
// Of the phase that is sparse; of both, that of the prompt.
const decodes = report.phase === "decode";
const density = (row) => decodes ? row.decode_density : row.density;

// Methods at one length would cover each other's whiskers.
const besides = (length, i) => length * 1.02 ** (i - (methods.length - 1) / 2);
const shownLength = (value) => lengths.reduce((a, b) => Math.abs(Math.log(a / value)) < Math.abs(Math.log(b / value)) ? a : b);

/// Score against length of one task: a curve per method, and its intervals as a second dataset of upright strokes.
function drawTask(task, i) {
  const datasets = methods.flatMap((method, m) => {
    const found = rows.filter((row) => row.task === task && row.method === method).sort((a, b) => a.len - b.len);
    const points = found.map((row) => ({ x: besides(row.len, m), y: row.score.mean, row }));
    const whiskers = found.flatMap((row) => [
      { x: besides(row.len, m), y: row.score.low }, { x: besides(row.len, m), y: row.score.high },
      { x: besides(row.len, m), y: NaN }]);
    return [
      dataset(method, look.get(method), points),
      { ...dataset(`${method}: interval`, look.get(method), whiskers), pointStyle: "line", pointRadius: 4,
        spanGaps: false, borderWidth: 1 },
    ];
  });
  const bits = task === kPerplexity;
  draw(`length-${i}`, {
    type: "scatter",
    data: { datasets },
    options: {
      scales: {
        x: axis("tokens", "logarithmic", {
          min: lengths[0] / 1.3, max: lengths[lengths.length - 1] * 1.3,
          afterBuildTicks: (scale) => { scale.ticks = lengths.map((value) => ({ value })); },
          ticks: { callback: String },
        }),
        y: axis(bits ? "bits per byte" : "score", "linear", bits ? {} : { min: 0, max: 1 }),
      },
      plugins: {
        legend: {
          position: "bottom",
          labels: { usePointStyle: true, filter: (item) => !item.text.endsWith(": interval") },
          // A method goes with its interval.
          onClick: (event, item, legend) => {
            for (const index of [item.datasetIndex, item.datasetIndex + 1])
              legend.chart.setDatasetVisibility(index, !legend.chart.isDatasetVisible(index));
            legend.chart.update();
          },
        },
        tooltip: {
          callbacks: {
            label: ({ raw }) => raw.row && `${raw.row.method}: ${short(raw.row.score.mean)} ` +
              `(${short(raw.row.score.low)} to ${short(raw.row.score.high)}), ${raw.row.samples} samples, ` +
              `density ${short(density(raw.row))}`,
          },
        },
      },
    },
  });
}

/// One point per method: the chosen task, or the mean over tasks, at one length.
function points(task, length, cost) {
  return methods.flatMap((method) => {
    const chosen = rows.filter((row) => row.method === method && row.len === length &&
      (task === kEveryTask ? row.task !== kPerplexity : row.task === task));
    if (chosen.length === 0) return [];
    return [{ x: mean(chosen.map(cost)), y: mean(chosen.map((row) => row.score.mean)), method }];
  });
}

function drawCosts() {
  const task = element("task-choice").value;
  const length = Number(element("length-choice").value);
  const sign = task === kPerplexity ? 1 : -1;
  const yTitle = task === kPerplexity ? "bits per byte" : task === kEveryTask ? "mean score" : "score";
  for (const [id, cost, title] of [["score-density", density, `density of ${decodes ? "decoding" : "prefill"}`],
                                   ["score-time", time, "milliseconds, median"],
                                   ["score-cache", (row) => row.cache_mb, "MB of keys and values"]]) {
    const all = points(task, length, cost);
    // Scores that hardly differ should not look as if they did.
    const heights = all.map((point) => point.y);
    const room = task === kPerplexity ? {}
      : { min: Math.max(0, Math.min(...heights) - 0.05), max: Math.min(1, Math.max(...heights) + 0.05) };
    draw(id, {
      type: "scatter",
      data: {
        datasets: [...all.map((point) => dataset(point.method, look.get(point.method), [point], { pointRadius: 6 })),
                   frontOf(all, 1, sign)],
      },
      options: {
        scales: { x: axis(title, "linear", { min: 0 }), y: axis(yTitle, "linear", room) },
        plugins: {
          legend: { position: "bottom", labels: { usePointStyle: true } },
          tooltip: { callbacks: { label: ({ raw }) => raw.method && `${raw.method}: ${short(raw.y)} at ${short(raw.x)}` } },
        },
      },
    });
  }
}

/// What a method loses against dense attention, over tasks and lengths.
function verdict(method) {
  const compared = rows.filter((row) => row.method === method && row.difference && row.task !== kPerplexity);
  const all = rows.filter((row) => row.method === method);
  const result = { method, density: mean(all.map(density)), time: mean(all.map(time)) };
  if (compared.length === 0) return result;
  const worst = compared.reduce((a, b) => a.difference.mean <= b.difference.mean ? a : b);
  const dense = (row) => row.score.mean - row.difference.mean;
  const answered = compared.filter((row) => dense(row) > 0);
  return {
    ...result,
    difference: mean(compared.map((row) => row.difference.mean)),
    worst: worst.difference.mean,
    worstTask: `${worst.task} ${worst.len}`,
    within: answered.length === 0 ? undefined
      : mean(answered.map((row) => row.difference.low >= -0.05 * dense(row) ? 1 : 0)),
  };
}

element("summary").textContent = `${report.model}, ${report.phase === "both" ? "prefill and decoding" : report.phase} ` +
  `sparse; ${tasks.length} tasks, ${lengths.join(", ")} tokens, up to ${Math.max(0, ...rows.map((row) => row.samples))} samples`;
element("partial").hidden = report.complete;
tasks.forEach((task, i) => {
  const figure = document.createElement("figure");
  figure.innerHTML = `<figcaption></figcaption><div class=chart><canvas id=length-${i}></canvas></div>`;
  figure.firstChild.textContent = task;
  element("length-charts").append(figure);
  drawTask(task, i);
});
const everyTask = tasks.filter((task) => task !== kPerplexity).length > 1;
fillChoice("task-choice", everyTask ? [kEveryTask, ...tasks] : tasks, drawCosts);
fillChoice("length-choice", [...lengths].reverse(), drawCosts);
drawCosts();
makeTable("verdict", [
  ["method", (row) => row.method], ["density", (row) => row.density], ["time ms", (row) => row.time],
  ["mean difference", (row) => row.difference], ["worst", (row) => row.worst], ["worst at", (row) => row.worstTask],
  ["within 5 %", (row) => row.within],
], methods.map(verdict));
makeTable("rows", [
  ["task", (row) => row.task], ["tokens", (row) => row.len], ["method", (row) => row.method],
  ["samples", (row) => row.samples], ["score", (row) => row.score.mean], ["low", (row) => row.score.low],
  ["high", (row) => row.score.high], ["to dense", (row) => row.difference?.mean],
  ["to dense, low", (row) => row.difference?.low], ["to dense, high", (row) => row.difference?.high],
  ["gold bits", (row) => row.gold_bits], ["density", (row) => row.density],
  ["decode density", (row) => row.decode_density || null], ["prefill ms", (row) => row.prefill_ms],
  ["measured / predicted", (row) => row.predicted_prefill_ms ? row.prefill_ms / row.predicted_prefill_ms : null],
  ["decode ms", (row) => row.decode_ms],
  ["decode / predicted", (row) => row.predicted_decode_ms ? row.decode_ms / row.predicted_decode_ms : null], ["cache MB", (row) => row.cache_mb],
], rows);
document.body.dataset.ready = "true";
