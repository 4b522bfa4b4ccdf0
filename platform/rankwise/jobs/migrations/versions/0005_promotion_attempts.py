"""Comparisons for a promotion, so that repeated ones on the same rows share one error rate."""

import sqlalchemy as sa
from alembic import op

revision = "0005"
down_revision = "0004"


def upgrade() -> None:
    """Apply."""
    op.create_table(
        "promotion_attempt",
        sa.Column("id", sa.Integer(), primary_key=True, autoincrement=True),
        sa.Column("name", sa.String(256), nullable=False),
        sa.Column("alias", sa.String(255), nullable=False),
        sa.Column("key", sa.String(64), nullable=False),
        sa.Column("candidate", sa.Integer(), nullable=False),
        sa.Column("champion", sa.Integer()),
        sa.Column("prompts", sa.JSON(), nullable=False),
        sa.Column("verdict", sa.JSON()),
        sa.Column("run_id", sa.String(64)),
        sa.Column("attempted_by", sa.String(255), nullable=False),
        sa.Column("attempted_at", sa.Float(), nullable=False),
    )
    op.create_index("ix_promotion_attempt", "promotion_attempt", ["name", "alias", "id"])


def downgrade() -> None:
    """Undo."""
    op.drop_index("ix_promotion_attempt", "promotion_attempt")
    op.drop_table("promotion_attempt")
