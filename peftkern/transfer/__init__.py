"""The choices of transfer learning, measured: rates, cuts, forgetting, negative transfer, domains, data."""
