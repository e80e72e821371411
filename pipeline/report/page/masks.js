// Masks: COCO RLE to pixels of a canvas, their colours, and how they are drawn. Nothing here touches the page.
"use strict";

window.maskbeam = (() => {
  const OUTLINE = 2; // pixels of the canvas
  const GOLDEN_RATIO = 0.618034;

  // A COCO counts string to run lengths, zeros first (cocodataset/cocoapi, common/maskApi.c, rleFrString).
  function decodeCounts(text) {
    const counts = [];
    let position = 0;
    while (position < text.length) {
      let value = 0;
      let scale = 1;
      let code;
      do {
        code = text.charCodeAt(position++) - 48;
        value += (code & 31) * scale;
        scale *= 32;
      } while (code & 32 && position < text.length);
      if (code & 16) value -= scale;
      if (counts.length > 2) value += counts[counts.length - 2];
      counts.push(value);
    }
    return counts;
  }

  // A mask of an image of width x height, at the size of a canvas.
  //
  // Each pixel of the canvas takes the image's pixel under its centre. Returns the mask's window of the canvas,
  // {x, y, width, height, bits}, bits one byte a pixel: 0 outside, 1 inside, 2 outline. null if no pixel is left.
  function rasterize(counts, size, canvas) {
    const starts = [];
    const ends = [];
    const limit = size.width * size.height;
    let edge = 0;
    counts.forEach((count, index) => {
      const from = edge;
      edge = Math.min(edge + Math.max(count, 0), limit);
      if (index % 2 && edge > from) {
        starts.push(from);
        ends.push(edge);
      }
    });
    if (!starts.length) return null;

    // The first row and column of the canvas whose centre is not before a row and column of the image.
    const toRow = (y) => Math.max(Math.ceil((y * canvas.height) / size.height - 0.5), 0);
    const toColumn = (x) => Math.max(Math.ceil((x * canvas.width) / size.width - 0.5), 0);
    const left = toColumn(Math.floor(starts[0] / size.height));
    const right = toColumn(Math.floor((ends[ends.length - 1] - 1) / size.height) + 1);
    const spans = []; // column, first row, last row + 1
    let top = canvas.height;
    let bottom = 0;
    let run = 0;
    for (let x = left; x < right; x++) {
      const first = Math.floor(((x + 0.5) * size.width) / canvas.width) * size.height;
      while (run < ends.length && ends[run] <= first) run++;
      for (let next = run; next < starts.length && starts[next] < first + size.height; next++) {
        const from = toRow(Math.max(starts[next] - first, 0));
        const to = toRow(Math.min(ends[next] - first, size.height));
        if (to <= from) continue;
        spans.push(x, from, to);
        top = Math.min(top, from);
        bottom = Math.max(bottom, to);
      }
    }
    if (!spans.length) return null;

    const mask = { x: left, y: top, width: right - left, height: bottom - top };
    mask.bits = new Uint8Array(mask.width * mask.height);
    for (let i = 0; i < spans.length; i += 3) {
      for (let y = spans[i + 1]; y < spans[i + 2]; y++) mask.bits[(y - top) * mask.width + spans[i] - left] = 1;
    }
    markOutline(mask);
    return mask;
  }

  // Pixels of the mask from which the outside is at most OUTLINE pixels to the left, right, above or below.
  function markOutline({ bits, width, height }) {
    const inside = bits.slice();
    for (let y = 0; y < height; y++) {
      for (let x = 0; x < width; x++) {
        const i = y * width + x;
        if (!inside[i]) continue;
        if (
          x < OUTLINE || y < OUTLINE || x >= width - OUTLINE || y >= height - OUTLINE ||
          !inside[i - OUTLINE] || !inside[i + OUTLINE] ||
          !inside[i - OUTLINE * width] || !inside[i + OUTLINE * width] ||
          !inside[i - 1] || !inside[i + 1] || !inside[i - width] || !inside[i + width]
        ) bits[i] = 2;
      }
    }
  }

  // The colour of mask `index`, [red, green, blue]: that of mask_color in transforms/draw.py.
  function maskColor(index) {
    const hue = ((index * GOLDEN_RATIO) % 1) * 6;
    return [5, 3, 1].map((shift) => {
      const k = (shift + hue) % 6;
      return Math.floor(255 * (1 - 0.75 * Math.max(0, Math.min(k, 4 - k, 1))));
    });
  }

  // Draws a mask in place of what is in the ImageData: colour at an opacity inside, solid on the outline if there is one.
  // The photo is another layer: under several masks it shows as under one, as transforms/draw.py has it.
  function paint(image, mask, color, opacity, outline) {
    const { data, width } = image;
    for (let y = 0; y < mask.height; y++) {
      let pixel = 4 * ((mask.y + y) * width + mask.x);
      for (let i = y * mask.width; i < (y + 1) * mask.width; i++, pixel += 4) {
        if (!mask.bits[i]) continue;
        const above = outline && mask.bits[i] === 2 ? 1 : opacity;
        if (!above) continue;
        for (let c = 0; c < 3; c++) data[pixel + c] = color[c];
        data[pixel + 3] = 255 * above;
      }
    }
  }

  function contains(mask, x, y) {
    const column = x - mask.x;
    const row = y - mask.y;
    return (
      column >= 0 && row >= 0 && column < mask.width && row < mask.height && mask.bits[row * mask.width + column] > 0
    );
  }

  return { decodeCounts, rasterize, maskColor, paint, contains };
})();
