"""`headrace up` on one machine: the embedded servers, and the supervisor of all processes."""
