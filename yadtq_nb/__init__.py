"""Map a function over many inputs on many machines, from a notebook."""
