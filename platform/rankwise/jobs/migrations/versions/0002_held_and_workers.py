"""Held jobs, checkpoints, who cancelled whom, workers; indexes that a long queue needs."""

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"

_IN_VAIN = sa.text(
    """
    SELECT later.id AS id, earlier.id AS earlier, earlier.kind AS kind, earlier.spec_hash AS spec_hash,
           earlier.state AS state
    FROM job AS later
    JOIN job_dependency ON job_dependency.job_id = later.id
    JOIN job AS earlier ON earlier.id = job_dependency.after_id
    WHERE later.state = 'queued' AND earlier.state IN ('failed', 'cancelled')
    ORDER BY later.id, earlier.id
    """
)
_CANCEL = sa.text(
    "UPDATE job SET state = 'cancelled', cancelled_by = :earlier, error = :error WHERE id = :id AND state = 'queued'"
)


def upgrade() -> None:
    """Apply."""
    op.add_column("job", sa.Column("held", sa.Boolean(), nullable=False, server_default=sa.false()))
    op.add_column("job", sa.Column("checkpoint", sa.Integer(), nullable=False, server_default="0"))
    op.add_column("job", sa.Column("cancelled_by", sa.Integer()))
    op.drop_index("ix_job_claim", "job")
    op.drop_index("ix_job_pack", "job")
    op.create_index("ix_job_claim", "job", ["state", "held", sa.text("priority DESC"), "id"])
    op.create_index("ix_job_pack", "job", ["state", "pack_key", "pack_id", sa.text("priority DESC"), "id"])
    op.create_index("ix_job_state", "job", ["state", "kind", "id"])
    op.create_index("ix_attempt_recent", "attempt", ["outcome", "ended_at"])
    op.create_index("ix_dependency_after", "job_dependency", ["after_id", "job_id"])
    op.create_table(
        "worker",
        sa.Column("name", sa.String(255), primary_key=True),
        sa.Column("host", sa.String(255), nullable=False),
        sa.Column("pid", sa.Integer(), nullable=False),
        sa.Column("started_at", sa.Float(), nullable=False),
        sa.Column("seen_at", sa.Float(), nullable=False),
        sa.Column("info", sa.JSON(), nullable=False),
    )
    _cancel_in_vain()


def _cancel_in_vain() -> None:
    """Until now what waited for a failed job waited for ever; from now on it is cancelled with it."""
    connection = op.get_bind()
    while rows := connection.execute(_IN_VAIN).all():
        for row in rows:
            ended = "failed" if row.state == "failed" else "was cancelled"
            error = f"job {row.earlier} ({row.kind} {row.spec_hash[:12]}) {ended}"
            connection.execute(_CANCEL, {"id": row.id, "earlier": row.earlier, "error": error})


def downgrade() -> None:
    """Undo."""
    op.drop_table("worker")
    op.drop_index("ix_dependency_after", "job_dependency")
    op.drop_index("ix_attempt_recent", "attempt")
    op.drop_index("ix_job_state", "job")
    op.drop_index("ix_job_pack", "job")
    op.drop_index("ix_job_claim", "job")
    op.create_index("ix_job_pack", "job", ["state", "pack_key", "pack_id"])
    op.create_index("ix_job_claim", "job", ["state", "priority", "id"])
    for column in ("cancelled_by", "checkpoint", "held"):
        op.drop_column("job", column)
