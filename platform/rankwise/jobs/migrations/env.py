"""Run by alembic: migrates over the engine that `database.upgrade` hands in."""

from alembic import context

from rankwise.jobs.rows import Table

engine = context.config.attributes["engine"]
with engine.connect() as connection:
    # Both databases can undo DDL; alembic does not expect it of SQLite. A migration that is cut off leaves nothing.
    context.configure(
        connection=connection, target_metadata=Table.metadata, render_as_batch=True, transactional_ddl=True
    )
    with context.begin_transaction():
        context.run_migrations()
