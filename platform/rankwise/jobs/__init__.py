"""The durable queue. The only user of SQLAlchemy."""
