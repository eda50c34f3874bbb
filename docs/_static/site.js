// What scrolls sideways can be reached by the keyboard, and only that.
function reachable() {
  for (const e of document.querySelectorAll(".bd-article table, .bd-article .cell_output, .drawn")) {
    if (e.scrollWidth > e.clientWidth + 1) e.tabIndex = 0;
    else e.removeAttribute("tabindex");
  }
}
addEventListener("load", reachable);
addEventListener("resize", reachable);
