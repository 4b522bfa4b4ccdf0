"""Moves of aliases, and a row to lock while one is made."""

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"


def upgrade() -> None:
    """Apply."""
    op.create_table(
        "alias",
        sa.Column("name", sa.String(256), primary_key=True),
        sa.Column("alias", sa.String(255), primary_key=True),
    )
    op.create_table(
        "alias_move",
        sa.Column("id", sa.Integer(), primary_key=True, autoincrement=True),
        sa.Column("name", sa.String(256), nullable=False),
        sa.Column("alias", sa.String(255), nullable=False),
        sa.Column("from_version", sa.Integer()),
        sa.Column("to_version", sa.Integer()),
        sa.Column("run_id", sa.String(64)),
        sa.Column("reason", sa.Text(), nullable=False),
        sa.Column("moved_by", sa.String(255), nullable=False),
        sa.Column("moved_at", sa.Float(), nullable=False),
    )
    op.create_index("ix_alias_move", "alias_move", ["name", "alias", "id"])


def downgrade() -> None:
    """Undo."""
    op.drop_index("ix_alias_move", "alias_move")
    op.drop_table("alias_move")
    op.drop_table("alias")
