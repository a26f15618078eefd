"""Small things every folder may use: config files, metric sinks, device set-up."""
