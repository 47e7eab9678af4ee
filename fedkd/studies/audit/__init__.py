"""Does the promise hold in practice? Attacks on membership, and a lower bound on epsilon."""
