"""The store: everything that speaks SQL. `schema` makes the tables and views, `merge` is the only upsert."""
