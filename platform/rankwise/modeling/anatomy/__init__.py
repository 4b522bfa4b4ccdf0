"""What is inside an adapter: sizes, updates, effective rank, consistency checks."""
