// What Quasar leaves out for screen readers.
document.documentElement.lang = "en";
addEventListener("DOMContentLoaded", () => {
  const page = document.getElementById("app");
  new MutationObserver(() => {
    page.inert = document.body.classList.contains("q-body--dialog"); // Only the dialog can be reached.
    for (const menu of document.querySelectorAll("[id^=q-portal--menu]")) {
      menu.setAttribute("role", "region");
      menu.setAttribute("aria-label", "Choices");
    }
    for (const list of document.querySelectorAll("[role=listbox] > .q-virtual-scroll__content")) list.setAttribute("role", "group");
  }).observe(document.body, { attributeFilter: ["class"], childList: true, subtree: true });
});
