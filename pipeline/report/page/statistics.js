// The statistics of all images as SVG, each with a sentence and a table that say the same.
"use strict";

maskbeam.statistics = (() => {
  const { statistics, images, run, amg } = window.maskbeamIndex;
  const { element, format } = maskbeam;
  const WIDTH = 560;
  const HEIGHT = 230;
  const MARGIN = { left: 56, right: 24, top: 12, bottom: 40 };

  const decimals = (digits) => (value) => value.toFixed(digits);
  const percent = (value) => `${Number((100 * value).toPrecision(2))} %`;
  const charts = [
    {
      name: "masks_per_image", title: "Masks an image", axis: "masks", unit: "image", tell: format,
      bin: (start, step) => (step === 1 ? format(start) : `${format(start)} to ${format(start + step - 1)}`),
    },
    { name: "area_share", title: "Area of the masks", axis: "part of the image", unit: "mask", tell: (v) => percent(10 ** v), logarithmic: true },
    { name: "predicted_iou", title: "Predicted IoU", axis: "predicted IoU", unit: "mask", tell: decimals(2) },
    { name: "stability_score", title: "Stability score", axis: "stability score", unit: "mask", tell: decimals(2) },
    { name: "coverage", title: "Coverage", axis: "part of the image under masks", unit: "image", tell: percent },
  ];
  // The names are those of the images table, without "dropped_".
  const reasons = {
    predicted_iou: "Low predicted IoU",
    stability: "Low stability",
    crop_edge: "At the edge of a crop",
    box_nms: "Duplicates in a crop",
    crop_nms: "Duplicates between crops",
    small_region: "Duplicates after cleaning",
    area: "Limits of the area",
    containment: "Within or around another",
    max_masks: "Beyond the largest number",
  };

  let made = false;

  function show() {
    if (made) return;
    made = true;
    const { statuses, masks, candidates } = statistics;
    const total = Object.values(statuses).reduce((a, b) => a + b, 0);
    document.getElementById("statistics-about").textContent =
      images.length < total ? `of all ${format(total)} images, of which this report shows ${format(images.length)}` : `of all ${maskbeam.count(total, "image")}`;
    document.getElementById("totals").replaceChildren(
      ...[
        ["images", total],
        ["with masks", statuses.labeled ?? 0],
        ["without masks", statuses.empty ?? 0],
        ["failed", statuses.failed ?? 0],
        ["masks", masks],
        ["candidates", candidates],
      ].map(([name, value]) => element("div", {}, [element("dt", {}, name), element("dd", {}, format(value))])),
    );
    document.getElementById("charts").replaceChildren(
      ...charts.map((chart) => figure(chart, statistics[chart.name])),
      becameOf(candidates, masks),
    );
    const settings = Object.entries({ ...run, ...amg }).filter(([, value]) => value !== null && value !== undefined);
    document.getElementById("run").replaceChildren(
      ...settings.map(([name, value]) =>
        element("div", {}, [element("dt", {}, name), element("dd", {}, typeof value === "object" ? JSON.stringify(value) : String(value))])),
    );
  }

  function figure(chart, histogram) {
    if (!histogram) return frame(chart.title, element("p", { className: "nothing" }, "No values."), "There are no values.");
    const bins = histogram.counts.map((count, index) => {
      const start = histogram.start + index * histogram.step;
      const name = chart.bin ? chart.bin(start, histogram.step) : `${chart.tell(start)} to ${chart.tell(start + histogram.step)}`;
      return { start, count, name };
    });
    const mean = chart.logarithmic ? "" : `, mean ${chart.name === "masks_per_image" ? histogram.mean.toFixed(1) : chart.tell(histogram.mean)}`;
    const missing = histogram.not_numbers ? ` ${maskbeam.count(histogram.not_numbers, chart.unit)} without a value.` : "";
    const sentence =
      `${maskbeam.count(histogram.count, chart.unit)}, from ${chart.tell(histogram.low)} to ${chart.tell(histogram.high)}, ` +
      `median ${chart.logarithmic || chart.name !== "masks_per_image" ? "about " : ""}${chart.tell(histogram.median)}${mean}.${missing}`;
    const content = [columns(chart, histogram, bins, sentence), table([chart.axis, `${chart.unit}s`], bins.map((bin) => [bin.name, format(bin.count)]))];
    return frame(chart.title, content, sentence);
  }

  function frame(title, content, sentence) {
    return element("figure", {}, [
      element("h2", {}, title),
      ...[content].flat().slice(0, 1),
      element("figcaption", {}, sentence),
      ...[content].flat().slice(1),
    ]);
  }

  function table(head, rows) {
    const cells = (name, texts) => element("tr", {}, texts.map((text) => element(name, {}, text)));
    return element("details", {}, [
      element("summary", {}, "Table"),
      element("table", {}, [element("thead", {}, [cells("th", head)]), element("tbody", {}, rows.map((row) => cells("td", row)))]),
    ]);
  }

  function svg(name, attributes, children = []) {
    const node = document.createElementNS("http://www.w3.org/2000/svg", name);
    for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
    node.append(...children);
    return node;
  }

  function columns(chart, histogram, bins, sentence) {
    const plotWidth = WIDTH - MARGIN.left - MARGIN.right;
    const plotHeight = HEIGHT - MARGIN.top - MARGIN.bottom;
    const ticks = niceTicks(Math.max(...histogram.counts));
    const top = ticks[ticks.length - 1];
    const y = (count) => MARGIN.top + plotHeight * (1 - count / top);
    const x = (value) => MARGIN.left + (plotWidth * (value - histogram.start)) / (histogram.step * bins.length);
    const text = (attributes, content) => svg("text", attributes, [content]);

    const parts = ticks.map((tick) =>
      svg("g", {}, [
        svg("line", { class: "grid", x1: MARGIN.left, x2: WIDTH - MARGIN.right, y1: y(tick), y2: y(tick) }),
        text({ x: MARGIN.left - 8, y: y(tick) + 4, "text-anchor": "end" }, format(tick)),
      ]),
    );
    for (const bin of bins) {
      if (!bin.count) continue;
      const left = x(bin.start) + 0.5;
      const width = Math.max(x(bin.start + histogram.step) - left - 0.5, 1);
      const bar = svg("rect", { class: "bar", x: left, width, y: y(bin.count), height: y(0) - y(bin.count) });
      bar.append(svg("title", {}, [`${bin.name}: ${maskbeam.count(bin.count, chart.unit)}`]));
      parts.push(bar);
    }
    for (const value of axisTicks(histogram, bins.length)) {
      const middle = chart.name === "masks_per_image" ? histogram.step / 2 : 0;
      parts.push(text({ x: x(value + middle), y: HEIGHT - MARGIN.bottom + 18, "text-anchor": "middle" }, chart.tell(value)));
    }
    parts.push(text({ class: "axis", x: MARGIN.left + plotWidth / 2, y: HEIGHT - 4, "text-anchor": "middle" }, chart.axis));
    return svg("svg", { viewBox: `0 0 ${WIDTH} ${HEIGHT}`, role: "img", "aria-label": `${chart.title}: ${sentence}` }, parts);
  }

  // Starts of bins for the labels of an axis: at most eight, at whole steps.
  function axisTicks(histogram, bins) {
    const every = [1, 2, 4, 5, 10, 20, 40, 100].find((step) => bins / step <= 8) ?? Math.ceil(bins / 8);
    const first = Math.round(histogram.start / histogram.step);
    const ticks = [];
    for (let bin = first; bin <= first + bins; bin++) if (bin % every === 0) ticks.push(bin * histogram.step);
    return histogram.step >= 1 ? ticks.filter((tick) => tick < histogram.start + bins * histogram.step) : ticks;
  }

  // 0 to at least the largest value in about four steps of 1, 2 or 5 times a power of ten.
  function niceTicks(largest) {
    const power = 10 ** Math.floor(Math.log10(Math.max(largest, 1) / 4));
    const step = Math.max([1, 2, 5, 10].map((factor) => factor * power).find((size) => largest / size <= 4.5), 1);
    const ticks = [0];
    while (ticks[ticks.length - 1] < largest) ticks.push(ticks.length * step);
    return ticks;
  }

  // What became of the candidates: bars from the left, kept masks first.
  function becameOf(candidates, masks) {
    const rows = [["Kept", masks], ...Object.entries(statistics.dropped).map(([name, count]) => [reasons[name] ?? name, count])].filter(
      ([name, count]) => count || name === "Kept",
    );
    const part = (count) => (candidates ? percent(count / candidates) : "0 %");
    const left = 170;
    const step = 30;
    const height = rows.length * step + 6;
    const most = Math.max(...rows.map(([, count]) => count), 1);
    const parts = rows.flatMap(([name, count], index) => {
      const width = ((WIDTH - left - 130) * count) / most;
      const middle = index * step + 22;
      return [
        svg("text", { x: left - 10, y: middle, "text-anchor": "end" }, [name]),
        svg("rect", { class: index ? "bar" : "bar kept", x: left, y: middle - 14, width: Math.max(width, count ? 1 : 0), height: 18 }),
        svg("text", { x: left + width + 8, y: middle }, [`${format(count)} (${part(count)})`]),
      ];
    });
    const sentence = `Of ${maskbeam.count(candidates, "candidate")}, ${format(masks)} (${part(masks)}) were kept as masks.`;
    const label = `What became of the candidates: ${rows.map(([name, count]) => `${name} ${format(count)}`).join(", ")}.`;
    const plot = svg("svg", { viewBox: `0 0 ${WIDTH} ${height}`, role: "img", "aria-label": label }, parts);
    return frame("What became of the candidates", [plot, table(["filter", "candidates"], rows.map(([name, count]) => [name, format(count)]))], sentence);
  }

  return { show };
})();
