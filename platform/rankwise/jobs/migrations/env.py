"""Run by alembic: migrates over the engine that `database.upgrade` hands in."""

from alembic import context

from rankwise.jobs.rows import Table

engine = context.config.attributes["engine"]
with engine.connect() as connection:
    context.configure(connection=connection, target_metadata=Table.metadata, render_as_batch=True)
    with context.begin_transaction():
        context.run_migrations()
