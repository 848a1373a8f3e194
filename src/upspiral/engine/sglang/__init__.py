"""SGLang: a client of its server's own API."""
