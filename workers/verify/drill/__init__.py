"""The drill: a complete stack under load while its processes are struck at random; and the account of what it took."""
