"""Where alembic meets our connection: `headrace migrate` hands it over, already in a transaction."""

from alembic import context

context.configure(
    connection=context.config.attributes["connection"],
    version_table="schema_version",
    version_table_schema="headrace",
    transactional_ddl=True,
)
with context.begin_transaction():
    context.run_migrations()
