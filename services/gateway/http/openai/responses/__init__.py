"""POST /v1/responses, without memory: each request holds its whole conversation."""
