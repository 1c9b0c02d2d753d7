// Ours: shows the description that stands beside this folder.
SwaggerUIBundle({
  url: new URL("../openapi.json", document.currentScript.src).href,
  dom_id: "#viewer",
  deepLinking: true,
  persistAuthorization: false,
});
