"""Definitions of experiments, stored once and referenced by jobs. Payloads of jobs queued before keep their own."""

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"


def upgrade() -> None:
    """Apply."""
    op.create_table(
        "definition",
        sa.Column("digest", sa.String(64), primary_key=True),
        sa.Column("text", sa.Text(), nullable=False),
    )
    # Alembic adds no foreign key to a table of SQLite without copying that table; both databases can by themselves.
    op.execute("ALTER TABLE job ADD COLUMN definition VARCHAR(64) REFERENCES definition (digest)")
    op.create_index("ix_job_definition", "job", ["definition"])


def downgrade() -> None:
    """Undo; the definitions go back into the payloads."""
    connection = op.get_bind()
    job = sa.table("job", sa.column("id"), sa.column("spec", sa.JSON()), sa.column("definition"))
    definition = sa.table("definition", sa.column("digest"), sa.column("text"))
    rows = sa.select(job.c.id, job.c.spec, definition.c.text).join(definition, definition.c.digest == job.c.definition)
    for row in connection.execute(rows).all():
        connection.execute(job.update().where(job.c.id == row.id).values(spec={**row.spec, "definition": row.text}))
    op.drop_index("ix_job_definition", "job")
    op.drop_column("job", "definition")
    op.drop_table("definition")
