"""What a host needs to run kvbaton under systemd: `scripts/install` and `scripts/doctor`."""
