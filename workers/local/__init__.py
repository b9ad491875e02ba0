"""One machine: `headrace up`, the embedded servers and the supervisor of their processes."""
