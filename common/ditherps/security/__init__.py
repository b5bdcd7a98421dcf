"""Who may talk to whom: certificates, tokens, credentials for gRPC, and what is wrong when a handshake fails."""
