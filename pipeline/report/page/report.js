// The report as a whole: addresses, the theme, keys, failed images. Loaded last.
"use strict";

(() => {
  const { images, failures, labels, run, statistics } = window.maskbeamIndex;
  const byId = (id) => document.getElementById(id);
  const PER_PAGE = 200; // rows of failed images

  // Addresses: #/?..., #/image/<id>, #/statistics, #/failed?page=... Ids, so that a link survives a new report.

  const numbers = new Map(images.map((image, number) => [image.id, number]));
  let view = null;

  function route() {
    const [path, query] = location.hash.replace(/^#\/?/, "").split("?", 2);
    const parameters = new URLSearchParams(query);
    const image = path.startsWith("image/") ? images[numbers.get(decode(path.slice(6)))] : null;
    const before = view;
    view = image ? "image" : ["statistics", "failed"].includes(path) ? path : "gallery";
    for (const section of document.querySelectorAll("main > section")) section.hidden = section.id !== `view-${view}`;
    for (const link of document.querySelectorAll("[data-view]")) {
      if (link.dataset.view === view) link.setAttribute("aria-current", "page");
      else link.removeAttribute("aria-current");
    }
    if (view !== before) scrollTo(0, 0);
    if (view !== before && before !== null) byId(`${view}-title`).focus({ preventScroll: true });
    if (view === "image") maskbeam.image.open(image);
    if (view === "statistics") maskbeam.statistics.show();
    if (view === "failed") showFailed(Number(parameters.get("page")) || 1);
    if (view === "gallery") maskbeam.gallery.show(parameters);
    document.title = `${image ? image.id : byId(`${view}-title`).textContent} - maskbeam`;
  }

  function decode(text) {
    try {
      return decodeURIComponent(text);
    } catch {
      return null;
    }
  }

  // Failed images.

  function showFailed(page) {
    const total = statistics.statuses.failed ?? 0;
    const told = failures.length < total ? ` The first ${maskbeam.format(failures.length)} are listed.` : "";
    byId("failed-about").textContent = total ? `${maskbeam.count(total, "image")}.${told}` : "No image failed.";
    byId("failed-region").hidden = !total;
    byId("failed-rows").replaceChildren(
      ...failures.slice((page - 1) * PER_PAGE, page * PER_PAGE).map((failure) => {
        const number = numbers.get(failure.image_id);
        const name = number === undefined ? failure.image_id
          : maskbeam.element("a", { href: maskbeam.imageAddress(images[number]) }, failure.image_id);
        const cells = [name, failure.error_stage, failure.error];
        return maskbeam.element("tr", {}, cells.map((cell) => maskbeam.element("td", {}, [cell ?? ""])));
      }),
    );
    maskbeam.showPages(byId("failed-pages"), page, Math.ceil(failures.length / PER_PAGE), (n) => `#/failed?page=${n}`);
  }

  // The theme: the system's, until it is chosen here.

  const system = matchMedia("(prefers-color-scheme: dark)");
  const storage = (() => {
    try {
      return localStorage;
    } catch {
      return null; // some browsers refuse it to files
    }
  })();

  function setTheme(theme) {
    if (theme) document.documentElement.dataset.theme = theme;
    const dark = (theme ?? (system.matches ? "dark" : "light")) === "dark";
    byId("theme").textContent = dark ? "Light" : "Dark";
    byId("theme").setAttribute("aria-label", dark ? "Light theme" : "Dark theme");
  }

  byId("theme").addEventListener("click", () => {
    const theme = byId("theme").textContent.toLowerCase();
    storage?.setItem("maskbeam-theme", theme);
    setTheme(theme);
  });
  system.addEventListener("change", () => setTheme(document.documentElement.dataset.theme ?? null));

  // Keys. Those that a control needs for itself are left to it.

  document.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey || byId("keys").open) return;
    const typing = event.target.matches("input[type=search], select");
    const sliding = event.target.matches("input[type=range]");
    const step = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (event.key === "Escape") {
      if (view === "image") maskbeam.image.leave();
      else if (view !== "gallery") location.hash = "#/";
    } else if (typing) {
      return;
    } else if (event.key === "?") {
      byId("keys").showModal();
    } else if (event.key === "m" && view === "image") {
      maskbeam.image.toggleMasks();
    } else if (step && !sliding && view === "image") {
      maskbeam.image.turn(step);
    } else if (step && !sliding && view === "gallery") {
      maskbeam.gallery.turn(step);
    } else {
      return;
    }
    event.preventDefault();
  });
  byId("help").addEventListener("click", () => byId("keys").showModal());
  byId("skip").addEventListener("click", (event) => {
    event.preventDefault(); // #main is no address of the report
    byId(`${view}-title`).focus();
  });

  const about = run.model ? `${labels}, model ${run.model}` : labels;
  byId("labels").textContent = about;
  byId("labels").title = about;
  const failed = statistics.statuses.failed ?? 0;
  byId("num-failed").textContent = failed ? maskbeam.format(failed) : "";
  setTheme(storage?.getItem("maskbeam-theme") ?? null);
  addEventListener("hashchange", route);
  route();
})();
