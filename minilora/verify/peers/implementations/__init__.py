"""The libraries behind the contract's methods; each module imports its library."""
