// Runs before the first paint, so that a chosen theme never flashes in the other one's colours.
"use strict";
{
  const chosen = localStorage.getItem("turboserve.theme");
  if (chosen === "light" || chosen === "dark") document.documentElement.dataset.theme = chosen;
}
