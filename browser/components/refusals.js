function explainRefusals(known) {
  const PATIENCE_MS = 8000;
  const connected = () => document.querySelector('[data-test-connection-state="CONNECTED"]') !== null;
  const allowed = (name) => known.hosts.some((host) => host.startsWith("*.") ? name.endsWith(host.slice(1)) : host === name);

  function reason() {
    const name = location.hostname;
    if (!allowed(name)) {
      return "It accepts connections for " + known.hosts.join(", ") + ", and this page was opened at " + name +
        ". Start it with: sae browse --allow-host " + name;
    }
    return "It may have ended; then start sae browse again. Or the proxy in front of it does not pass on WebSocket " +
      "connections (its Upgrade and Connection headers).";
  }

  function show() {
    if (connected()) return;
    const notice = document.createElement("div");
    notice.id = "mono-refused";
    notice.setAttribute("role", "alert");
    notice.style.cssText = "position:fixed;top:0;left:0;right:0;z-index:1000000;padding:1em;background:#b3261e;color:#fff;" +
      "font:16px/1.5 sans-serif";
    notice.textContent = "This page cannot connect to its app. " + reason() + " See " + known.help + ".";
    document.body.append(notice);
    const watch = setInterval(() => {
      if (!connected()) return;
      notice.remove();
      clearInterval(watch);
    }, 500);
  }

  setTimeout(show, PATIENCE_MS);
}
