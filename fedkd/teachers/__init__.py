"""How a client trains its private teacher."""
