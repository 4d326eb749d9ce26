"""Authentication, rate limits and permissions of callers."""
