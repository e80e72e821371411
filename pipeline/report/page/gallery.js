// The gallery: thumbnails in pages, sorted and filtered. Its state is in the address.
"use strict";

maskbeam.gallery = (() => {
  const PER_PAGE = 60;
  const { images } = window.maskbeamIndex;
  const byId = (id) => document.getElementById(id);
  const defaults = { show: "all", sort: "order", q: "", page: "1" };

  const filters = {
    all: () => true,
    labeled: (image) => image.status === "labeled",
    empty: (image) => image.status === "empty",
    failed: (image) => image.status === "failed",
    problem: (image) => image.problem,
  };
  const names = new Intl.Collator("en", { numeric: true });
  // Failed images have no number of masks: they come last in either direction.
  const byMasks = (sign) => (a, b) =>
    (a.status === "failed") - (b.status === "failed") || sign * (a.masks - b.masks) || a.number - b.number;
  const orders = {
    order: (a, b) => a.number - b.number,
    name: (a, b) => names.compare(a.id, b.id),
    most: byMasks(-1),
    fewest: byMasks(1),
  };

  images.forEach((image, number) => {
    image.number = number;
    image.text = `${image.id}\n${image.file_name ?? ""}`.toLowerCase();
  });

  let state = { ...defaults };
  let selection = images;
  let lastOpened = null;

  function address(changes = {}) {
    const next = { ...state, ...changes };
    const query = new URLSearchParams(Object.entries(next).filter(([key, value]) => value !== defaults[key]));
    return `#/${query.size ? `?${query}` : ""}`;
  }

  function read(query) {
    for (const key of Object.keys(defaults)) state[key] = query.get(key) ?? defaults[key];
    if (!Object.hasOwn(filters, state.show)) state.show = defaults.show;
    if (!Object.hasOwn(orders, state.sort)) state.sort = defaults.sort;
    const wanted = state.q.trim().toLowerCase();
    selection = images.filter((image) => filters[state.show](image) && image.text.includes(wanted));
    selection.sort(orders[state.sort]);
    state.page = String(Math.min(Math.max(Number.parseInt(state.page, 10) || 1, 1), numPages()));
  }

  const numPages = () => Math.max(Math.ceil(selection.length / PER_PAGE), 1);

  function show(query) {
    read(query);
    const total = Object.values(window.maskbeamIndex.statistics.statuses).reduce((a, b) => a + b, 0);
    byId("gallery-count").textContent = told(total);
    if (byId("search").value !== state.q) byId("search").value = state.q;
    byId("show").value = state.show;
    byId("sort").value = state.sort;
    const first = (Number(state.page) - 1) * PER_PAGE;
    byId("tiles").replaceChildren(...selection.slice(first, first + PER_PAGE).map(tile));
    byId("no-tiles").hidden = selection.length > 0;
    maskbeam.showPages(byId("pages"), Number(state.page), numPages(), (page) => address({ page: String(page) }));
    if (lastOpened !== null) byId(`tile-${lastOpened}`)?.focus();
    lastOpened = null;
  }

  function told(total) {
    const { format } = maskbeam;
    if (selection.length < images.length) return `${format(selection.length)} of ${format(images.length)} images`;
    if (images.length < total) return `${format(images.length)} of the ${format(total)} images in the labels`;
    return `${format(total)} ${total === 1 ? "image" : "images"}`;
  }

  function tile(image) {
    const { element } = maskbeam;
    const about = image.status === "failed" ? "failed" : maskbeam.count(image.masks, "mask");
    const ratio = image.width ? Math.min(Math.max(image.width / image.height, 0.6), 2.4) : 1.3;
    const picture = image.width
      ? element("img", { src: maskbeam.path("thumbnails", image.number, "jpg"), alt: "", loading: "lazy", decoding: "async" })
      : element("span", { className: "blank" }, "Not decoded");
    const caption = element("span", { className: "caption" }, [
      element("span", { className: "name", title: image.id }, image.id),
      element("span", { className: image.status === "labeled" ? "about" : `about ${image.status}` }, about),
    ]);
    const frame = element("span", { className: "frame" }, [picture]);
    if (image.problem) frame.append(element("span", { className: "badge" }, "Photo not found"));
    const link = element("a", { href: maskbeam.imageAddress(image), id: `tile-${image.number}` }, [frame, caption]);
    const item = element("li", {}, [link]);
    item.style.setProperty("--ratio", ratio);
    return item;
  }

  function turn(step) {
    const page = Number(state.page) + step;
    if (page >= 1 && page <= numPages()) location.hash = address({ page: String(page) });
  }

  // The images around one, in the gallery's order; in the order of the report if the gallery does not show it.
  function around(image) {
    const list = selection.includes(image) ? selection : images;
    const position = list.indexOf(image);
    return { previous: list[position - 1], next: list[position + 1], position, length: list.length };
  }

  // Where the gallery shows an image, so that going back finds it.
  function addressOf(image) {
    lastOpened = image.number;
    const position = selection.indexOf(image);
    return position < 0 ? address() : address({ page: String(Math.floor(position / PER_PAGE) + 1) });
  }

  // Typing replaces the entry in the history: back should not undo a name letter by letter.
  byId("search").addEventListener("input", (event) => {
    location.replace(address({ q: event.target.value, page: "1" }));
  });
  for (const key of ["show", "sort"]) {
    byId(key).addEventListener("change", (event) => {
      location.hash = address({ [key]: event.target.value, page: "1" });
    });
  }

  return { show, turn, around, addressOf };
})();
