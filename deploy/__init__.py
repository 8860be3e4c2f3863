"""Running Quire as a service: launchd, systemd and Prometheus."""
