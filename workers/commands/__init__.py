"""The commands of `headrace`, by what an operator wants: each is a few lines around a plain function elsewhere."""
