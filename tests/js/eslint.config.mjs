import js from "@eslint/js";

const page = ["document", "performance", "setInterval", "clearInterval", "queueMicrotask"];
// The ways by which text could become markup or code.
const dangers = ["innerHTML", "outerHTML", "insertAdjacentHTML", "createContextualFragment", "write", "srcdoc"];

export default [
  js.configs.recommended,
  {
    languageOptions: { globals: Object.fromEntries(page.map((name) => [name, "readonly"])) },
    rules: {
      "no-restricted-properties": ["error", ...dangers.map((property) => ({ property, message: "set textContent" }))],
      "no-eval": "error",
      "no-implied-eval": "error",
      "no-new-func": "error",
      "prefer-const": "error",
      "no-var": "error",
      eqeqeq: "error",
    },
  },
];
