// Before anything is drawn: light or dark, as was chosen here before. No module, which would come too late.
try {
  const theme = localStorage.getItem("handful.theme");
  if (theme === "light" || theme === "dark") document.documentElement.dataset.theme = theme;
} catch {
  // A browser that keeps nothing: as the system has it.
}
