"""What networks have learnt, as metrics, tables and pictures, and the tools for trained networks."""
