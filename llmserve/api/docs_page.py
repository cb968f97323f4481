"""The page at /docs: reads /openapi.json and shows it. Needs nothing from another host, so it works offline."""

from __future__ import annotations

import base64
import hashlib

PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>llmserve API</title>
<style>
:root { color-scheme: light dark; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }
code { font-family: ui-monospace, monospace; }
details { border: 1px solid #8886; border-radius: 6px; margin: .5rem 0; padding: .5rem .75rem; }
summary { cursor: pointer; }
summary b { display: inline-block; width: 4rem; }
table { border-collapse: collapse; width: 100%; margin-top: .5rem; }
td { border-top: 1px solid #8884; padding: .25rem .5rem; vertical-align: top; }
td:first-child { white-space: nowrap; }
</style>
</head>
<body>
<h1>llmserve API</h1>
<p>The machine-readable description is <a href="openapi.json">openapi.json</a>.</p>
<main id="routes">Loading…</main>
<script>
let spec;
const resolve = (schema) => schema.$ref
  ? schema.$ref.slice(2).split("/").reduce(
      (node, key) => node[decodeURIComponent(key).replace(/~1/g, "/").replace(/~0/g, "~")], spec)
  : schema;
function typeOf(schema, depth = 0) {
  if (depth > 4) return "…";
  const name = schema.$ref ? schema.$ref.split("/").pop() : null;
  const s = resolve(schema);
  if (s.anyOf) return s.anyOf.filter((x) => x.type !== "null").map((x) => typeOf(x, depth + 1)).join(" | ");
  if (s.enum) return s.enum.map((x) => JSON.stringify(x)).join(" | ");
  if ("const" in s) return JSON.stringify(s.const);
  if (s.type === "array") return "[" + typeOf(s.items || {}, depth + 1) + "]";
  const range = [["minimum", "≥"], ["exclusiveMinimum", ">"], ["maximum", "≤"], ["exclusiveMaximum", "<"]]
    .filter(([key]) => key in s).map(([key, sign]) => sign + " " + s[key]).join(", ");
  return (name || s.type || "any") + (range ? " (" + range + ")" : "");
}
function element(tag, text) {
  const node = document.createElement(tag);
  if (text !== undefined) node.textContent = text;
  return node;
}
function fields(schema) {
  const table = element("table");
  for (const [name, field] of Object.entries(schema.properties || {})) {
    const row = table.insertRow();
    row.insertCell().append(element("code", name + ((schema.required || []).includes(name) ? " *" : "")));
    row.insertCell().append(element("code", typeOf(field)));
  }
  return table;
}
async function main() {
  spec = await (await fetch("openapi.json")).json();
  const routes = document.getElementById("routes");
  routes.replaceChildren();
  for (const [path, methods] of Object.entries(spec.paths)) {
    for (const [method, operation] of Object.entries(methods)) {
      const box = element("details");
      const summary = element("summary");
      summary.append(element("b", method.toUpperCase()), element("code", path));
      box.append(summary, element("p", operation.description || operation.summary || ""));
      const body = operation.requestBody && operation.requestBody.content["application/json"].schema;
      for (const one of body ? body.oneOf || [body] : []) box.append(fields(resolve(one)));
      routes.append(box);
    }
  }
}
main();
</script>
</body>
</html>
"""


def _hash_of(tag: str) -> str:
    """A source expression of CSP for the page's only element of that kind."""
    content = PAGE.partition(f"<{tag}>")[2].partition(f"</{tag}>")[0]
    return f"'sha256-{base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()}'"


# Only this script and this style run, nothing is loaded from elsewhere, and no page may frame this one.
HEADERS = {
    "Content-Security-Policy": (
        f"default-src 'none'; script-src {_hash_of('script')}; style-src {_hash_of('style')}; connect-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
}
