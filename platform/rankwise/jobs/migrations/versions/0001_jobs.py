"""Jobs, their dependencies and attempts."""

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None


def upgrade() -> None:
    """Apply."""
    op.create_table(
        "job",
        sa.Column("id", sa.Integer(), primary_key=True, autoincrement=True),
        sa.Column("kind", sa.String(16), nullable=False),
        sa.Column("experiment", sa.String(255), nullable=False),
        sa.Column("spec_hash", sa.String(64), nullable=False),
        sa.Column("spec", sa.JSON(), nullable=False),
        sa.Column("state", sa.String(16), nullable=False),
        sa.Column("pack_key", sa.String(64)),
        sa.Column("pack_id", sa.String(64)),
        sa.Column("token", sa.String(64), unique=True),
        sa.Column("priority", sa.Integer(), nullable=False, server_default="0"),
        sa.Column("not_before", sa.Float(), nullable=False, server_default="0"),
        sa.Column("attempts", sa.Integer(), nullable=False, server_default="0"),
        sa.Column("failures", sa.Integer(), nullable=False, server_default="0"),
        sa.Column("preemptions", sa.Integer(), nullable=False, server_default="0"),
        sa.Column("lost", sa.Integer(), nullable=False, server_default="0"),
        sa.Column("cancel_requested", sa.Boolean(), nullable=False, server_default=sa.false()),
        sa.Column("mlflow_run_id", sa.String(64)),
        sa.Column("result", sa.JSON()),
        sa.Column("error", sa.Text()),
        sa.Column("created_at", sa.Float(), nullable=False),
        sa.Column("updated_at", sa.Float(), nullable=False),
        sa.UniqueConstraint("kind", "spec_hash", name="uq_job_kind_spec_hash"),
    )
    op.create_index("ix_job_claim", "job", ["state", "priority", "id"])
    op.create_index("ix_job_pack", "job", ["state", "pack_key", "pack_id"])
    op.create_index("ix_job_experiment", "job", ["experiment", "id"])
    op.create_table(
        "job_dependency",
        sa.Column("job_id", sa.Integer(), sa.ForeignKey("job.id", ondelete="CASCADE"), primary_key=True),
        sa.Column("after_id", sa.Integer(), sa.ForeignKey("job.id", ondelete="CASCADE"), primary_key=True),
    )
    op.create_table(
        "attempt",
        sa.Column("token", sa.String(64), primary_key=True),
        sa.Column("job_id", sa.Integer(), sa.ForeignKey("job.id", ondelete="CASCADE"), nullable=False),
        sa.Column("number", sa.Integer(), nullable=False),
        sa.Column("worker", sa.String(255), nullable=False),
        sa.Column("host", sa.String(255), nullable=False),
        sa.Column("pid", sa.Integer(), nullable=False),
        sa.Column("started_at", sa.Float(), nullable=False),
        sa.Column("lease_until", sa.Float(), nullable=False),
        sa.Column("progress", sa.JSON()),
        sa.Column("progress_at", sa.Float()),
        sa.Column("ended_at", sa.Float()),
        sa.Column("outcome", sa.String(16)),
        sa.Column("error", sa.Text()),
    )
    op.create_index("ix_attempt_job", "attempt", ["job_id"])
    op.create_index("ix_attempt_open", "attempt", ["ended_at", "lease_until"])


def downgrade() -> None:
    """Undo."""
    op.drop_table("attempt")
    op.drop_table("job_dependency")
    op.drop_table("job")
