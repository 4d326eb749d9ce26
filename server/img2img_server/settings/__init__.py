"""Settings, declared once and read from flags, environment variables and a TOML file."""
