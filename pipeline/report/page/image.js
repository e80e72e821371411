// The page of an image: the photo, its masks over it, sliders that hide and show masks, and the list of masks.
"use strict";

window.maskbeamImages = {}; // filled by data/images/*.js

maskbeam.image = (() => {
  const CANVAS_SIDE = 1400; // pixels of the longer side of the masks' canvas, whatever the image's size
  const { element, format } = maskbeam;
  const byId = (id) => document.getElementById(id);
  const stage = byId("stage");
  const canvas = byId("masks");
  const highlight = byId("highlight");
  const list = byId("list");

  let opened = null; // the image, and its details once they are loaded
  let masks = [];
  let chosen = null; // by click or key; it stays
  let pointed = null; // under the pointer

  // Sliders. Each keeps a mask or not; at its end it keeps all.

  const statistics = window.maskbeamIndex.statistics;
  const percent = (value) => `${Number((100 * value).toPrecision(2))} %`;
  const sliders = {
    predicted_iou: scoreSlider("predicted_iou"),
    stability_score: scoreSlider("stability_score"),
    min_area: areaSlider(false),
    max_area: areaSlider(true),
  };

  function scoreSlider(name) {
    const { low, high } = statistics[name] ?? { low: 0, high: 1 };
    const [min, max] = [Math.floor(low * 100) / 100, Math.ceil(high * 100) / 100];
    return {
      min, max, step: 0.005, all: min,
      // Imported masks may have no score. Not knowing it is no reason to hide one, unless that is asked for.
      keeps: (mask, value) =>
        value <= min || (Number.isFinite(mask[name]) ? mask[name] >= value : !byId("hide-unknown").checked),
      tell: (value) => value.toFixed(3),
    };
  }

  function areaSlider(most) {
    const { low, high } = statistics.area_share ?? { low: -4, high: 0 };
    const [min, max] = [Math.floor(low * 10) / 10, Math.min(Math.ceil(high * 10) / 10, 0)];
    return {
      min, max, step: 0.05, all: most ? max : min,
      keeps: (mask, value) =>
        most ? value >= max || mask.share <= 10 ** value : value <= min || mask.share >= 10 ** value,
      tell: (value) => `${percent(10 ** value)} of the image`,
    };
  }

  for (const [name, slider] of Object.entries(sliders)) {
    const input = byId(name);
    Object.assign(input, { min: slider.min, max: slider.max, step: slider.step, value: slider.all });
    input.addEventListener("input", update);
  }
  byId("opacity").addEventListener("input", update);
  byId("filled").addEventListener("change", update);
  byId("outlines").addEventListener("change", update);
  byId("hide-unknown").addEventListener("change", update);
  byId("reset").addEventListener("click", () => {
    for (const [name, slider] of Object.entries(sliders)) byId(name).value = slider.all;
    byId("hide-unknown").checked = false;
    update();
  });

  function update() {
    for (const [name, slider] of Object.entries(sliders)) tellValue(name, slider.tell(Number(byId(name).value)));
    tellValue("opacity", percent(byId("opacity").value));
    for (const mask of masks) {
      mask.visible = Object.entries(sliders).every(([name, slider]) => slider.keeps(mask, Number(byId(name).value)));
      mask.option.hidden = !mask.visible;
    }
    if (chosen && !chosen.visible) choose(null);
    pointed = null;
    const shown = masks.filter((mask) => mask.visible).length;
    byId("num-shown").textContent = `${format(shown)} of ${maskbeam.count(masks.length, "mask")} shown`;
    draw();
  }

  function tellValue(name, text) {
    byId(`${name}-value`).textContent = text;
    byId(name).setAttribute("aria-valuetext", text);
  }

  // Drawing.

  function draw() {
    const context = canvas.getContext("2d");
    const image = context.createImageData(canvas.width, canvas.height);
    if (byId("filled").checked) {
      const opacity = Number(byId("opacity").value);
      const outlines = byId("outlines").checked;
      for (const mask of [...masks].sort((a, b) => b.area - a.area)) {
        if (mask.visible && mask.pixels) maskbeam.paint(image, mask.pixels, mask.color, opacity, outlines);
      }
    }
    context.putImageData(image, 0, 0);
    drawHighlight();
  }

  function drawHighlight() {
    const context = highlight.getContext("2d");
    context.clearRect(0, 0, highlight.width, highlight.height);
    const mask = pointed ?? chosen;
    if (mask?.pixels) {
      const image = context.createImageData(highlight.width, highlight.height);
      maskbeam.paint(image, mask.pixels, mask.color, 0.4, false);
      for (let y = 0; y < mask.pixels.height; y++) {
        for (let x = 0; x < mask.pixels.width; x++) {
          if (mask.pixels.bits[y * mask.pixels.width + x] !== 2) continue;
          const at = 4 * ((mask.pixels.y + y) * image.width + mask.pixels.x + x);
          image.data.fill(255, at, at + 4);
        }
      }
      context.putImageData(image, 0, 0);
    }
    describe(mask);
  }

  // Choosing.

  function describe(mask) {
    const panel = byId("chosen");
    if (!mask) {
      const hint = masks.length ? "Point at a mask, or choose one in the list." : "There is no mask.";
      panel.replaceChildren(element("p", { className: "hint" }, hint));
      return;
    }
    const facts = [
      ["Predicted IoU", score(mask.predicted_iou)],
      ["Stability", score(mask.stability_score)],
      ["Area", `${format(mask.area)} px, ${percent(mask.share)}`],
    ];
    if ("rank" in mask) facts.push(["Rank", mask.rank ?? "none"]);
    if (masks.some((other) => Number.isInteger(other.parent_id))) facts.push(["Parent", mask.parent_id ?? "none"]);
    panel.replaceChildren(
      element("h2", {}, [swatch(mask), `Mask ${mask.id}`]),
      element("dl", {}, facts.map(([name, value]) =>
        element("div", {}, [element("dt", {}, name), element("dd", {}, String(value))]))),
    );
  }

  const score = (value) => (Number.isFinite(value) ? value.toFixed(3) : "unknown");

  function swatch(mask) {
    const mark = element("span", { className: "swatch" });
    mark.style.backgroundColor = `rgb(${mask.color.join(" ")})`;
    return mark;
  }

  function choose(mask) {
    if (chosen) chosen.option.setAttribute("aria-selected", "false");
    chosen = mask;
    if (mask) {
      mask.option.setAttribute("aria-selected", "true");
      mask.option.scrollIntoView({ block: "nearest" });
      list.setAttribute("aria-activedescendant", mask.option.id);
    } else {
      list.removeAttribute("aria-activedescendant");
    }
    drawHighlight();
  }

  // The masks under the pointer, small ones first.
  function under(event) {
    const frame = stage.getBoundingClientRect();
    const x = Math.floor(((event.clientX - frame.left) / frame.width) * canvas.width);
    const y = Math.floor(((event.clientY - frame.top) / frame.height) * canvas.height);
    return masks
      .filter((mask) => mask.visible && mask.pixels && maskbeam.contains(mask.pixels, x, y))
      .sort((a, b) => a.area - b.area);
  }

  stage.addEventListener("pointermove", (event) => point(under(event)[0] ?? null));
  stage.addEventListener("pointerleave", () => point(null));
  stage.addEventListener("click", (event) => {
    const found = under(event);
    pointed = null;
    choose(found.length ? found[(found.indexOf(chosen) + 1) % found.length] : null);
  });

  function point(mask) {
    // What is chosen and lies under the pointer stays: its scores are being read.
    if (mask === pointed) return;
    pointed = mask;
    drawHighlight();
  }

  list.addEventListener("click", (event) => {
    const option = event.target.closest("[role=option]");
    if (option) choose(masks[Number(option.dataset.index)]);
  });
  list.addEventListener("focus", () => {
    if (!chosen) choose(masks.find((mask) => mask.visible) ?? null);
  });
  list.addEventListener("keydown", (event) => {
    const visible = masks.filter((mask) => mask.visible);
    const at = visible.indexOf(chosen);
    const targets = { ArrowDown: at + 1, ArrowUp: at - 1, Home: 0, End: visible.length - 1 };
    if (!(event.key in targets)) return;
    event.preventDefault();
    const target = visible[Math.min(Math.max(targets[event.key], 0), visible.length - 1)];
    if (target) choose(target);
  });

  // Opening an image.

  async function open(image) {
    const again = opened?.image === image;
    opened = { image };
    tellImage(image);
    if (again && masks.length) return;
    masks = [];
    chosen = pointed = null;
    list.replaceChildren();
    stage.hidden = !image.width;
    byId("view-image").classList.toggle("without-masks", !image.width);
    setSizes(image);
    const photo = byId("photo");
    photo.hidden = image.problem || !image.width;
    if (photo.hidden) photo.removeAttribute("src");
    else photo.src = maskbeam.path("photos", image.number, "jpg");
    photo.alt = `The photo ${image.id}`;
    update();

    const details = await load(image.number);
    if (opened.image !== image) return; // another one was opened meanwhile
    if (!details) return notice(`The report has lost the file ${maskbeam.path("data/images", image.number, "js")}.`);
    if (details.error) notice(`Failed to ${details.error_stage}: ${details.error}`);
    else if (details.problem) notice(details.problem);
    masks = readMasks(image, details.masks);
    list.replaceChildren(...masks.map((mask) => mask.option));
    byId("unknown").hidden = masks.every((mask) => Number.isFinite(mask.predicted_iou) && Number.isFinite(mask.stability_score));
    update();
    preload(maskbeam.gallery.around(image).next);
  }

  function tellImage(image) {
    const { previous, next, position, length } = maskbeam.gallery.around(image);
    byId("image-title").textContent = image.id;
    const file = image.file_name && !image.id.endsWith(image.file_name) ? [image.file_name] : [];
    const size = image.width ? [`${image.width} \u00d7 ${image.height} px`] : [];
    const state = image.status === "failed" ? "failed" : maskbeam.count(image.masks, "mask");
    byId("image-about").textContent = [...file, ...size, state].join(" \u00b7 ");
    byId("position").textContent = `${format(position + 1)} of ${format(length)}`;
    for (const [id, neighbour] of [["previous", previous], ["next", next]]) {
      if (neighbour) byId(id).href = maskbeam.imageAddress(neighbour);
      else byId(id).removeAttribute("href");
    }
    byId("back").href = maskbeam.gallery.addressOf(image);
    byId("notice").hidden = true;
  }

  function notice(text) {
    byId("notice").textContent = text;
    byId("notice").hidden = false;
  }

  function setSizes(image) {
    const [width, height] = image.width ? [image.width, image.height] : [1, 1];
    const scale = CANVAS_SIDE / Math.max(width, height);
    for (const target of [canvas, highlight]) {
      target.width = Math.max(Math.round(width * scale), 1);
      target.height = Math.max(Math.round(height * scale), 1);
    }
    stage.style.setProperty("--ratio", width / height);
  }

  // The details of an image are a script that puts them into maskbeamImages: files may not be fetched.
  function load(number) {
    return new Promise((resolve) => {
      const script = element("script", { src: maskbeam.path("data/images", number, "js") });
      script.addEventListener("load", () => {
        resolve(window.maskbeamImages[number]);
        delete window.maskbeamImages[number];
        script.remove();
      });
      script.addEventListener("error", () => {
        resolve(null);
        script.remove();
      });
      document.head.append(script);
    });
  }

  function preload(image) {
    if (image?.width && !image.problem) new Image().src = maskbeam.path("photos", image.number, "jpg");
  }

  function readMasks(image, columns) {
    const { counts, mask_index: ids, ...values } = columns;
    return counts.map((text, index) => {
      const mask = { id: ids[index], color: maskbeam.maskColor(index) };
      for (const [name, column] of Object.entries(values)) mask[name] = column[index];
      mask.share = mask.area / (image.width * image.height);
      mask.pixels = maskbeam.rasterize(maskbeam.decodeCounts(text), image, canvas);
      mask.option = makeOption(mask, index);
      return mask;
    });
  }

  function makeOption(mask, index) {
    const [iou, stability, area] = [score(mask.predicted_iou), score(mask.stability_score), format(mask.area)];
    const option = element("li", { id: `mask-${index}` }, [
      swatch(mask),
      ...[String(mask.id), iou, stability, area].map((text) => element("span", {}, text)),
    ]);
    option.setAttribute("role", "option");
    option.setAttribute("aria-selected", "false");
    option.setAttribute("aria-label", `Mask ${mask.id}: predicted IoU ${iou}, stability ${stability}, area ${area} pixels`);
    option.dataset.index = index;
    return option;
  }

  // Keys. Each says whether it did something.

  function turn(step) {
    const link = byId(step < 0 ? "previous" : "next");
    if (link.href) location.hash = new URL(link.href).hash;
  }

  function leave() {
    if (chosen) choose(null);
    else location.hash = new URL(byId("back").href).hash;
  }

  function toggleMasks() {
    byId("filled").checked = !byId("filled").checked;
    update();
  }

  return { open, turn, leave, toggleMasks };
})();
