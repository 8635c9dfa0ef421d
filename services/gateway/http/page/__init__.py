"""The page at GET /: files as they are, without a build step, and the live data that they show."""
