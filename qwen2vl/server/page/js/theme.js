// Sets the colors before anything is drawn; a classic script, because modules run later.
"use strict";
{
  let theme = null;
  try {
    theme = JSON.parse(localStorage.getItem("qwen2vl.settings") ?? "{}").theme;
  } catch {
    // Storage is blocked or damaged: the colors of the system.
  }
  if (theme === "light" || theme === "dark") document.documentElement.dataset.theme = theme;
}
