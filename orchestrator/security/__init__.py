"""Who may call the gateway and how much: certificates, tokens, limits, and what is refused."""
