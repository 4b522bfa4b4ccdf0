"""The step loop that trains a pack of arms over one base."""
