"""Run by alembic: migrates over the engine that `database.upgrade` hands in."""

from alembic import context

from rankwise.jobs.rows import Table

# Any number will do that no other user of the database takes.
LOCK = 0x72616E6B77697365
engine = context.config.attributes["engine"]
with engine.connect() as connection:
    # Both databases can undo DDL; alembic does not expect it of SQLite. A migration that is cut off leaves nothing.
    context.configure(
        connection=connection, target_metadata=Table.metadata, render_as_batch=True, transactional_ddl=True
    )
    with context.begin_transaction():
        if engine.dialect.name == "postgresql":
            connection.exec_driver_sql(f"SELECT pg_advisory_xact_lock({LOCK})")
        context.run_migrations()
