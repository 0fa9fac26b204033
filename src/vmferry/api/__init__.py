"""What goes over the wire: models, problems, TLS identities, the client."""
