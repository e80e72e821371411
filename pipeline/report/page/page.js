// Pieces of pages. Ids and errors are other people's data: they only ever become text, never HTML.
"use strict";

Object.assign(maskbeam, {
  // An element with properties, and text or children.
  element(name, properties = {}, content = []) {
    const node = Object.assign(document.createElement(name), properties);
    node.append(...[content].flat());
    return node;
  },

  // Of a file of the report; the directories are those of pipeline/view.py.
  path(kind, number, extension) {
    return `${kind}/${Math.floor(number / 1000)}/${number}.${extension}`;
  },

  imageAddress(image) {
    return `#/image/${encodeURIComponent(image.id)}`;
  },

  format(number) {
    return number.toLocaleString("en");
  },

  count(number, noun) {
    return `${maskbeam.format(number)} ${noun}${number === 1 ? "" : "s"}`;
  },

  // Links to the first, the last and the neighbouring pages.
  showPages(nav, page, pages, address) {
    nav.hidden = pages <= 1;
    const link = (text, target, label) => {
      const node = maskbeam.element("a", { className: "button" }, text);
      if (target >= 1 && target <= pages && target !== page) node.href = address(target);
      if (label) node.setAttribute("aria-label", label);
      return node;
    };
    nav.replaceChildren(
      link("First", 1, "First page"),
      link("Previous", page - 1, "Previous page"),
      maskbeam.element("span", {}, `Page ${maskbeam.format(page)} of ${maskbeam.format(pages)}`),
      link("Next", page + 1, "Next page"),
      link("Last", pages, "Last page"),
    );
  },
});
