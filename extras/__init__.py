"""Optional: what a run can do without. See README.md."""
