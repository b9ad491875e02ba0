"""The store: everything that speaks SQL. `engine` opens it, `schema` shapes it, `merge` writes it, `ledger` settles."""
