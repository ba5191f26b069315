"""What a job looks like in a notebook: one snapshot, three forms (live card, static HTML, text)."""
